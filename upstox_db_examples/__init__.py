"""Keep Upstox access tokens in a real database: one class for each storage pattern."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from upstox_db_examples.batch import BatchResult, Pace
from upstox_db_examples.cipher import KeyRing
from upstox_db_examples.errors import (
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
from upstox_db_examples.login import Accounts, SdkLogin
from upstox_db_examples.sqlite import SQLiteUpstoxStorage
from upstox_db_examples.storage import TokenStorage
from upstox_db_examples.token import ExpiryPolicy, Secret, TokenResult
from upstox_db_examples.transfer import export_tokens, import_tokens, migrate
from upstox_db_examples.transfer_file import Counts

if TYPE_CHECKING:
    from upstox_db_examples.hybrid import HybridUpstoxStorage
    from upstox_db_examples.mongodb import MongoUpstoxStorage
    from upstox_db_examples.pooled import PooledUpstoxStorage
    from upstox_db_examples.postgresql import PostgreSQLUpstoxStorage

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
    "export_tokens",
    "import_tokens",
    "migrate",
]

# The application decides what is logged, and where; without this Python would print warnings to stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Imported on first use: who keeps tokens in SQLite needs no other database's driver.
_NEED_A_DRIVER = {
    "PostgreSQLUpstoxStorage": "postgresql",
    "MongoUpstoxStorage": "mongodb",
    "HybridUpstoxStorage": "hybrid",
    "PooledUpstoxStorage": "pooled",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_A_DRIVER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    extra = _NEED_A_DRIVER[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{extra}"), name)
    except ModuleNotFoundError as error:
        message = f"{name} needs {error.name}. Install it: pip install 'upstox-db-examples[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
