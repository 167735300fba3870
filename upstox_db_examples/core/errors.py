"""What can go wrong, in words that say what to do.

Every error of this package is a `StorageError`. Where a database driver failed, its exception is the cause
(`error.__cause__`). Where the login failed there is no cause on purpose: the SDK's exceptions and their frames
hold PINs and tokens.
"""

from __future__ import annotations

from .token import Secret


class StorageError(Exception):
    """Anything that this package raises on purpose.

    Attributes:
        token: a token that a login has just made and that no database has, masked when shown: save it, for example
            with `save_token`. None in every other error.
        user_id: whose token that is, where the answer named a user.
    """

    token: Secret | None = None
    user_id: str | None = None


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
        token_may_exist: whether Upstox may have made a token all the same. It has then killed the user's earlier one.
    """

    token_may_exist: bool = True

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class LoginRefused(LoginError):
    """Fix the configuration first. Never retry as it is: five wrong PINs lock the account."""

    token_may_exist = False


class LoginLimited(LoginError):
    """Wait before the next login.

    Attributes:
        retry_after: how long, in seconds.
        account_only: whether other accounts can log in meanwhile.
    """

    token_may_exist = False

    def __init__(
        self, message: str, code: str | None = None, retry_after: float = 60.0, account_only: bool = False
    ) -> None:
        super().__init__(message, code)
        self.retry_after = retry_after
        self.account_only = account_only


class LoginInterrupted(LoginError):
    """The login broke off half-way: try again, from its start.

    `token_may_exist` is False where it broke off before the last request. `token` is set where an answer came that
    cannot be used as it is.
    """


class LoginSuperseded(LoginError):
    """A token of this user that Upstox issued later is stored. Read that one; the one in `token` is dead or will be."""


class TokenNotStored(StorageError):
    """A login gave a token, and the database then refused it.

    The token lives and the user's earlier one is dead, so it must not be lost: `error.token.reveal()` is it.

    Attributes:
        token: the new token, masked when shown.
        user_id: whose it is; None where the answer named nobody.
    """

    token: Secret

    def __init__(self, token: Secret, user_id: str | None, reason: BaseException) -> None:
        super().__init__(
            f"Logged in as {user_id or 'an unnamed user'}, but the token could not be stored: {reason} "
            "The new token is in this error: error.token.reveal()."
        )
        self.token = token
        self.user_id = user_id
