"""Keep Upstox access tokens in a real database: one class for each storage pattern."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .core.batch import BatchResult, Pace
from .core.cipher import KeyRing
from .core.errors import (
    BackupDamaged,
    ConfigurationError,
    DatabaseMissing,
    InvalidInput,
    KeyUnavailable,
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    LoginSuperseded,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
    TokenRefused,
)
from .core.login import Accounts, SdkLogin, TotpLogin
from .core.settings import Options
from .core.store import TokenStorage
from .core.token import ExpiryPolicy, Secret, TokenResult
from .core.watch import Watch
from .patterns import PATTERNS, import_store, open_store

if TYPE_CHECKING:
    from .asynchronous import AsyncTokenStorage
    from .httpx_auth import StoredTokenAuth
    from .hybrid import HybridUpstoxStorage
    from .mongodb import MongoUpstoxStorage
    from .pooled import PooledUpstoxStorage
    from .postgresql import PostgreSQLUpstoxStorage
    from .sqlite import SQLiteUpstoxStorage
    from .transfer.file import Counts
    from .transfer.transfer import export_tokens, import_tokens, migrate

__all__ = [
    "Accounts",
    "AsyncTokenStorage",
    "BackupDamaged",
    "BatchResult",
    "ConfigurationError",
    "Counts",
    "DatabaseMissing",
    "ExpiryPolicy",
    "HybridUpstoxStorage",
    "InvalidInput",
    "KeyRing",
    "KeyUnavailable",
    "LoginError",
    "LoginInterrupted",
    "LoginLimited",
    "LoginRefused",
    "LoginSuperseded",
    "MongoUpstoxStorage",
    "Options",
    "Pace",
    "PooledUpstoxStorage",
    "PostgreSQLUpstoxStorage",
    "SQLiteUpstoxStorage",
    "SdkLogin",
    "Secret",
    "StorageError",
    "StoreUnavailable",
    "StoredTokenAuth",
    "TokenNotStored",
    "TokenRefused",
    "TokenResult",
    "TokenStorage",
    "TotpLogin",
    "Watch",
    "export_tokens",
    "import_tokens",
    "migrate",
    "open_store",
]

# The application decides what is logged and where. Without this handler, Python would print warnings to stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# What only some programs need: its module, the packages that it needs, and the extras that install them.
_NEEDED_BY_SOME = {
    "AsyncTokenStorage": ("asynchronous", "anyio", "pip install '.[async]'"),
    "StoredTokenAuth": ("httpx_auth", "httpx or requests", "pip install '.[httpx]' or pip install '.[requests]'"),
}


_TRANSFER = ("Counts", "export_tokens", "import_tokens", "migrate")


def __getattr__(name: str) -> Any:
    if name in _TRANSFER:
        globals()[name] = getattr(importlib.import_module(f"{__name__}.transfer"), name)
        return globals()[name]
    # A store is imported on first use, because a program that uses SQLite needs no other database's driver.
    for folder, pattern in PATTERNS.items():
        if name in (folder, pattern.store):
            store = import_store(folder)  # This also sets the folder's name.
            globals()[pattern.store] = store
            return globals()[name]
    if name in _NEEDED_BY_SOME:
        module, packages, command = _NEEDED_BY_SOME[name]
        try:
            globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        except ModuleNotFoundError as error:
            message = f"{name} needs {packages}. In a clone of this project, run: {command}"
            raise ModuleNotFoundError(message, name=error.name) from error
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
