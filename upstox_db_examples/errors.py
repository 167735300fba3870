"""What can go wrong, in words that say what to do.

Every error of this package is a `StorageError`. Where a database driver failed, its exception is the cause
(`error.__cause__`). Where the login failed there is no cause on purpose: the SDK's exceptions and their frames
hold PINs and tokens.
"""

from __future__ import annotations

from .token import Secret


class StorageError(Exception):
    """Anything that this package raises on purpose."""


class InvalidInput(StorageError, ValueError):
    """An argument is not usable. Nothing was read or written."""


class ConfigurationError(StorageError):
    """A path, a key file, a schema or a setting has to be mended first. Trying again changes nothing."""


class StoreUnavailable(StorageError):
    """The database cannot be reached, is locked or is full. Nothing was half-written; try again when it is back."""


class KeyUnavailable(StorageError):
    """A token was encrypted with a key that is not in the key ring. The row is untouched.

    Attributes:
        key_id: which key is missing.
    """

    def __init__(self, key_id: str) -> None:
        super().__init__(
            f"The token is encrypted with key {key_id}, which is not in the key ring. Put that key back "
            "(keys=, UPSTOX_DB_KEYS or the key file), or log in again with store_token()."
        )
        self.key_id = key_id


class TokenRefused(StorageError):
    """A stored token does not belong to its row: moved, changed, prolonged, cut, or never encrypted."""


class BackupDamaged(StorageError):
    """An export that was cut off, changed or put together: nothing of it was imported. Take another one."""


class LoginError(StorageError):
    """No token was obtained. The children say what to do.

    Attributes:
        code: Upstox's error code, where it gave one.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class LoginRefused(LoginError):
    """Fix the configuration first. Never retry as it is: five wrong PINs lock the account."""


class LoginLimited(LoginError):
    """Wait before the next login.

    Attributes:
        retry_after: how long, in seconds.
        account_only: whether other accounts can log in meanwhile.
    """

    def __init__(
        self, message: str, code: str | None = None, retry_after: float = 60.0, account_only: bool = False
    ) -> None:
        super().__init__(message, code)
        self.retry_after = retry_after
        self.account_only = account_only


class LoginInterrupted(LoginError):
    """The login broke off half-way: try again, from its start."""


class LoginSuperseded(LoginError):
    """Another login for this user was stored while this one was under way. Read that one's token."""


class TokenNotStored(StorageError):
    """A login gave a token, and the database then refused it.

    The token lives and the user's earlier one is dead, so it must not be lost: `error.token.reveal()` is it.

    Attributes:
        token: the new token, masked when shown.
        user_id: whose it is.
    """

    def __init__(self, token: Secret, user_id: str, reason: StorageError) -> None:
        super().__init__(
            f"Logged in as {user_id}, but the token could not be stored: {reason} "
            "The new token is in this error: error.token.reveal()."
        )
        self.token = token
        self.user_id = user_id
