"""Upstox's own login in one call, without the SDK."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from .answer import LoginAnswer
from .credentials import TotpCredentials, wrap_credentials
from .errors import LoginError
from .interrupts import raise_pending
from .refusals import explain
from .sdk_login import SingleLogin, answer_in
from .token import Secret
from .upstox_api import ask, checked_base_domain

logger = logging.getLogger(__name__)


class TotpLogin(SingleLogin):
    """Logs in with one request, without mobile number, password or client secret.

    None of this has been tried on the real service. This is what we know, and how sure we are:

    - The path, the header `x-api-key` and the JSON body: one program quotes Upstox's documentation (fairly sure). Two
      others send form fields or name the header differently, so a subclass can change `path` and `form`.
    - The answer is the same flat JSON as that of the other login (fairly sure).
    - It ends the user's active token (fairly sure), so it is a login like any other.
    - TOTP has to be switched on for the account (fairly sure).
    - Upstox allows at most 1 login a second, 10 a minute and 60 in half an hour (fairly sure).
    - A TOTP code works once in its 30 seconds (sure for the other login, likely here).

    Args:
        credentials: `client_id`, `pin_code` and `totp_secret`. The default is UPSTOX_CLIENT_ID, UPSTOX_PIN_CODE and
            UPSTOX_TOTP_SECRET, read at each login.
        user_id, base_domain, timeout: the same as for `SdkLogin`.

    Example:
        >>> with SQLiteUpstoxStorage("upstox.db", login=TotpLogin(user_id="AB1234")) as mine:
        ...     mine.get_or_create_token()["user_id"]
        'AB1234'
    """

    path = "/v2/totp-login/authorization/token"
    credentials_class = TotpCredentials

    def __init__(
        self,
        credentials: Mapping[str, str | Secret] | TotpCredentials | None = None,
        *,
        user_id: str | None = None,
        base_domain: str | None = None,
        timeout: float = 15.0,
    ) -> None:
        if isinstance(credentials, Mapping):
            credentials = wrap_credentials(credentials)  # From here on a traceback shows no value.
        super().__init__(credentials, user_id, base_domain, timeout)

    @staticmethod
    def form(client_id: Secret, pin_code: Secret, totp: Secret) -> tuple[dict[str, str | Secret], Secret]:
        """Return the headers and the body of the request."""
        headers: dict[str, str | Secret] = {"x-api-key": client_id, "Content-Type": "application/json"}
        return headers, Secret(json.dumps({"totp": totp.reveal(), "pin": pin_code.reveal()}))

    def __call__(self, user_id: str | None = None, /) -> LoginAnswer:
        """Log in: one request.

        Raises:
            LoginRefused, LoginLimited, LoginInterrupted: fix, wait, or try again. Once the answer has arrived, the
                error carries its token.
        """
        self._check_user(user_id)
        credentials, base_domain = self._read_credentials(), checked_base_domain(self._base_domain)
        totp = _totp(credentials["totp_secret"])
        headers, body = self.form(credentials["client_id"], credentials["pin_code"], totp)
        where, begin = urlsplit(base_domain.replace("{stage}", "api")).hostname or "Upstox", time.monotonic()
        raise_pending()
        # `ask` follows no redirect, because the secrets would travel along.
        headers = {"Accept": "application/json", **headers}
        reply = ask("POST", base_domain, self.path, headers=headers, body=body, timeout=self._timeout)
        outcome = answer_in(reply, "upstox_totp_login", credentials.redact)
        outcome = outcome or explain(reply, credentials.redact, mints=True)
        seconds = time.monotonic() - begin
        if isinstance(outcome, LoginError):
            code = f" (code {outcome.code})" if outcome.code else ""
            logger.info("%s gave no usable answer after %.1f s%s", where, seconds, code)
            outcome.__traceback__ = outcome.__context__ = None
            raise outcome
        logger.info("%s gave a token after %.1f s", where, seconds)
        return outcome


def _totp(secret: Secret) -> Secret:
    import pyotp

    return Secret(pyotp.TOTP(secret.reveal()).now())
