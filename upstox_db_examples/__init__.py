"""Keep Upstox access tokens in a real database: one class for each storage pattern."""

from upstox_db_examples.cipher import KeyRing
from upstox_db_examples.errors import (
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

__all__ = [
    "Accounts",
    "ConfigurationError",
    "ExpiryPolicy",
    "InvalidInput",
    "KeyRing",
    "KeyUnavailable",
    "LoginError",
    "LoginInterrupted",
    "LoginLimited",
    "LoginRefused",
    "LoginSuperseded",
    "SQLiteUpstoxStorage",
    "SdkLogin",
    "Secret",
    "StorageError",
    "StoreUnavailable",
    "TokenNotStored",
    "TokenRefused",
    "TokenResult",
    "TokenStorage",
]
