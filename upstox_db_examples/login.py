"""Who logs in: the real SDK, for one account or for many, or any callable of your own.

A login is a callable `(user_id or None) -> AccessTokenData`. `SdkLogin()` is the default; it reads the SDK's
UPSTOX_* variables when a login is due and not before, so that reading a token needs no credentials.

Two optional attributes let a store answer a caller who names no user: `user_id`, whom the login logs in where that
is known beforehand, and `account`, a name of the credentials that shows nothing of them.
"""

from __future__ import annotations

import base64
import hmac
import logging
import os
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import SplitResult, quote, urlsplit

from upstox_db_examples.errors import (
    ConfigurationError,
    InvalidInput,
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
)
from upstox_db_examples.token import Secret

if TYPE_CHECKING:
    # Imported only when a login is due: the SDK brings an HTTP client along, and a reader of tokens needs none.
    from upstox_totp.models import AccessTokenData

FIELDS = ("username", "password", "pin_code", "totp_secret", "client_id", "client_secret", "redirect_uri")
SHORTEST_TOTP_SECRET = 112  # bits; the SDK refuses a shorter one only after an OTP request was spent
SHORTEST_REDACTED = 4  # characters; blacking out each "a" of a message would tell that the password is "a"
USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,49}")  # as in storage.py, which imports this module

# Upstox's codes: the API's are documented, the login service's were seen in its answers.
FIX_CODES = {
    "UDAPI100016": "the client id or secret is wrong",
    "UDAPI100068": "the client id or the redirect URI is not the app's",
    "UDAPI100069": "the client id or secret is wrong",
    "UDAPI100073": "the app is inactive",
    "1017106": "the PIN is wrong; five wrong ones lock the account",
    "1017108": "the account is locked",
}
WAIT_CODES = {
    "UDAPI10005": ("too many requests", 60.0),
    "1017069": ("Upstox blocked one-time passwords", 600.0),
}
ITS_OWN_FAULT = "Upstox had a fault of its own"
AGAIN_CODES = {
    "UDAPI100057": "the authorization code was used up",
    "1017076": "the one-time password was used up; a new one comes every 30 seconds",
    "UDAPI100500": ITS_OWN_FAULT,
}
# Set while this thread or task logs in.
_logging_in: ContextVar[bool] = ContextVar("_logging_in", default=False)


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
        self._values = {name: _secret(values.get(name)) for name in FIELDS}
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
        """The same for the same account. Nothing can be guessed from it: the TOTP secret is random and long.

        The client id would not do as the key: it stands in addresses, and a mobile number is guessed in seconds.
        """
        plain = self.revealed()
        account = f"{plain['client_id']}/{plain['username']}"
        return hmac.digest(plain["totp_secret"].upper().encode(), account.encode(), "sha256").hex()[:16]

    def redact(self, text: str) -> str:
        """One line of the text without these values, as they are or as they travel, and without any token."""
        values = self.revealed().values()
        forms = {form for v in values for form in (v, quote(v, safe=""), base64.b64encode(v.encode()).decode())}
        # The longest first: else a PIN would be cut out of a longer value, and the rest of that one shown.
        known = [re.escape(form) for form in sorted(forms, key=len, reverse=True) if len(form) >= SHORTEST_REDACTED]
        text = re.sub("|".join([*known, r"eyJ[\w.-]+", r"[\w-]{20,}"]), "…", text, flags=re.IGNORECASE)
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    def _problems(self) -> list[str]:
        plain = self.revealed()
        missing = [f"UPSTOX_{name.upper()} ({name})" for name in FIELDS if not plain[name]]
        if missing:
            return [f"{', '.join(missing)} not set"]
        problems = []
        if not re.fullmatch(r"[0-9]{10}", plain["username"]):
            problems.append("username is not a mobile number of 10 digits")
        if not re.fullmatch(r"[0-9]{4,8}", plain["pin_code"]):
            problems.append("pin_code is not a PIN of digits")
        try:  # As pyotp decodes it: small letters and missing padding will do, spaces will not.
            padding = "=" * (-len(plain["totp_secret"]) % 8)
            bits = 8 * len(base64.b32decode(plain["totp_secret"] + padding, casefold=True))
        except ValueError:
            problems.append("totp_secret is not base32: only A-Z and 2-7, no spaces")
        else:
            if bits < SHORTEST_TOTP_SECRET:
                problems.append(f"totp_secret is cut off: it has {bits} bits of at least {SHORTEST_TOTP_SECRET}")
        if not _url(plain["redirect_uri"]):
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
        pause: seconds after each of the SDK's six requests; by default 1, and 0 on this machine.
        timeout: seconds for each request.

    Raises:
        LoginRefused: the credentials cannot work.
        InvalidInput: the pause or the timeout is out of range.
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
        if credentials is not None and not isinstance(credentials, Credentials):
            credentials = _wrapped(credentials)
            credentials = Credentials(credentials)
        if not (0.001 <= timeout <= 3600 and 0 <= (pause or 0) <= 3600):  # The HTTP client takes 0 for "for ever".
            raise InvalidInput("timeout must be 0.001 to 3600 seconds, and pause 0 to 3600.")
        self._credentials = credentials
        self._user_id = user_id
        self._base_domain = base_domain
        self._pause = pause
        self._timeout = timeout

    @property
    def user_id(self) -> str | None:
        """Whom this logs in, where that was said."""
        return self._user_id or os.environ.get("UPSTOX_USER_ID", "").strip() or None

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
        outcome = _log_in(
            self._credentials or Credentials.from_environment(),
            _checked_base_domain(self._base_domain or os.environ.get("UPSTOX_BASE_DOMAIN") or ""),
            self._pause,
            self._timeout,
        )
        if isinstance(outcome, BaseException):
            # Raised here, outside of any except block and of the frame that knew the client: neither __cause__ nor
            # __context__ nor a traceback leads to the SDK's frames and their secrets.
            raise outcome
        return outcome


