"""The default login: it runs the SDK upstox-totp and watches its requests.

The SDK's model of the last answer requires fields that real answers lack, and by then the token already exists. So we
watch the session of our own client and take the answer before the SDK parses it. Two other ways were rejected: a patch
of the model would change it for every other user of the SDK in the process, and a subclass of the SDK's private API
class would break with the next release.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from . import upstox_api
from .answer import LoginAnswer, fields_of, find_token, read_answer, without_tokens
from .checks import USER_ID
from .credentials import Credentials, wrap_credentials
from .environment import clean, read_variable
from .errors import LoginError, LoginInterrupted, LoginRefused
from .interrupts import raise_pending
from .refusals import Reply, by_code, code_and_message, explain
from .token import Secret, subject
from .upstox_api import checked_base_domain, is_this_machine, lost_reply

if TYPE_CHECKING:
    # Import these only when a login is due: the SDK loads an HTTP client, and a program that only reads needs none.
    from curl_cffi import Session

logger = logging.getLogger(__name__)

DIALOG = "/authorization/dialog"
# Paths with these endings never make a token. Any other path may make one, so a newer SDK is watched as well.
MAKE_NO_TOKEN = (DIALOG, "/otp/generate", "/otp-totp/verify", "/auth/2fa", "/oauth/authorize")


class SingleLogin:
    """The base of the logins for one account: they share the user id and Upstox's address."""

    credentials_class: type[Credentials] = Credentials

    def __init__(
        self,
        credentials: Mapping[str, str | Secret] | Credentials | None,
        user_id: str | None,
        base_domain: str | None,
        timeout: float,
    ) -> None:
        if isinstance(credentials, Mapping):
            credentials = wrap_credentials(credentials)
            credentials = self.credentials_class(credentials)
        self._credentials = credentials
        self._user_id = user_id
        self._base_domain = base_domain
        self._timeout = timeout

    @property
    def user_id(self) -> str | None:
        """The user that this logs in, if it was given one.

        Raises:
            LoginRefused: this is no user id. A login would be spent, and its token would belong to somebody else.
        """
        given = clean(self._user_id or "")
        user_id = given or read_variable("UPSTOX_USER_ID", any_character=True)
        if user_id and not USER_ID.fullmatch(user_id):
            where = "The login's user_id" if given else "UPSTOX_USER_ID"
            raise LoginRefused(f"{where} is not a user id such as AB1234. No request was made.")
        return user_id or None

    @property
    def account(self) -> str | None:
        """A name for the credentials that reveals nothing about them; None if they are incomplete."""
        try:
            return self._read_credentials().fingerprint()
        except LoginRefused:
            return None

    def account_of(self, user_id: str | None = None) -> str | None:  # noqa: ARG002  # there is only one account
        """Return `account`, because these credentials belong to one account."""
        return self.account

    def credentials_digest(self, user_id: str | None = None) -> str | None:  # noqa: ARG002
        """Return a text that changes whenever any of the credentials changes; None if they are incomplete.

        Keep it encrypted: the PIN could be guessed from it.
        """
        try:
            return self._read_credentials().digest()
        except LoginRefused:
            return None

    def check(self, user_id: str | None = None) -> None:
        """Check that a login could work, without any request.

        Raises:
            LoginRefused: credentials are missing or cannot be right, or they belong to another user.
        """
        self._check_user(user_id)
        self._read_credentials()
        checked_base_domain(self._base_domain)

    def owner_of(self, token: Secret) -> str | None:
        """Ask Upstox whose token this is; None if Upstox does not accept it. See `upstox_api.owner_of`."""
        return upstox_api.owner_of(token, self._base_domain or "", timeout=self._timeout)

    def log_out(self, token: Secret) -> bool:
        """End this token at Upstox; False if it was already dead. See `upstox_api.log_out`."""
        return upstox_api.log_out(token, self._base_domain or "", timeout=self._timeout)

    def _read_credentials(self) -> Credentials:
        return self._credentials or self.credentials_class.from_environment()

    def _check_user(self, user_id: str | None) -> None:
        declared = self.user_id
        if user_id and declared and user_id.upper() != declared.upper():
            raise LoginRefused(f"These credentials belong to {declared}, not {user_id}. Use Accounts for more users.")


