"""Logins at the local Upstox, with the bare SDK or one request at a time."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import pyotp
import pytest
from upstox_totp import AccessTokenResponse, UpstoxError, UpstoxTOTP
from upstox_totp.models import AccessTokenData

from upstox_db_examples.local.upstox import INNER_REDIRECT_URI, Account, LocalUpstox

OTP = "/service/login/open/v6/auth/1fa/otp/generate"
TOTP = "/service/login/open/v4/auth/1fa/otp-totp/verify"
PIN = "/service/login/open/v3/auth/2fa"
APPROVAL = "/service/login/v2/oauth/authorize"
ONE_CALL = "/api/v2/totp-login/authorization/token"


def answer_to_login(upstox: LocalUpstox, account: Account, timeout: float = 10, /, **changed: str) -> Any:
    """Return whatever the SDK returns for these credentials, with any changes to them."""
    with UpstoxTOTP(**(account.credentials() | changed)) as client:  # type: ignore[arg-type]
        client.base_domain = upstox.base_domain
        client.config.sleep_time = 0
        client.session.timeout = timeout
        return client.app_token.get_access_token()


def for_the_sdk(upstox: LocalUpstox) -> LocalUpstox:
    """Make this server send complete token answers, because the bare SDK cannot read those of real accounts."""
    upstox.shape_answers()
    return upstox


def log_in(upstox: LocalUpstox, account: Account, **changed: str) -> AccessTokenData:
    answer = answer_to_login(upstox, account, **changed)
    assert isinstance(answer, AccessTokenResponse)
    assert answer.data is not None
    return answer.data


def refusal(upstox: LocalUpstox, account: Account, **changed: str) -> str:
    """Return the code with which a login is refused."""
    with pytest.raises(UpstoxError) as caught:
        answer_to_login(upstox, account, **changed)
    return code_in(caught.value.details or {})


def code_in(body: dict[str, Any]) -> str:
    body = body if "errors" in body or "error" in body else body["data"]
    if body.get("error"):
        return str(body["error"]["code"])
    return str(body["errors"][0]["errorCode"] if "errors" in body else body["data"]["errors"][0]["errorCode"])


def ask(
    upstox: LocalUpstox,
    method: str,
    path: str,
    *,
    data: dict[str, Any] | None = None,
    form: dict[str, str] | None = None,
    whole: object = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any], Any]:
    """Send one request without the SDK, and return status, JSON and headers. `whole` is JSON without a `data` key."""
    whole = {"data": data} if data is not None else whole
    body = json.dumps(whole).encode() if whole is not None else None
    if form is not None:
        body = urllib.parse.urlencode(form).encode()
    kind = "application/json" if form is None else "application/x-www-form-urlencoded"
    url = upstox.base_domain.replace("/{stage}", "") + path
    request = urllib.request.Request(url, body, {"Content-Type": kind, **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def profile(upstox: LocalUpstox, token: str) -> tuple[int, dict[str, Any]]:
    return ask(upstox, "GET", "/api/v2/user/profile", headers={"Authorization": f"Bearer {token}"})[:2]


def claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return decoded


class ByHand:
    """A login that a test makes one request at a time, so that the test can leave a step out."""

    def __init__(self, upstox: LocalUpstox, account: Account) -> None:
        self.upstox, self.account = upstox, account
        self.where = {"redirect_uri": INNER_REDIRECT_URI}
        self.cookie = ""

    def dialog(self) -> None:
        query = urllib.parse.urlencode({"client_id": self.account.client_id, "redirect_uri": self.account.redirect_uri})
        url = f"{self.upstox.base_domain.format(stage='api')}/v2/login/authorization/dialog?{query}"
        with urllib.request.urlopen(url, timeout=10) as response:
            address = urllib.parse.parse_qs(urllib.parse.urlsplit(response.url).query)
        self.where["client_id"] = address["client_id"][0]

    def otp_token(self) -> str:
        data = {"mobileNumber": self.account.mobile, "userId": self.account.user_id}
        return str(ask(self.upstox, "POST", OTP, data=data)[1]["data"]["validateOTPToken"])

    def verify(self, otp_token: str, code: str | None = None) -> dict[str, Any]:
        code = code or pyotp.TOTP(self.account.totp_secret).now()
        _, body, headers = ask(self.upstox, "POST", TOTP, data={"otp": code, "validateOtpToken": otp_token})
        self.cookie = (headers["Set-Cookie"] or "").partition(";")[0]
        return body

    def to_session(self) -> ByHand:
        self.dialog()
        assert self.verify(self.otp_token())["success"]
        return self

    def in_session(self, path: str, **data: object) -> dict[str, Any]:
        address = f"{path}?{urllib.parse.urlencode(self.where)}"
        return ask(self.upstox, "POST", address, data=data, headers={"Cookie": self.cookie})[1]

    def pin(self, pin: str | None = None) -> dict[str, Any]:
        return self.in_session(PIN, inputText=base64.b64encode((pin or self.account.pin).encode()).decode())

    def approve(self) -> dict[str, Any]:
        return self.in_session(APPROVAL, userOAuthApproval=True)

    def code(self) -> str:
        self.to_session().pin()
        return str(self.approve()["data"]["redirectUri"].partition("code=")[2])

    def token(self, code: str, **changed: str) -> tuple[int, dict[str, Any]]:
        account = self.account
        form = {
            "code": code,
            "client_id": account.client_id,
            "client_secret": account.client_secret,
            "redirect_uri": account.redirect_uri,
            "grant_type": "authorization_code",
        }
        return ask(self.upstox, "POST", "/api/v2/login/authorization/token", form=form | changed)[:2]


def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("It did not happen within 5 s.")


def leave_a_second_of_this_totp() -> None:
    """Wait for the next TOTP if this one is about to end, so that both sides use the same one."""
    if 30 - time.time() % 30 < 1:
        time.sleep(1)