class Accounts:
    """Logs several accounts in, each with its own credentials and its own client.

    Args:
        accounts: user id -> credentials, as `Credentials` takes them.
        options: `base_domain`, `pause` and `timeout` of `SdkLogin`, for all of them.

    Raises:
        LoginRefused: there are none, or one of them cannot work.
    """

    def __init__(self, accounts: Mapping[str, Mapping[str, str | Secret]], **options: Any) -> None:
        accounts = {str(k): _wrapped(v) for k, v in accounts.items()} if isinstance(accounts, Mapping) else {}
        if not accounts:
            raise LoginRefused("There are no accounts: a mapping of user ids to credentials, with one at least.")
        self._logins: dict[str, SdkLogin] = {}
        for user_id, values in accounts.items():
            if not values:
                raise LoginRefused(
                    f"{user_id} has no credentials of its own. A file has a line such as [AB1234] for each user id, "
                    "and below it username and so on."
                )
            if not USER_ID.fullmatch(user_id):  # Upstox would never log this user in, and each try would cost a login.
                raise LoginRefused(f"{user_id!r} is no user id: letters and digits, and after the first one . _ @ -.")
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
                    raise ConfigurationError(f"Others can read the accounts in {file}. Run: chmod 600 '{file}'")
                return cls(tomllib.load(opened), **options)
        except OSError as error:
            raise ConfigurationError(f"The accounts in {file} could not be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError):
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
    """Without the space around it. Empty, and so told as not set, for None and all else that is no text."""
    if isinstance(value, Secret):
        value = value.reveal()
    elif hasattr(value, "get_secret_value"):  # pydantic's, which the SDK takes too; its str() is only stars
        value = value.get_secret_value()
    return Secret(str(value).strip() if isinstance(value, str | int) else "")


def _url(text: str) -> SplitResult | None:
    """A URL of a web server, or None. Unlike urlsplit's, its errors hold no text."""
    try:
        url = urlsplit(text)
        return url if url.scheme in ("http", "https") and url.hostname and url.port != 0 else None
    except ValueError:
        return None


def _checked_base_domain(base_domain: str) -> str:
    """Empty for the real Upstox, else a URL with `{stage}` in it, by https or on this machine."""
    if not base_domain:
        return ""
    filled_in = base_domain.replace("{stage}", "api")
    url = _url(filled_in)
    # What @, \\ and spaces mean in a URL is read in more than one way, and curl may not read it as Python does.
    if not url or re.search(r"[\s@\\]", base_domain) or (url.scheme == "http" and not _is_this_machine(base_domain)):
        raise LoginRefused("base_domain must be https, or http on this machine: the PIN and the secrets travel there.")
    if filled_in == base_domain or re.search(r"[{}]", filled_in):
        raise LoginRefused(
            "base_domain must have {stage} in it, which becomes 'api' or 'service', and no other { or }."
        )
    return base_domain.rstrip("/")


def _is_this_machine(base_domain: str) -> bool:
    url = _url(base_domain)
    return bool(url) and url.hostname in ("127.0.0.1", "::1", "localhost")


def _log_in(
    credentials: Credentials, base_domain: str, pause: float | None, timeout: float
) -> AccessTokenData | BaseException:
    """The token or, returned for the caller to raise, what went wrong."""
    from curl_cffi import CurlOpt
    from upstox_totp import UpstoxTOTP
    from upstox_totp.models import AccessTokenResponse

    logging.getLogger("upstox-totp").addFilter(_no_debug)
    quiet = _logging_in.set(True)
    statuses = [0]
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
            request = client.session.request

            def remember(*args: Any, **kwargs: Any) -> Any:
                # The SDK stumbles over a page instead of JSON, and its error does not tell that it was a 429.
                response = request(*args, **kwargs)
                statuses.append(response.status_code)
                return response

            client.session.request = remember  # type: ignore[method-assign]
            response = client.app_token.get_access_token()
        if isinstance(response, AccessTokenResponse) and response.data:
            return response.data
        return _explain(response, statuses[-1], credentials)
    except Exception as error:
        return _explain(error, statuses[-1], credentials)
    except BaseException as error:
        # Ctrl-C goes on its way, but without the frames that it came from.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error
    finally:
        _logging_in.reset(quiet)


def _explain(outcome: object, status: int, credentials: Credentials) -> LoginError:
    """Whatever the SDK raised or oddly returned, as one of our errors that says what to do."""
    from curl_cffi.requests.exceptions import RequestException
    from upstox_totp import ConfigurationError as SdkConfigurationError
    from upstox_totp import UpstoxError

    if isinstance(outcome, RequestException):
        return LoginInterrupted(f"Upstox could not be reached or broke off ({type(outcome).__name__}). Try again.")
    if isinstance(outcome, SdkConfigurationError):
        return LoginRefused("The SDK could not be set up. It reads a .env file where it finds one: is that readable?")
    if isinstance(outcome, UpstoxError):
        code, message = _code_and_message(outcome)
        if code not in FIX_CODES | WAIT_CODES | AGAIN_CODES:
            code = credentials.redact(code)[:40]
        said = f"Upstox said: {credentials.redact(message)[:200]} ({code})"
        if code in FIX_CODES:
            return LoginRefused(f"Fix the credentials: {FIX_CODES[code]}. {said}", code)
        if code in WAIT_CODES or status == 429:
            reason, seconds = WAIT_CODES.get(code, WAIT_CODES["UDAPI10005"])
            return LoginLimited(f"Wait {seconds:.0f} s: {reason}. {said}", code, seconds)
        if code in AGAIN_CODES or status >= 500:
            return LoginInterrupted(f"Log in again: {AGAIN_CODES.get(code, ITS_OWN_FAULT)}. {said}", code)
        return LoginRefused(f"Upstox refused the login. Check the credentials, and this machine's clock. {said}", code)
    if status == 429:
        return LoginLimited("Wait 60 s: too many requests.", "429")
    return LoginInterrupted(
        f"Upstox answered in a form that the SDK does not know (status {status}, {type(outcome).__name__}). Try "
        "again; if it stays, look for a newer upstox-totp or pass a login of your own."
    )


def _code_and_message(error: Any) -> tuple[str, str]:
    """From the raw answer: the SDK maps most codes to one UNKNOWN."""
    details = error.details if isinstance(error.details, Mapping) else {}
    data = details.get("data")
    errors = data.get("errors") if isinstance(data, Mapping) else None
    first = errors[0] if isinstance(errors, list) and errors else details.get("error")
    first = first if isinstance(first, Mapping) else {}
    code = first.get("errorCode") or first.get("error_code") or first.get("code") or "no code"
    return str(code), str(first.get("message") or "nothing")


def _no_debug(record: logging.LogRecord) -> bool:
    """The SDK's debug messages hold the PIN, the secrets and the token. Whoever else uses the SDK keeps his."""
    return record.levelno > logging.DEBUG or not _logging_in.get()
