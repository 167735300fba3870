"""The logins: Upstox's SDK, Upstox's one-call login, one of these per account, or any callable of your own.

A login is a callable `(user_id or None) -> answer`; `read_answer` lists the answers it understands. `SdkLogin()` is the
default. It reads the SDK's UPSTOX_* variables only when a login is due, so reading a token needs no credentials.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from . import upstox_api
from .answer import LoginAnswer, Minted, read_answer
from .checks import USER_ID
from .credentials import FIELDS, SHORTEST_TOTP_SECRET, TOTP_FIELDS, Credentials, TotpCredentials, wrap_credentials
from .errors import ConfigurationError, LoginRefused
from .refusals import AGAIN_CODES, FIX_CODES, WAIT_CODES
from .sdk_login import SdkLogin
from .secret_files import read_secret_file
from .token import Secret, subject
from .totp_login import TotpLogin
from .upstox_api import log_out, owner_of

__all__ = [
    "AGAIN_CODES",
    "FIELDS",
    "FIX_CODES",
    "SHORTEST_TOTP_SECRET",
    "TOTP_FIELDS",
    "WAIT_CODES",
    "Accounts",
    "Credentials",
    "Login",
    "LoginAnswer",
    "Minted",
    "SdkLogin",
    "TotpCredentials",
    "TotpLogin",
    "log_out",
    "owner_of",
    "read_answer",
]


class Login(Protocol):
    """Anything that logs a user in: a function is enough.

    A login may also have these members. A store uses those that exist:

    - `user_id`: the user it logs in, or None if that is not known beforehand.
    - `account`: a name for its credentials that reveals nothing about them. A store uses it to find the token of a
      caller who names no user. It is None if the credentials are incomplete or belong to several accounts.
    - `account_of(user_id)`: the same for one user.
    - `credentials_digest(user_id)`: a text that changes whenever the user's credentials change. A store keeps it with
      a refusal, always encrypted.
    - `check(user_id)`: raise `LoginRefused` if a login cannot work, without any request.
    - `owner_of(token)`: ask Upstox whose token this is; None if it is dead.
    - `log_out(token)`: end a token at Upstox; False if it was already dead.

    A login should raise `LoginError`s with `token_may_exist` set, so that a store knows whether the earlier token is
    in doubt.
    """

    def __call__(self, user_id: str | None, /) -> object:
        """Log in. `None` means the login's only account. `read_answer` says what this may return."""


