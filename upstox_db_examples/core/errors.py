"""The errors of this package. Each message says what to do.

Every error is a `StorageError`. If a database driver failed, its exception is the cause (`error.__cause__`). If the
login failed, there is no cause on purpose: the SDK's exceptions and their frames hold PINs and tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

from .token import Secret


class StorageError(Exception):
    """The base of every error that this package raises on purpose.

    Attributes:
        token: a token that a login has just made and that no database has, masked when shown. Save it, for example
            with `save_token`. It is None in every other error.
        user_id: the owner of that token, if the answer named one.
        others: if this ended a batch, the errors of its other accounts with such tokens.

    Example:
        >>> try:
        ...     result = storage.get_or_create_token("CD5678")
        ... except StorageError as error:
        ...     print(type(error).__name__, error.token)
        LoginRefused None
    """

    token: Secret | None = None
    user_id: str | None = None
    others: Sequence[StorageError] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the finished message: Python would pass it to the constructor, which would put it into another one.

        A token is left out, because anyone who reads the file would see it.
        """
        state = {name: value for name, value in self.__dict__.items() if not isinstance(value, Secret)}
        lost = " (The token is not in this copy of the error. It is only where the login ran.)"
        return _rebuild, (type(self), (f"{self}{lost}",) if self.token else self.args, state)

    def __copy__(self) -> Self:
        return _rebuild(type(self), self.args, self.__dict__)

    def __deepcopy__(self, _: object) -> Self:
        return self.__copy__()


def _rebuild[Error: StorageError](kind: type[Error], args: tuple[Any, ...], state: dict[str, Any]) -> Error:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidInput(StorageError, ValueError):
    """An argument is not usable. Nothing was read or written.

    Example:
        >>> try:
        ...     storage.get_valid_token("not a user id")
        ... except InvalidInput as error:
        ...     print(error)
        A user id must be 1 to 50 letters and digits. After the first character, . _ @ and - are allowed too.
    """


class ConfigurationError(StorageError):
    """A path, a key file, a schema or a setting must be fixed first. A retry changes nothing.

    Example:
        >>> try:
        ...     SQLiteUpstoxStorage("missing_folder/upstox.db")
        ... except ConfigurationError as error:
        ...     print(error)
        missing_folder/upstox.db cannot be created: No such file or directory.
    """


class DatabaseMissing(ConfigurationError):
    """A store was opened with `create=False`, and its file or its tables do not exist. Nothing was made.

    Example:
        >>> try:
        ...     open_store("mistyped.db", create=False)
        ... except DatabaseMissing as error:
        ...     print(error)
        /...mistyped.db does not exist.
    """


class StoreUnavailable(StorageError):
    """The database cannot be reached, is locked or is full. Nothing was half-written. Try again when it is back.

    Example:
        >>> storage.close()
        >>> try:
        ...     storage.get_valid_token("AB1234")
        ... except StoreUnavailable as error:
        ...     print(error)
        This store is closed.
    """


class KeyUnavailable(StorageError):
    """A token was encrypted with a key that is not in the key ring. The row is untouched.

    Attributes:
        key_id: the id of the missing key.

    Example:
        >>> result = storage.get_or_create_token("AB1234")
        >>> with SQLiteUpstoxStorage("upstox.db", keys=KeyRing(KeyRing.new_key())) as elsewhere:
        ...     try:
        ...         elsewhere.get_valid_token("AB1234")
        ...     except KeyUnavailable as error:
        ...         print(error.key_id in storage.keys_in_use())
        True
    """

    def __init__(self, key_id: str) -> None:
        # A task queue such as Celery rebuilds an error from its args. Then this is the whole message.
        if named := re.search(r" key (\S+), which", key_id):
            super().__init__(key_id)
            self.key_id = named[1]
            return
        super().__init__(
            f"The token is encrypted with key {key_id}, which is not in the key ring. Put that key back "
            "(keys=, UPSTOX_DB_KEYS or the key file), or log in again with 'upstox-db login' or "
            "store_token()."
        )
        self.key_id = key_id


class TokenRefused(StorageError):
    """A stored token does not belong to its row: it was moved, changed, prolonged, cut off, or never encrypted.

    Example:
        >>> result = storage.get_or_create_token("AB1234")
        >>> with storage.get_connection() as conn:
        ...     changed = conn.execute("UPDATE upstox_tokens SET expires_at = expires_at + 86400")
        >>> try:
        ...     storage.get_valid_token("AB1234")
        ... except TokenRefused as error:
        ...     print(error)
        The stored token of AB1234 was changed or belongs to another row. ...
    """


