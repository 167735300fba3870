"""Turn Upstox's refusals of a login into errors that say what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .answer import without_tokens
from .errors import LoginError, LoginInterrupted, LoginLimited, LoginRefused

# Upstox's codes. The API's codes are documented; the login service's were seen in real answers.
FIX_CODES = {
    "UDAPI100016": "the client id or secret is wrong",
    "UDAPI100068": "the client id or the redirect URI does not match the app",
    "UDAPI100069": "the client id or secret is wrong",
    "UDAPI100073": "the app is inactive",
    "1017106": "the PIN is wrong; five wrong ones lock the account",
    "1017108": "the account is locked",
}
# Seconds to wait, and whether only this account must wait: a one-time password goes to one mobile number.
WAIT_CODES = {
    "UDAPI10005": ("too many requests", 60.0, False),
    "1017069": ("Upstox blocked this account's one-time passwords", 600.0, True),
}
AGAIN_CODES = {
    "UDAPI100057": "the authorization code was already used",
    "1017076": "the one-time password was already used; a new one comes every 30 seconds",
    "UDAPI100500": "Upstox had an internal error",
}
# This limit came under UDAPI100500, which is otherwise a temporary fault. So the text decides and not the code.
OTP_LIMIT = "exceeded the maximum number of times you can generate an otp"
OTP_LIMIT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Reply:
    """The response to one request.

    Attributes:
        status: the HTTP status; 0 if none came.
        content: the body, or the part of it that arrived. It may hold a token, so it is never shown.
        lost: the name of the error that cut the response off; None if it is complete.
        sent: False if the request certainly did not leave this machine.
    """

    status: int = 0
    content: bytes = field(default=b"", repr=False)
    lost: str | None = None
    sent: bool = True

    def json(self) -> object:
        """Parse the body as JSON, whatever its content type; None if it is not JSON."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            return None


def explain(reply: Reply, redact: Callable[[str], str] = without_tokens, *, mints: bool = False) -> LoginError:
    """Turn a reply without a usable answer into an error.

    Args:
        redact: removes secrets from Upstox's text.
        mints: this request makes the token, so only a definite refusal means that no token was made.
    """
    if reply.lost:
        error: LoginError = LoginInterrupted(f"Upstox could not be reached, or broke off ({reply.lost}). Try again.")
        error.token_may_exist = mints and reply.sent
        return error
    code, message = code_and_message(reply.json())
    error = by_code(code, redact(message), reply.status) if code or message else _by_status(reply.status)
    limited = isinstance(error, LoginLimited)
    # UDAPI100500 is a fault and not a refusal: nobody knows how far the request got.
    refused = bool(code) and code != "UDAPI100500" and reply.status < 500
    error.token_may_exist = mints and not limited and not refused
    return error


def by_code(code: str | None, message: str, status: int = 0) -> LoginError:
    """Turn Upstox's code and text into an error. The caller has already removed secrets from `message`."""
    said = f"{' '.join(message.split())[:200] or 'nothing'} ({code or 'no code'})"
    if OTP_LIMIT in " ".join(message.lower().split()):
        wait = f"Wait {OTP_LIMIT_SECONDS:.0f} s: too many one-time passwords were made for this account."
        return LoginLimited(f"{wait} Upstox said: {said}", code, OTP_LIMIT_SECONDS, account_only=True)
    if code in FIX_CODES:
        return LoginRefused(f"Fix the credentials: {FIX_CODES[code]}. Upstox said: {said}", code)
    if code in WAIT_CODES:
        reason, seconds, account_only = WAIT_CODES[code]
        return LoginLimited(f"Wait {seconds:.0f} s: {reason}. Upstox said: {said}", code, seconds, account_only)
    if code in AGAIN_CODES:
        return LoginInterrupted(f"Log in again: {AGAIN_CODES[code]}. Upstox said: {said}", code)
    if status == 429:
        return LoginLimited(f"Wait 60 s: too many requests. Upstox said: {said}", code or "429")
    if status >= 500:
        return LoginInterrupted(f"Log in again: Upstox had an internal error. It said: {said}", code)
    return LoginRefused(f"Upstox refused the login. It said: {said}", code)


def code_and_message(body: object) -> tuple[str | None, str]:
    """Read the code and the message from either form of Upstox's error answer; None and "" from anything else."""
    if not isinstance(body, Mapping):
        return None, ""
    data = body.get("data")
    listed = body.get("errors") or (data.get("errors") if isinstance(data, Mapping) else None)
    first = listed[0] if isinstance(listed, list) and listed else body.get("error")
    if not isinstance(first, Mapping):
        return None, ""
    code = str(first.get("errorCode") or first.get("error_code") or first.get("code") or "")
    # The code comes from outside, and we show and store it, so check that it looks like a code.
    return code if re.fullmatch(r"[A-Za-z0-9_-]{1,20}", code) else None, str(first.get("message") or "")


def _by_status(status: int) -> LoginError:
    if status == 429:
        return LoginLimited("Wait 60 s: too many requests.", "429")
    return LoginInterrupted(
        f"Upstox's answer has an unknown format (HTTP status {status or 'unknown'}). Try again. If that does not "
        "help, look for newer versions of this package and of upstox-totp, or pass a login of your own."
    )
