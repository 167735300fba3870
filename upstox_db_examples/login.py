"""Who logs in: the real SDK, for one account or for many, or any callable of your own.

A login is a callable `(user_id or None) -> AccessTokenData`. `SdkLogin()` is the default; it reads the SDK's
UPSTOX_* variables when a login is due and not before, so that reading a token needs no credentials.

Two optional attributes let a store answer a caller who names no user: `user_id`, whom the login logs in where that
is known beforehand, and `account`, a name of the credentials that shows nothing of them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import re
import shlex
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from .errors import (
    ConfigurationError,
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
)
from .token import Secret

if TYPE_CHECKING:
    # Imported only when a login is due: the SDK brings an HTTP client along, and a reader of tokens needs none.
    from upstox_totp.models import AccessTokenData

logger = logging.getLogger(__name__)

FIELDS = ("username", "password", "pin_code", "totp_secret", "client_id", "client_secret", "redirect_uri")
SHORTEST_TOTP_SECRET = 112  # bits; the SDK refuses a shorter one only after an OTP request was spent

# Upstox's codes: the API's are documented, the login service's were seen in its answers.
FIX_CODES = {
    "UDAPI100016": "the client id or secret is wrong",
    "UDAPI100068": "the client id or the redirect URI is not the app's",
    "UDAPI100069": "the client id or secret is wrong",
    "UDAPI100073": "the app is inactive",
    "1017106": "the PIN is wrong; five wrong ones lock the account",
    "1017108": "the account is locked",
}
# How many seconds, and whether only this account has to wait: a one-time password is sent to one mobile number.
WAIT_CODES = {
    "UDAPI10005": ("too many requests", 60.0, False),
    "1017069": ("Upstox blocked this account's one-time passwords", 600.0, True),
}
AGAIN_CODES = {
    "UDAPI100057": "the authorization code was used up",
    "1017076": "the one-time password was used up; a new one comes every 30 seconds",
    "UDAPI100500": "Upstox had a fault of its own",
}


class Login(Protocol):
    """Anything that logs a user in."""

    def __call__(self, user_id: str | None, /) -> AccessTokenData:
        """Log in; `None` means the only account there is."""


class Credentials:
    """What Upstox asks for, checked before a request is spent. Shows nothing of itself.

    Args:
        values: the SDK's words as keys: username (the mobile number), password, pin_code, totp_secret, client_id,
            client_secret, redirect_uri.

    Raises:
        LoginRefused: something is missing or cannot be right; it says what, not what it was.
    """

    def __init__(self, values: Mapping[str, str | Secret]) -> None:
        values = _wrapped(values)
        if unknown := sorted(set(values) - set(FIELDS)):
            raise LoginRefused(f"Unknown credentials: {', '.join(unknown)}. Known are: {', '.join(FIELDS)}.")
        self._values = {name: _secret(values.get(name, "")) for name in FIELDS}
        if problems := self._problems():
            raise LoginRefused(f"The login cannot work; no request was made: {'; '.join(problems)}.")

    @classmethod
    def from_environment(cls) -> Credentials:
        """From UPSTOX_USERNAME, UPSTOX_PASSWORD and so on, one for each field."""
        return cls({name: os.environ.get(f"UPSTOX_{name.upper()}", "") for name in FIELDS})

    def revealed(self) -> dict[str, str]:
        """The plain values, as the SDK's client takes them."""
        return {name: secret.reveal() for name, secret in self._values.items()}

    def fingerprint(self) -> str:
        """The same for the same account, and nothing to guess a mobile number from: the client id is random."""
        plain = f"{self._values['client_id'].reveal()}/{self._values['username'].reveal()}"
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def redact(self, text: str) -> str:
        """The text without any of these values, and without anything that looks like a token."""
        for secret in self._values.values():
            text = text.replace(secret.reveal(), "…")
        return re.sub(r"eyJ[\w.-]+", "…", text)

    def _problems(self) -> list[str]:
        plain = {name: secret.reveal() for name, secret in self._values.items()}
        missing = [f"UPSTOX_{name.upper()} ({name})" for name in FIELDS if not plain[name]]
        if missing:
            return [f"{', '.join(missing)} not set"]
        problems = []
        if not re.fullmatch(r"[0-9]{10}", plain["username"]):
            problems.append("username is not a mobile number of 10 digits")
        if not re.fullmatch(r"[0-9]{4,8}", plain["pin_code"]):
            problems.append("pin_code is not a PIN of digits")
        try:
            padding = "=" * (-len(plain["totp_secret"]) % 8)
            bits = 8 * len(base64.b32decode(plain["totp_secret"] + padding, casefold=True))
        except binascii.Error:
            problems.append("totp_secret is not base32: only A-Z and 2-7, no spaces")
        else:
            if bits < SHORTEST_TOTP_SECRET:
                problems.append(f"totp_secret is cut off: it has {bits} bits of at least {SHORTEST_TOTP_SECRET}")
        if urlsplit(plain["redirect_uri"]).scheme not in ("http", "https"):
            problems.append("redirect_uri is not a URL")
        # The SDK puts these three into a form without encoding them, and sends something else than was meant.
        problems += [
            f"{name} holds one of & + %, which the SDK does not send rightly"
            for name in ("client_id", "client_secret", "redirect_uri")
            if re.search(r"[&+%]", plain[name])
        ]
        return problems


