"""Keep Upstox access tokens in a real database: one class for each storage pattern."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .core.batch import BatchResult, Pace
from .core.cipher import KeyRing
from .core.errors import (
    BackupDamaged,
    ConfigurationError,
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
from .core.store import Options, TokenStorage
from .core.token import ExpiryPolicy, Secret, TokenResult
from .pooled import PooledUpstoxStorage
from .sqlite import SQLiteUpstoxStorage
from .transfer.file import Counts
from .transfer.transfer import export_tokens, import_tokens, migrate

if TYPE_CHECKING:
    from .hybrid import HybridUpstoxStorage
    from .mongodb import MongoUpstoxStorage
    from .postgresql import PostgreSQLUpstoxStorage

__all__ = [
    "Accounts",
    "BackupDamaged",
    "BatchResult",
    "ConfigurationError",
    "Counts",
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
    "TokenNotStored",
    "TokenRefused",
    "TokenResult",
    "TokenStorage",
    "TotpLogin",
    "export_tokens",
    "import_tokens",
    "migrate",
]

# The application decides what is logged and where. Without this handler, Python would print warnings to stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# These are imported on first use, because a program that uses SQLite needs no other database's driver.
_NEED_A_DRIVER = {
    "PostgreSQLUpstoxStorage": "postgresql",
    "MongoUpstoxStorage": "mongodb",
    "HybridUpstoxStorage": "hybrid",
}
# The package to install if a module has another name. PyPI's own `bson` is a different package, and it breaks pymongo.
_INSTALLED_AS = {"bson": "pymongo", "psycopg2": "psycopg2-binary"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_A_DRIVER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    extra = _NEED_A_DRIVER[name]
    try:
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{extra}"), name)
        return globals()[name]
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        package = _INSTALLED_AS.get(module, module)
        message = f"{name} needs {package}. In a clone of this project, run: pip install '.[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