class Accounts:
    """Logs several accounts in, each with its own credentials and its own client.

    User ids are compared without regard to case.

    Args:
        accounts: user id -> credentials, as `Credentials` takes them. If they are only client_id, pin_code and
            totp_secret, `TotpLogin` logs the account in; otherwise `SdkLogin` does. A ready login can replace the
            credentials.
        options: `base_domain`, `pause` and `timeout` for every `SdkLogin` made here.

    Example:
        >>> login = Accounts.from_file("accounts.toml")
        >>> login.user_ids
        ['AB1234', 'CD5678']
        >>> with SQLiteUpstoxStorage("several.db", login=login) as several:
        ...     result = several.get_or_create_token("CD5678")
    """

    def __init__(self, accounts: Mapping[str, Mapping[str, str | Secret] | Login], **options: Any) -> None:
        accounts = {
            user_id: wrap_credentials(it) if isinstance(it, Mapping) else it for user_id, it in accounts.items()
        }
        if not accounts:
            raise LoginRefused("Accounts needs at least one account.")
        if not all(isinstance(user_id, str) and USER_ID.fullmatch(user_id) for user_id in accounts):
            raise LoginRefused("Each account must have a user id as its name, such as AB1234.")
        if unknown := sorted(set(options) - {"base_domain", "pause", "timeout"}):
            raise TypeError(f"Accounts does not take {', '.join(unknown)}.")
        self._base_domain: str | None = options.get("base_domain")
        self._logins: dict[str, tuple[str, Login]] = {}  # by the user id in upper case
        for user_id, values in accounts.items():
            if user_id.upper() in self._logins:
                raise LoginRefused(f"{user_id} is listed twice. User ids are not case-sensitive.")
            try:
                self._logins[user_id.upper()] = user_id, _make_login(user_id, values, options)
            except LoginRefused as error:
                error.args = (f"{user_id}: {error}",)
                raise

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **options: Any) -> Accounts:
        """Read a TOML file with one table per account: `[AB1234]`, `username = "…"`, and so on.

        Raises:
            ConfigurationError: the file cannot be read, is readable by others, or is not TOML.
            LoginRefused: the credentials of an account cannot work.
        """
        import tomllib

        text = read_secret_file(path, "the accounts file")
        try:
            return cls(tomllib.loads(text.reveal()), **options)
        except (tomllib.TOMLDecodeError, RecursionError):
            pass  # The parser's frames hold the file's text, so raise below, without a cause that shows it.
        raise ConfigurationError(f"{path} is not a TOML file with one table for each user id, such as [AB1234].")

    @property
    def user_ids(self) -> list[str]:
        """The users that this can log in."""
        return sorted(user_id for user_id, _ in self._logins.values())

    @property
    def user_id(self) -> str | None:
        """The user id, if there is only one account."""
        return self.user_ids[0] if len(self._logins) == 1 else None

    @property
    def account(self) -> str | None:
        """A name for the only account's credentials; None if there are several accounts."""
        return self.account_of(self.user_id) if self.user_id else None

    def account_of(self, user_id: str | None = None) -> str | None:
        """Return a name for this user's credentials that reveals nothing about them; None for an unknown user."""
        login = self._find(user_id)
        account_of = getattr(login, "account_of", None)
        account: str | None = account_of(user_id) if account_of else getattr(login, "account", None)
        return account

    def credentials_digest(self, user_id: str | None = None) -> str | None:
        """Return a text that changes with the user's credentials, or None for an unknown user. Keep it encrypted."""
        digest: Callable[[str | None], str | None] | None = getattr(self._find(user_id), "credentials_digest", None)
        return digest(user_id) if digest else None

    def check(self, user_id: str | None = None) -> None:
        """Check that a login could work, without any request.

        Raises:
            LoginRefused: there is no such account, or its credentials cannot be right.
        """
        name, login = self._require_account(user_id)
        if check := getattr(login, "check", None):
            check(name)

    def owner_of(self, token: Secret) -> str | None:
        """Ask Upstox whose token this is; None if Upstox does not accept it. See `upstox_api.owner_of`."""
        own = getattr(self._find(subject(token)), "owner_of", None)
        owner: str | None = own(token) if own else upstox_api.owner_of(token, self._base_domain or "")
        return owner

    def log_out(self, token: Secret) -> bool:
        """End this token at Upstox; False if it was already dead. See `upstox_api.log_out`."""
        own = getattr(self._find(subject(token)), "log_out", None)
        return bool(own(token)) if own else upstox_api.log_out(token, self._base_domain or "")

    def __call__(self, user_id: str | None = None, /) -> Any:
        """Log this user in. This raises the same errors as `SdkLogin`."""
        name, login = self._require_account(user_id)
        return login(name)

    def _find(self, user_id: str | None) -> Login | None:
        wanted = user_id or self.user_id
        return self._logins[wanted.upper()][1] if wanted and wanted.upper() in self._logins else None

    def _require_account(self, user_id: str | None) -> tuple[str, Login]:
        wanted = user_id or self.user_id
        if wanted is None or wanted.upper() not in self._logins:
            asked = f"There is no account {user_id}" if user_id else "No account was named"
            raise LoginRefused(f"{asked}. The known ones: {', '.join(self.user_ids)}.")
        return self._logins[wanted.upper()]


def _make_login(user_id: str, given: Mapping[str, str | Secret] | Login, options: Mapping[str, Any]) -> Login:
    if isinstance(given, Mapping):
        if given and set(given) <= set(TOTP_FIELDS):
            return TotpLogin(given, user_id=user_id, **{name: options[name] for name in options if name != "pause"})
        return SdkLogin(given, user_id=user_id, **options)
    if not callable(given) or inspect.isclass(given):
        raise LoginRefused("This is neither a table of credentials nor a login.")
    declared = getattr(given, "user_id", None)
    if isinstance(declared, str) and declared.upper() != user_id.upper():
        raise LoginRefused(f"This login belongs to another user, {declared}.")
    return given