class SdkLogin:
    """Logs in through upstox-totp, with a new client for each login: a client is not safe to share or to reuse.

    Args:
        credentials: one account's, as `Credentials` takes them; without them the UPSTOX_* variables, read at
            each login.
        user_id: whom these credentials log in, else UPSTOX_USER_ID. With it a store finds the token of a caller
            who names no user without any login, and a wrong account is refused before a login is spent.
        base_domain: where Upstox is, with `{stage}` in it, else UPSTOX_BASE_DOMAIN, else the real one. Plain http
            is taken only on this machine.
        pause: seconds between the SDK's six requests; by default 1, and 0 on this machine.
        timeout: seconds for each request.
    """

    def __init__(
        self,
        credentials: Mapping[str, str | Secret] | Credentials | None = None,
        *,
        user_id: str | None = None,
        base_domain: str | None = None,
        pause: float | None = None,
        timeout: float = 15.0,
    ) -> None:
        if isinstance(credentials, Mapping):
            credentials = _wrapped(credentials)
            credentials = Credentials(credentials)
        self._credentials = credentials
        self._user_id = user_id
        self._base_domain = base_domain
        self._pause = pause
        self._timeout = timeout

    @property
    def user_id(self) -> str | None:
        """Whom this logs in, where that was said."""
        return self._user_id or os.environ.get("UPSTOX_USER_ID") or None

    @property
    def account(self) -> str | None:
        """A name of the credentials that shows nothing of them; None where they are not complete."""
        try:
            return (self._credentials or Credentials.from_environment()).fingerprint()
        except LoginRefused:
            return None

    def __call__(self, user_id: str | None = None, /) -> AccessTokenData:
        """Log in: six requests, about seven seconds at Upstox.

        Raises:
            LoginRefused, LoginLimited, LoginInterrupted: fix, wait, or try again.
        """
        if user_id and self.user_id and user_id != self.user_id:
            raise LoginRefused(f"These credentials log {self.user_id} in, not {user_id}. Use Accounts for several.")
        return _log_in(
            self._credentials or Credentials.from_environment(),
            _checked_base_domain(self._base_domain or os.environ.get("UPSTOX_BASE_DOMAIN") or ""),
            self._pause,
            self._timeout,
        )


class Accounts:
    """Logs several accounts in, each with its own credentials and its own client.

    Args:
        accounts: user id -> credentials, as `Credentials` takes them.
        options: `base_domain`, `pause` and `timeout` of `SdkLogin`, for all of them.
    """

    def __init__(self, accounts: Mapping[str, Mapping[str, str | Secret]], **options: Any) -> None:
        accounts = {user_id: _wrapped(values) for user_id, values in accounts.items()}
        if not accounts:
            raise LoginRefused("There are no accounts.")
        self._logins: dict[str, SdkLogin] = {}
        for user_id, values in accounts.items():
            try:
                self._logins[user_id] = SdkLogin(values, user_id=user_id, **options)
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
        return sorted(self._logins)

    @property
    def user_id(self) -> str | None:
        """The only account, where there is only one."""
        return next(iter(self._logins)) if len(self._logins) == 1 else None

    def __call__(self, user_id: str | None = None, /) -> AccessTokenData:
        """Log this user in; raises like `SdkLogin`."""
        wanted = user_id or self.user_id
        if wanted is None or wanted not in self._logins:
            asked = f"There is no account {user_id}" if user_id else "No account was named"
            raise LoginRefused(f"{asked}. Known are: {', '.join(self.user_ids) or 'none'}.")
        return self._logins[wanted](wanted)


def _wrapped(values: object) -> dict[str, str | Secret]:
    """Each value as a Secret: callers overwrite their own name with it, so that a traceback shows no value."""
    return {str(k): _secret(v) for k, v in values.items()} if isinstance(values, Mapping) else {}


def _secret(value: object) -> Secret:
    return value if isinstance(value, Secret) else Secret(str(value).strip())