class BackupDamaged(StorageError):
    """An export was cut off, changed, or assembled from parts. Nothing was imported. Use another export.

    Example:
        >>> counts = export_tokens(storage, "upstox.export", progress=False)
        >>> with open("upstox.export", "a") as file:
        ...     written = file.write("one more line")
        >>> try:
        ...     import_tokens(storage, "upstox.export", progress=False)
        ... except BackupDamaged as error:
        ...     print(error)
        upstox.export is not a complete export: it was cut off or changed. Nothing was imported.
    """


class LoginError(StorageError):
    """The login gave no token. The subclasses say what to do.

    Attributes:
        code: Upstox's error code, if there is one.
        token_may_exist: whether Upstox may have made a token anyway. If so, it has killed the user's earlier one.
        login_began: whether this login was tried. If not, Upstox has counted nothing.

    Example:
        >>> upstox.fail("lost")  # the answer with the token gets lost
        >>> try:
        ...     result = storage.store_token("AB1234")
        ... except LoginError as error:
        ...     print(type(error).__name__, error.token_may_exist)
        LoginInterrupted True
    """

    token_may_exist: bool = True
    login_began: bool = True

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class LoginRefused(LoginError):
    """Fix the configuration first. Never retry unchanged: five wrong PINs lock the account.

    Example:
        >>> wrong = SdkLogin({**credentials, "pin_code": "000000"})
        >>> with SQLiteUpstoxStorage("upstox.db", login=wrong) as mistaken:
        ...     try:
        ...         mistaken.store_token()
        ...     except LoginRefused as error:
        ...         print(error.code)
        1017106
    """

    token_may_exist = False


class LoginLimited(LoginError):
    """Wait before the next login.

    Attributes:
        retry_after: how long to wait, in seconds.
        account_only: whether other accounts can log in meanwhile.

    Example:
        >>> upstox.fail("rate_limit")
        >>> try:
        ...     storage.store_token("AB1234")
        ... except LoginLimited as error:
        ...     print(f"Wait {error.retry_after:.0f} s.")
        Wait 60 s.
    """

    token_may_exist = False

    def __init__(
        self, message: str, code: str | None = None, retry_after: float = 60.0, account_only: bool = False
    ) -> None:
        super().__init__(message, code)
        self.retry_after = retry_after
        self.account_only = account_only


class LoginInterrupted(LoginError):
    """The login broke off half-way. Start it again.

    `token_may_exist` is False if it broke off before the last request. `token` is set if Upstox's answer holds a token
    but cannot be used as it is.

    Example:
        >>> upstox.fail("drop")
        >>> try:
        ...     result = storage.store_token("AB1234")
        ... except LoginInterrupted:
        ...     result = storage.store_token("AB1234")
    """


class LoginSuperseded(LoginError):
    """The store has a token that Upstox issued later. Read that one; the one in `token` is dead or soon will be.

    Example:
        >>> earlier = upstox.notify("AB1234")  # a token that arrives late
        >>> upstox.move_clock(timedelta(seconds=10))
        >>> later = storage.store_token("AB1234")
        >>> storage.revoke_token("AB1234")
        True
        >>> try:
        ...     storage.save_token(earlier)
        ... except LoginSuperseded as error:
        ...     print(error.token)
        eyJ0…(336 chars)
    """


class TokenNotStored(StorageError):
    """A login gave a token, and then the database refused it.

    The token works and the user's earlier one is dead, so do not lose it: `error.token.reveal()` returns it.

    Attributes:
        token: the new token, masked when shown.
        user_id: the token's owner; None if the answer named nobody.

    Example:
        >>> def login(user_id):
        ...     storage.close()  # the database goes away during the login
        ...     return upstox.notify(user_id)
        >>> storage.login = login
        >>> try:
        ...     storage.store_token("AB1234")
        ... except TokenNotStored as error:
        ...     print(error.user_id, error.token)
        AB1234 eyJ0…(336 chars)
    """

    token: Secret

    def __init__(self, token: Secret | str, user_id: str | None = None, reason: BaseException | None = None) -> None:
        if isinstance(token, str):  # The whole message, without the token; see `KeyUnavailable`.
            super().__init__(token)
            return
        super().__init__(
            f"Logged in as {user_id or 'an unnamed user'}, but the token could not be stored: {reason} "
            "The new token is in this error: error.token.reveal()."
        )
        self.token = token
        self.user_id = user_id