class SdkLogin(SingleLogin):
    """Logs in through upstox-totp, with a new client for each login: a client is not safe to share or to reuse.

    Args:
        credentials: one account's credentials, as `Credentials` takes them. The default is the UPSTOX_* variables,
            read at each login.
        user_id: the user that these credentials log in; UPSTOX_USER_ID by default. With it, a store needs no login to
            find the token of a caller who names no user, and it refuses a wrong account before a login is spent.
        base_domain: Upstox's address with `{stage}` in it. The default is UPSTOX_BASE_DOMAIN, or otherwise the real
            Upstox. Plain http is accepted only on this machine.
        pause: seconds between the SDK's six requests; 1 by default, and 0 on this machine.
        timeout: seconds for each request.

    Example:
        >>> login = SdkLogin(user_id="AB1234")  # the other credentials come from UPSTOX_*
        >>> with SQLiteUpstoxStorage("upstox.db", login=login) as mine:
        ...     mine.get_or_create_token()["user_id"]
        'AB1234'
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
            credentials = wrap_credentials(credentials)  # From here on a traceback shows no value.
        super().__init__(credentials, user_id, base_domain, timeout)
        self._pause = pause

    def __call__(self, user_id: str | None = None, /) -> LoginAnswer:
        """Log in: six requests, about seven seconds at Upstox.

        Raises:
            LoginRefused, LoginLimited, LoginInterrupted: fix, wait, or try again. Once the last answer has arrived,
                the error carries its token.
        """
        self._check_user(user_id)
        credentials, base_domain = self._read_credentials(), checked_base_domain(self._base_domain)
        return _log_in(credentials, base_domain, self._pause, self._timeout, user_id or self.user_id)


class _Answered(BaseException):
    """Raised when the last answer has arrived and the SDK has nothing left to do.

    This is not an Exception, because a newer SDK may catch those and retry, which would kill the token.
    """


class _Watch:
    """Sees each request of one session before it is sent, and each reply before the SDK does.

    Attributes:
        requests: how many requests began.
        minting: whether the last request may make a token.
        reply: the last reply.
        in_doubt: whether a token may exist that nobody has.
        answer: the answer with the token, or an error that carries the token.
    """

    def __init__(self, wanted: str | None, redact: Callable[[str], str]) -> None:
        self.requests = 0
        self.minting = False
        self.reply: Reply | None = None
        self.in_doubt = False
        self.answer: LoginAnswer | LoginError | None = None
        self._wanted = wanted
        self._redact = redact

    def over(self, session: Session[Any]) -> None:
        """Watch this session from now on, and no other."""
        from curl_cffi import CurlOpt

        send = session.request

        def request(method: Any, url: str, *args: Any, **kwargs: Any) -> Any:
            path = urlsplit(url).path
            doubt_before = self.in_doubt
            if not doubt_before:
                raise_pending()
            self.requests, self.reply = self.requests + 1, None
            self.minting = self.in_doubt = not path.endswith(MAKE_NO_TOKEN)
            if self.minting:
                # If a kept connection turns out to be closed, curl would send the request a second time.
                session.curl_options[CurlOpt.FRESH_CONNECT] = 1
            try:
                response = send(method, url, *args, **kwargs)
                self.reply = Reply(response.status_code, response.content)
            except Exception as error:
                self.reply = lost_reply(error)
                raise
            finally:
                self._look_at_answer(path)
                self.in_doubt = self.in_doubt or doubt_before
            if self.answer:
                raise _Answered
            if path.endswith(DIALOG):
                self._look_at_dialog(response.url)
            return response

        session.request = request  # type: ignore[method-assign]

    def token(self) -> Secret | None:
        """The token that has arrived, if one has."""
        return (
            read_answer(self.answer).token
            if isinstance(self.answer, LoginAnswer)
            else getattr(self.answer, "token", None)
        )

    def _look_at_answer(self, path: str) -> None:
        if not self.minting or self.reply is None:
            return
        # In the answer of an unknown step, only a field named access_token counts: other text that looks like a token
        # may be one that the login uses internally.
        if path.endswith("/token") or (fields_of(self.reply.json()) or {}).get("access_token"):
            self.answer = answer_in(self.reply, redact=self._redact)
        if self.answer is None:
            self.in_doubt = explain(self.reply, mints=True).token_may_exist

    def _look_at_dialog(self, url: str) -> None:
        named = parse_qs(urlsplit(url).query).get("user_id", [""])[0].strip()
        if self._wanted and USER_ID.fullmatch(named) and named.upper() != self._wanted.upper():
            raise LoginRefused(
                f"The login was for {self._wanted}, but these credentials belong to {named}. It stopped before it "
                "requested a one-time password, so no token was made. Check whose credentials these are."
            )


def answer_in(
    reply: Reply, method: str = "upstox_totp_sdk", redact: Callable[[str], str] = without_tokens
) -> LoginAnswer | LoginError | None:
    """Return the answer in a reply, or an error that carries its token; None if the reply has no token."""
    body = reply.json()
    fields = fields_of(body)
    if fields and reply.status < 400:
        answer = LoginAnswer(fields, method)
        try:
            read_answer(answer)
        except LoginError as unusable:
            return unusable if unusable.token else None
        return answer
    token = find_token(body if fields else reply.content, cut=bool(reply.lost))
    if token is None:
        return None
    error = explain(reply, redact, mints=True)
    error.args = (f"{error} The answer holds a token anyway: error.token.reveal().",)
    error.token, error.user_id, error.token_may_exist = token, subject(token), True
    return error


def _log_in(
    credentials: Credentials, base_domain: str, pause: float | None, timeout: float, wanted: str | None
) -> LoginAnswer:
    from curl_cffi import CurlOpt
    from upstox_totp import UpstoxTOTP

    logging.getLogger("upstox-totp").addFilter(_no_debug)
    where, begin = urlsplit(base_domain.replace("{stage}", "service")).hostname or "Upstox", time.monotonic()
    watch = _Watch(wanted, credentials.redact)
    outcome: LoginAnswer | BaseException
    try:
        # Pass debug explicitly: with UPSTOX_DEBUG set, the SDK would log every secret.
        with UpstoxTOTP(**credentials.reveal_all(), debug=False) as client:  # type: ignore[arg-type]
            client.base_domain = base_domain or client.base_domain
            if pause is None:
                pause = 0.0 if is_this_machine(base_domain) else 1.0
            if is_this_machine(base_domain):
                client.session.curl_options[CurlOpt.NOPROXY] = "*"  # A proxy would look for Upstox on its own machine.
            client.config.sleep_time = pause * 1000  # type: ignore[assignment]  # The constructor ignores it.
            client.session.timeout = timeout
            watch.over(client.session)
            outcome = _read_returned(client.app_token.get_access_token(), watch, credentials)
    except Exception as error:
        outcome = watch.answer or _explain(error, watch, credentials)
    except _Answered as error:
        outcome = watch.answer or error
    except BaseException as error:
        # Ctrl-C came, or a greenlet was killed. It is raised again below, with any token that has arrived.
        outcome = error
        outcome.__dict__.update(token=watch.token(), token_may_exist=watch.in_doubt)
    # Raise after the except block, so that neither __cause__ nor __context__ leads to the SDK's frames and secrets.
    if isinstance(outcome, LoginAnswer):
        logger.info("%s gave a token after %.1f s", where, time.monotonic() - begin)
        return outcome
    outcome.__traceback__ = outcome.__context__ = outcome.__cause__ = None
    code = f" (code {outcome.code})" if isinstance(outcome, LoginError) and outcome.code else ""
    logger.info("%s gave no usable answer after %.1f s%s", where, time.monotonic() - begin, code)
    raise outcome


def _read_returned(response: object, watch: _Watch, credentials: Credentials) -> LoginAnswer | LoginError:
    """Handle a result of the SDK when the watch saw no token, because this SDK makes its requests in another way."""
    fields = fields_of(response)
    if fields:
        answer = LoginAnswer(fields)
        try:
            read_answer(answer)
        except LoginError as unusable:
            if unusable.token:
                return unusable
        else:
            return answer
    error = _explain(response, watch, credentials)
    error.token = find_token(response)
    error.token_may_exist = error.token_may_exist or bool(error.token)
    return error


def _explain(error: object, watch: _Watch, credentials: Credentials) -> LoginError:
    """Turn an exception or an odd result of the SDK into one of our errors, which says what to do."""
    from upstox_totp import ConfigurationError as SdkConfigurationError
    from upstox_totp import UpstoxError

    failure: LoginError
    if isinstance(error, LoginError):
        return error
    if isinstance(error, SdkConfigurationError):
        return LoginRefused("The SDK does not accept these credentials. Check them.")
    if watch.reply:
        failure = explain(watch.reply, credentials.redact, mints=watch.minting)
        failure.token_may_exist = failure.token_may_exist or watch.in_doubt
        return failure
    if isinstance(error, UpstoxError):
        code, message = code_and_message(error.details)
        failure = by_code(code, credentials.redact(message))
    else:
        failure = LoginInterrupted(
            f"The SDK failed with an unknown error ({type(error).__name__}). Try again. If that does not help, look "
            "for newer versions of this package and of upstox-totp, or pass a login of your own."
        )
    # If the watch saw no request, nobody knows which requests were made.
    failure.token_may_exist = watch.in_doubt or not watch.requests
    return failure


def _no_debug(record: logging.LogRecord) -> bool:
    """Drop the SDK's debug messages, which hold the PIN, the secrets and the token."""
    return record.levelno > logging.DEBUG
