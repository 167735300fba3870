"""Upstox's address, and the few requests that do not go through the SDK.

Each request uses a new connection: if a kept connection turns out to be closed, curl silently sends the request again,
and a login that is sent twice kills its own first token.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from .checks import USER_ID
from .credentials import as_secret
from .environment import clean, has_control_characters, read_variable
from .errors import LoginInterrupted, LoginRefused
from .refusals import Reply, explain
from .token import Secret

logger = logging.getLogger(__name__)

REAL = "https://{stage}.upstox.com"
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
# curl's names for the failures that happen before a request is sent on a new connection.
NOT_SENT = (
    *("UNSUPPORTED_PROTOCOL", "URL_MALFORMAT", "COULDNT_RESOLVE_PROXY", "COULDNT_RESOLVE_HOST", "COULDNT_CONNECT"),
    *("SSL_CONNECT_ERROR", "PEER_FAILED_VERIFICATION", "SSL_CACERT_BADFILE", "INTERFACE_FAILED"),
)


def checked_base_domain(base_domain: str | None) -> str:
    """Return the argument, or otherwise UPSTOX_BASE_DOMAIN; "" means the real Upstox.

    Raises:
        LoginRefused: the address lacks {stage}, or is neither https nor on this machine.
    """
    name, base_domain = "base_domain", clean(base_domain or "")
    if not base_domain:
        name, base_domain = "UPSTOX_BASE_DOMAIN", read_variable("UPSTOX_BASE_DOMAIN", any_character=True)
    if not base_domain:
        return ""
    try:
        is_safe = urlsplit(base_domain).scheme == "https" or is_this_machine(base_domain)
        fits = "{stage}" in base_domain and bool(urlsplit(base_domain.format(stage="api")).port != 0)
        fits = fits and "@" not in base_domain and not has_control_characters(base_domain)
    except (ValueError, LookupError, AttributeError):
        is_safe, fits = True, False
    if not is_safe:
        raise LoginRefused(f"{name} must be https, because the PIN and the secrets are sent there.")
    if not fits:
        raise LoginRefused(
            f"{name} must be a URL with {{stage}} in it (it becomes 'api' or 'service') and no other braces."
        )
    return base_domain


def is_this_machine(base_domain: str) -> bool:
    return urlsplit(base_domain).hostname in THIS_MACHINE


def ask(
    method: str,
    base_domain: str,
    path: str,
    *,
    headers: Mapping[str, str | Secret],
    body: Secret | None = None,
    timeout: float = 15.0,
) -> Reply:
    """Send one request to the API and return the reply. A failure is a reply too, with `lost` set.

    This follows no redirect, because the headers and the body hold secrets.
    """
    from curl_cffi import CurlOpt, Session

    url = (base_domain or REAL).format(stage="api") + path
    # A proxy would look for Upstox on its own machine.
    options: dict[CurlOpt, Any] = {CurlOpt.NOPROXY: "*"} if is_this_machine(base_domain) else {}
    stopped: BaseException
    try:
        with Session[Any](curl_options=options) as session:
            response = session.request(
                method,
                url,
                headers={name: as_secret(value).reveal() for name, value in headers.items()},
                data=body.reveal() if body else None,
                allow_redirects=False,
                timeout=timeout,
            )
            return Reply(response.status_code, response.content)
    except Exception as error:
        return lost_reply(error)
    except BaseException as error:
        stopped = error
    # Ctrl-C came. Raise it here, so that it does not lead to curl_cffi's frames, which hold the plain secrets.
    stopped.__traceback__ = stopped.__context__ = stopped.__cause__ = None
    raise stopped


def lost_reply(error: Exception) -> Reply:
    """Turn an error of curl_cffi into a reply, with the part of the body that arrived before it."""
    from curl_cffi import CurlECode
    from curl_cffi.requests.exceptions import RequestException

    if not isinstance(error, RequestException):
        return Reply(lost=type(error).__name__)
    response = error.response
    return Reply(
        getattr(response, "status_code", 0),
        getattr(response, "content", None) or b"",
        lost=type(error).__name__,
        # `code` is a plain number, whatever curl_cffi's annotation says.
        sent=error.code not in [getattr(CurlECode, name, None) for name in NOT_SENT],
    )


def owner_of(token: Secret, base_domain: str = "", *, timeout: float = 15.0) -> str | None:
    """Ask Upstox whose access token this is.

    Returns:
        the user id, or None if Upstox does not accept the token because it is dead.

    Raises:
        LoginInterrupted: Upstox could not be reached, or gave an unexpected answer.
    """
    reply = _ask_with(token, "GET", "/v2/user/profile", base_domain, timeout)
    if reply is None or reply.status == 401:
        return None
    body = reply.json() if reply.status == 200 and not reply.lost else None
    data = body.get("data") if isinstance(body, Mapping) else None
    named = data.get("user_id") if isinstance(data, Mapping) else None
    if isinstance(named, str) and USER_ID.fullmatch(named):
        return named
    raise _interruption("whose token this is", reply)


def log_out(token: Secret, base_domain: str = "", *, timeout: float = 15.0) -> bool:
    """End an access token at Upstox.

    Returns:
        False if Upstox does not accept the token because it was already dead.

    Raises:
        LoginInterrupted: Upstox could not be reached, or gave an unexpected answer. The token may still work.
    """
    reply = _ask_with(token, "DELETE", "/v2/logout", base_domain, timeout)
    if reply is None or reply.status == 401:
        return False
    body = reply.json() if reply.status == 200 and not reply.lost else None
    if isinstance(body, Mapping) and body.get("status") == "success":
        return True
    raise _interruption("whether the token has ended", reply)


def _ask_with(token: Secret, method: str, path: str, base_domain: str, timeout: float) -> Reply | None:
    """Send a request with this token. Return None if it does not fit into a header: Upstox issues no such token."""
    token, base_domain = as_secret(token), checked_base_domain(base_domain)
    if not re.fullmatch(r"[!-~]+", token.reveal()):
        return None
    headers: dict[str, str | Secret] = {"Accept": "application/json"}
    headers |= {"Authorization": Secret(f"Bearer {token.reveal()}")}
    reply = ask(method, base_domain, path, headers=headers, timeout=timeout)
    logger.info("%s %s: %s", method, path, reply.lost or reply.status)
    return reply


def _interruption(what: str, reply: Reply) -> LoginInterrupted:
    said = explain(reply)
    error = LoginInterrupted(f"Upstox did not say {what}. {said}", said.code)
    error.token_may_exist = False
    return error