def _checked_base_domain(base_domain: str) -> str:
    """Empty for the real Upstox, else a URL with `{stage}` in it, by https or on this machine."""
    if base_domain and urlsplit(base_domain).scheme != "https" and not _is_this_machine(base_domain):
        raise LoginRefused("base_domain must be https: the PIN and the secrets travel there.")
    if base_domain and "{stage}" not in base_domain:
        raise LoginRefused("base_domain must have {stage} in it, which becomes 'api' or 'service'.")
    return base_domain


def _is_this_machine(base_domain: str) -> bool:
    return urlsplit(base_domain).hostname in ("127.0.0.1", "::1", "localhost")


def _log_in(credentials: Credentials, base_domain: str, pause: float | None, timeout: float) -> AccessTokenData:
    from curl_cffi import CurlOpt
    from upstox_totp import UpstoxTOTP
    from upstox_totp.models import AccessTokenResponse

    logging.getLogger("upstox-totp").addFilter(_no_debug)
    where, begin = urlsplit(base_domain.replace("{stage}", "service")).hostname or "Upstox", time.monotonic()
    response = None
    try:
        # debug is said outright: with UPSTOX_DEBUG the SDK would log every secret.
        with UpstoxTOTP(**credentials.revealed(), debug=False) as client:  # type: ignore[arg-type]
            client.base_domain = base_domain or client.base_domain
            if pause is None:
                pause = 0.0 if _is_this_machine(base_domain) else 1.0
            if _is_this_machine(base_domain):
                client.session.curl_options[CurlOpt.NOPROXY] = "*"  # A proxy would look for Upstox on its own machine.
            client.config.sleep_time = pause * 1000  # type: ignore[assignment]  # The constructor ignores it.
            client.session.timeout = timeout
            response = client.app_token.get_access_token()
        if isinstance(response, AccessTokenResponse) and response.data:
            logger.info("%s gave a token after %.1f s", where, time.monotonic() - begin)
            return response.data
        failure = _explain(response, credentials)
    except Exception as error:
        failure = _explain(error, credentials)
    code = f" (code {failure.code})" if failure.code else ""
    logger.info("%s gave no token after %.1f s%s", where, time.monotonic() - begin, code)
    # Raised after the except block: neither __cause__ nor __context__ leads to the SDK's frames and their secrets.
    del response
    raise failure


def _explain(error: object, credentials: Credentials) -> LoginError:
    """Whatever the SDK raised or oddly returned, as one of our errors that says what to do."""
    from curl_cffi.requests.exceptions import RequestException
    from upstox_totp import ConfigurationError as SdkConfigurationError
    from upstox_totp import UpstoxError

    if isinstance(error, UpstoxError):
        code, message = _code_and_message(error)
        said = f"{credentials.redact(message)[:200]} ({code})"
        if code in FIX_CODES:
            return LoginRefused(f"Fix the credentials: {FIX_CODES[code]}. Upstox said: {said}", code)
        if code in WAIT_CODES:
            reason, seconds, account_only = WAIT_CODES[code]
            return LoginLimited(f"Wait {seconds:.0f} s: {reason}. Upstox said: {said}", code, seconds, account_only)
        if code in AGAIN_CODES:
            return LoginInterrupted(f"Log in again: {AGAIN_CODES[code]}. Upstox said: {said}", code)
        return LoginRefused(f"Upstox refused the login. It said: {said}", code)
    if isinstance(error, SdkConfigurationError):
        return LoginRefused("The SDK does not accept these credentials.")
    if isinstance(error, RequestException):
        return LoginInterrupted(f"Upstox could not be reached or broke off ({type(error).__name__}). Try again.")
    if getattr(error, "status_code", None) == 429:
        return LoginLimited("Wait 60 s: too many requests.", "429")
    return LoginInterrupted(
        f"Upstox answered in a form that the SDK does not know ({type(error).__name__}). Try again; if it stays, "
        "look for a newer upstox-totp or pass a login of your own."
    )


def _code_and_message(error: Any) -> tuple[str, str]:
    """From the raw answer: the SDK maps most codes to one UNKNOWN."""
    details = error.details or {}
    data = details.get("data")
    errors = data.get("errors") if isinstance(data, Mapping) else None
    first = errors[0] if isinstance(errors, list) and errors else details.get("error")
    first = first if isinstance(first, Mapping) else {}
    code = first.get("errorCode") or first.get("error_code") or first.get("code") or "no code"
    return str(code), str(first.get("message") or "nothing")


def _no_debug(record: logging.LogRecord) -> bool:
    """The SDK's debug messages hold the PIN, the secrets and the token."""
    return record.levelno > logging.DEBUG
