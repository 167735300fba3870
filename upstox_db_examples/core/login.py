"""Who logs in: Upstox's SDK, its one-call login, one of these for each of many accounts, or any callable of your own.

A login is a callable `(user_id or None) -> answer`; `read_answer` says which answers are understood. `SdkLogin()` is
the default. It reads the SDK's UPSTOX_* variables when a login is due and not before, so that reading a token needs no
credentials.
"""

from __future__ import annotations

import inspect
import os
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from . import upstox_api
from .answer import LoginAnswer, Minted, read_answer
from .credentials import FIELDS, SHORTEST_TOTP_SECRET, TOTP_FIELDS, Credentials, TotpCredentials, wrapped
from .errors import ConfigurationError, LoginRefused
from .refusals import AGAIN_CODES, FIX_CODES, WAIT_CODES
from .sdk_login import SdkLogin
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

    A store uses these members as well where a login has them. Each is optional:

    - `user_id`: whom it logs in, where that is known beforehand; None otherwise.
    - `account`: a name of its credentials that shows nothing of them. With it a store finds the token of a caller who
      names no user. None if there are no complete credentials, or those of several accounts.
    - `account_of(user_id)`: the same for one user.
    - `credentials_digest(user_id)`: another text whenever that user's credentials have changed. A store remembers a
      refusal together with it, and only encrypted.
    - `check(user_id)`: raise `LoginRefused` if a login cannot work, without any request.
    - `owner_of(token)`: ask Upstox whose token this is; None if it is dead.
    - `log_out(token)`: end a token at Upstox; False if it was dead already.

    It should raise `LoginError`s with `token_may_exist` set, so that a store knows whether the earlier token is in
    doubt.
    """

    def __call__(self, user_id: str | None, /) -> object:
        """Log in; `None` means the only account there is. `read_answer` says what can be returned."""


class Accounts:
    """Logs several accounts in, each with its own credentials and its own client.

    User ids are compared without regard to case.

    Args:
        accounts: user id -> credentials, as `Credentials` takes them. With nothing but client_id, pin_code and
            totp_secret, the account is logged in by `TotpLogin`, and otherwise by `SdkLogin`. A ready login can stand
            in place of credentials.
        options: `base_domain`, `pause` and `timeout` of `SdkLogin`, for all that are made here.
    """

    def __init__(self, accounts: Mapping[str, Mapping[str, str | Secret] | Login], **options: Any) -> None:
        accounts = {user_id: wrapped(it) if isinstance(it, Mapping) else it for user_id, it in accounts.items()}
        if not accounts:
            raise LoginRefused("There are no accounts.")
        if unknown := sorted(set(options) - {"base_domain", "pause", "timeout"}):
            raise TypeError(f"Accounts does not know {', '.join(unknown)}.")
        self._base_domain: str | None = options.get("base_domain")
        self._logins: dict[str, tuple[str, Login]] = {}  # by the user id in upper case
        for user_id, values in accounts.items():
            if user_id.upper() in self._logins:
                raise LoginRefused(f"{user_id} is there twice. User ids are compared without regard to case.")
            try:
                self._logins[user_id.upper()] = user_id, _login_of(user_id, values, options)
            except LoginRefused as error:
                error.args = (f"{user_id}: {error}",)
                raise

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **options: Any) -> Accounts:
        """From a TOML file with one table an account: `[AB1234]`, `username = "…"`, and so on.

        Raises:
            ConfigurationError: it cannot be read, others can read it, or it is not TOML.
            LoginRefused: the credentials of an account cannot work.
        """
        file = Path(path).expanduser()
        try:
            with file.open("rb") as opened:
                if os.fstat(opened.fileno()).st_mode & 0o077:
                    raise ConfigurationError(
                        f"Others can read the accounts in {file}. Run: chmod 600 {shlex.quote(str(file))}"
                    )
                return cls(tomllib.load(opened), **options)
        except OSError as error:
            raise ConfigurationError(f"The accounts in {file} could not be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            pass  # The parser's frames hold the file's text. Raised below, our error has no cause that shows it.
        raise ConfigurationError(f"{file} is not a TOML file with one table for each user id, such as [AB1234].")

    @property
    def user_ids(self) -> list[str]:
        """Whom this can log in."""
        return sorted(user_id for user_id, _ in self._logins.values())

    @property
    def user_id(self) -> str | None:
        """The only account, where there is only one."""
        return self.user_ids[0] if len(self._logins) == 1 else None

    @property
    def account(self) -> str | None:
        """A name of the only account's credentials; None where there are several."""
        return self.account_of(self.user_id) if self.user_id else None

    def account_of(self, user_id: str | None = None) -> str | None:
        """A name of this user's credentials that shows nothing of them; None for an unknown user."""
        login = self._find(user_id)
        account_of = getattr(login, "account_of", None)
        account: str | None = account_of(user_id) if account_of else getattr(login, "account", None)
        return account

    def credentials_digest(self, user_id: str | None = None) -> str | None:
        """Another text whenever this user's credentials have changed; keep it encrypted. None for an unknown user."""
        digest: Callable[[str | None], str | None] | None = getattr(self._find(user_id), "credentials_digest", None)
        return digest(user_id) if digest else None

    def check(self, user_id: str | None = None) -> None:
        """See whether a login could work, without any request.

        Raises:
            LoginRefused: there is no such account, or its credentials cannot be right.
        """
        name, login = self._known(user_id)
        if check := getattr(login, "check", None):
            check(name)

    def owner_of(self, token: Secret) -> str | None:
        """Ask Upstox whose token this is; None if Upstox does not accept it. See `upstox_api.owner_of`."""
        own = getattr(self._find(subject(token)), "owner_of", None)
        owner: str | None = own(token) if own else upstox_api.owner_of(token, self._base_domain or "")
        return owner

    def log_out(self, token: Secret) -> bool:
        """End this token at Upstox; False if it was dead already. See `upstox_api.log_out`."""
        own = getattr(self._find(subject(token)), "log_out", None)
        return bool(own(token)) if own else upstox_api.log_out(token, self._base_domain or "")

    def __call__(self, user_id: str | None = None, /) -> Any:
        """Log this user in; raises like `SdkLogin`."""
        name, login = self._known(user_id)
        return login(name)

    def _find(self, user_id: str | None) -> Login | None:
        wanted = user_id or self.user_id
        return self._logins[wanted.upper()][1] if wanted and wanted.upper() in self._logins else None

    def _known(self, user_id: str | None) -> tuple[str, Login]:
        wanted = user_id or self.user_id
        if wanted is None or wanted.upper() not in self._logins:
            asked = f"There is no account {user_id}" if user_id else "No account was named"
            raise LoginRefused(f"{asked}. Known are: {', '.join(self.user_ids)}.")
        return self._logins[wanted.upper()]


def _login_of(user_id: str, given: Mapping[str, str | Secret] | Login, options: Mapping[str, Any]) -> Login:
    if isinstance(given, Mapping):
        if given and set(given) <= set(TOTP_FIELDS):
            return TotpLogin(given, user_id=user_id, **{name: options[name] for name in options if name != "pause"})
        return SdkLogin(given, user_id=user_id, **options)
    if not callable(given) or inspect.isclass(given):
        raise LoginRefused("This is neither a table of credentials nor a login.")
    declared = getattr(given, "user_id", None)
    if isinstance(declared, str) and declared.upper() != user_id.upper():
        raise LoginRefused(f"This login logs {declared} in.")
    return given
