"""What the local Upstox does for each request. `upstox.py` describes the steps and their codes."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import time
from base64 import b64encode, urlsafe_b64encode
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlencode

import pyotp

from .accounts import Account, User
from .answers import PAGE, Failure, Shape, no, token_answer, yes
from .web import Answer, Shown

# The rule of 03:30 is repeated here and not imported from token.py, because this server is there to test token.py.
INDIA = timezone(timedelta(hours=5, minutes=30))
PINS_BEFORE_LOCK = 5
WRONG_REDIRECT = ("UDAPI100068", "Check your 'client_id' and 'redirect_uri'; one or both are incorrect.")
INACTIVE = ("UDAPI100073", "Your 'client_id' is inactive.")
INNER_REDIRECT_URI = "https://api-v2.upstox.com/login/authorization/redirect"  # what the SDK sends in steps 4 and 5


class Service:
    """Users, sessions and tokens. It has no lock: the caller holds one around everything here."""

    def __init__(self, now: Callable[[], datetime], totp_once: bool) -> None:
        self.users: dict[str, User] = {}
        self.logins: Counter[str] = Counter()
        self.orders: Counter[str] = Counter()
        self.shape = Shape()
        self._now = now
        self._totp_once = totp_once
        self._signing_key = secrets.token_bytes(32)
        self._handed_out: dict[tuple[str, str], User] = {}  # (what, random value) -> the user who got it

    def answer(self, route: str, shown: Shown) -> Answer:
        """Do what the request asks, or refuse it."""
        try:
            return ROUTES[route][1](self, shown) if route in ROUTES else no("UDAPI10000", "No such request.", 404)
        except Answer as refusal:
            return refusal

    def owner(self, token: str) -> User | None:
        """Find the user of this living access token."""
        return next((u for u in self.users.values() if u.token == token and self._now() < u.expires), None)

    def client(self, client_id: str) -> User | None:
        """Find the user of this app."""
        return next((user for user in self.users.values() if user.account.client_id == client_id), None)

    def mint(self, user: User, *, dead: bool = False) -> str:
        """Make an access token. The user's earlier one dies."""
        now = self._now()
        user.expires = now - timedelta(seconds=1) if dead else _next_0330(now)
        user.token = self._jwt(user.account, now, user.expires)
        self.logins[user.account.user_id] += 1
        return user.token

    def token_body(self, user: User, *, dead: bool = False) -> dict[str, Any]:
        """Make an access token and an extended one, and return the documented answer with them."""
        now = self._now()
        extended_token = self._jwt(user.account, now, now + timedelta(days=365))
        user.extended_tokens.add(extended_token)
        tokens = {"access_token": self.mint(user, dead=dead), "extended_token": extended_token}
        return user.account.profile() | tokens

    def _dialog(self, shown: Shown) -> Answer:
        user = self.client(shown["client_id"])
        if user is None or shown["redirect_uri"] != user.account.redirect_uri:
            raise no(*WRONG_REDIRECT)
        if not user.account.client_active:
            raise no(*INACTIVE)
        address = {"user_id": user.account.user_id, "client_id": self._hand_out("login client", user)}
        return Answer("", 302, Location=f"/login?{urlencode(address)}&user_type=individual")

    def _generate_otp(self, shown: Shown) -> Answer:
        user = self.users.get(shown["userId"])
        if user is None or shown["mobileNumber"] != user.account.mobile:
            raise no(1017001, "This mobile number is not registered.")
        otp_token = self._hand_out("OTP token", user)
        what_next = {"nextRequestInterval": 30, "isTotpEnabled": True}
        return yes(message="OTP sent.", validateOTPToken=otp_token, userType="individual", **what_next)

    def _verify_totp(self, shown: Shown) -> Answer:
        user = self._handed_out.pop(("OTP token", shown["validateOtpToken"]), None)
        if user is None:
            raise no(1017076, "This OTP session was already used.")
        if refused := self._take_totp(user, shown["otp"]):
            raise no(*refused)
        account = user.account
        profile = {"profileId": 1, "userId": account.user_id, "firstName": account.user_name, "lastName": ""}
        answer = yes(message="OTP verified.", userType="individual", isSecretPinSet=True, userProfile=profile)
        answer.headers["Set-Cookie"] = f"session={self._hand_out('session', user)}; Path=/; HttpOnly"
        return answer

    def _verify_pin(self, shown: Shown) -> Answer:
        user = self._session("session", shown)
        if refused := _take_pin(user, shown["inputText"] == b64encode(user.account.pin.encode()).decode()):
            raise no(*refused)
        self._handed_out["session with PIN", shown["session"]] = user
        flags = ("isPlusPlanFastWebsocketEnabled", "isNewRefreshTokenCreated", "isExternalClientOAuthApp")
        return yes(userType="individual", customerStatus="ACTIVE", refreshTokenExpiry=0, **dict.fromkeys(flags, False))

    def _authorize(self, shown: Shown) -> Answer:
        user = self._session("session with PIN", shown)
        if shown["userOAuthApproval"] is not True:
            raise no("UDAPI100036", "The user did not approve.")
        for used_up in ("session", "session with PIN"):
            del self._handed_out[used_up, shown["session"]]
        del self._handed_out["login client", shown["client_id"]]
        code = self._hand_out("code", user)
        return yes(redirectUri=f"{user.account.redirect_uri}?code={code}", isApproved=True)

    def _token(self, shown: Shown) -> Answer:
        owner = self._handed_out.pop(("code", shown["code"]), None)  # A code works once, even if this request fails.
        user = self.client(shown["client_id"])
        if user is None or shown["client_secret"] != user.account.client_secret:
            raise no("UDAPI100069", "Check your 'client_id' and 'client_secret'; one or both are incorrect.")
        if shown["redirect_uri"] != user.account.redirect_uri:
            raise no(*WRONG_REDIRECT)
        if shown["grant_type"] != "authorization_code":
            raise no("UDAPI100036", "The grant_type is not authorization_code.")
        if owner is not user:
            raise no("UDAPI100057", "This code is invalid or was already used.")
        return self._log_in(user, shown)

    def _one_call(self, shown: Shown) -> Answer:
        totp, pin = (shown["body"].get(name) for name in ("totp", "pin"))
        for name, value in (("totp", totp), ("pin", pin)):
            if not isinstance(value, str) or not re.fullmatch("[0-9]{6}", value):
                raise no("UDAPI100036", f"The {name} must be six digits, in a JSON body.", 400)
        user = self.client(shown["x-api-key"])
        if user is None:
            raise no("UDAPI100016", "Invalid Credentials: the x-api-key is not a client id.")
        if not user.account.client_active:
            raise no(*INACTIVE)
        if not user.account.totp_login:
            raise no("UDAPI100016", "Invalid Credentials: TOTP is not enabled for this account.")
        if refused := self._take_totp(user, totp) or _take_pin(user, pin == user.account.pin):
            code, message = refused
            raise no(str(code), message)  # The code is the login service's, the form is the API's.
        return self._log_in(user, shown)

    def _log_in(self, user: User, shown: Shown) -> Answer:
        failure = shown["failure"]
        body = self.token_body(user, dead=failure is Failure.DEAD_TOKEN)
        return token_answer(self.shape.of(body), failure)

    def _page(self, _: Shown) -> Answer:
        return PAGE

    def _show_profile(self, shown: Shown) -> Answer:
        return Answer({"status": "success", "data": self._bearer(shown).account.profile()})

    def _place_order(self, shown: Shown) -> Answer:
        user_id = self._bearer(shown).account.user_id
        self.orders[user_id] += 1
        return Answer({"status": "success", "data": {"order_ids": [f"{user_id}-{self.orders[user_id]}"]}})

    def _logout(self, shown: Shown) -> Answer:
        self._bearer(shown).token = None
        return Answer({"status": "success", "data": True})

    def _hand_out(self, what: str, user: User) -> str:
        value = secrets.token_urlsafe(16)
        self._handed_out[what, value] = user
        return value

    def _session(self, what: str, shown: Shown) -> User:
        user = self._handed_out.get((what, shown["session"]))
        if user is None or self._handed_out.get(("login client", shown["client_id"])) is not user:
            raise no(1017076, "There is no such session.")
        if shown["redirect_uri"] != INNER_REDIRECT_URI:
            raise no(*WRONG_REDIRECT)
        return user

    def _bearer(self, shown: Shown) -> User:
        if any(shown["bearer"] in user.extended_tokens for user in self.users.values()):
            raise no("UDAPI100067", "API not permitted with extended_token")
        user = self.owner(shown["bearer"])
        if user is None:
            raise no("UDAPI100050", "Invalid token used to access API")
        return user

    def _take_totp(self, user: User, code: str) -> tuple[int, str] | None:
        """Use up this code, or return why not: code and message."""
        totp, now = pyotp.TOTP(user.account.totp_secret), int(time.time()) // 30
        step = next((step for step in (now, now - 1, now + 1) if totp.generate_otp(step) == code), None)
        if step is None:
            return 1017070, "This TOTP is wrong."
        if self._totp_once and step in user.used_totps:
            return 1017076, "This TOTP was already used."
        user.used_totps.add(step)
        return None

    def _jwt(self, account: Account, now: datetime, expires: datetime) -> str:
        header = {"typ": "JWT", "key_id": "sk_v1.0", "alg": "HS256"}
        claims = {"sub": account.user_id, "jti": secrets.token_hex(12), "isMultiClient": False, "isPlusPlan": False}
        claims |= {"iat": int(now.timestamp()), "iss": "udapi-gateway-service", "exp": int(expires.timestamp())}
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{_base64url(hmac.digest(self._signing_key, signed.encode(), 'sha256'))}"


# The step's number (0 if the request is not part of a login), and the method that handles it.
ROUTES: dict[str, tuple[int, Callable[[Service, Shown], Answer]]] = {
    "GET /api/v2/login/authorization/dialog": (1, Service._dialog),
    "POST /service/login/open/v6/auth/1fa/otp/generate": (2, Service._generate_otp),
    "POST /service/login/open/v4/auth/1fa/otp-totp/verify": (3, Service._verify_totp),
    "POST /service/login/open/v3/auth/2fa": (4, Service._verify_pin),
    "POST /service/login/v2/oauth/authorize": (5, Service._authorize),
    "POST /api/v2/login/authorization/token": (6, Service._token),
    "POST /api/v2/totp-login/authorization/token": (7, Service._one_call),
    "GET /login": (0, Service._page),
    "GET /api/v2/user/profile": (0, Service._show_profile),
    "POST /api/v3/order/place": (0, Service._place_order),
    "DELETE /api/v2/logout": (0, Service._logout),
}


def step_of(route: str) -> int:
    """Return the login step of this route, or 0."""
    return ROUTES[route][0] if route in ROUTES else 0


def _take_pin(user: User, right: bool) -> tuple[int, str] | None:
    """Count a wrong PIN and return what is wrong: code and message."""
    if user.wrong_pins < PINS_BEFORE_LOCK:
        user.wrong_pins = 0 if right else user.wrong_pins + 1
    if user.wrong_pins == PINS_BEFORE_LOCK:
        return 1017108, "This account is locked."
    return None if right else (1017106, f"This PIN is wrong. {PINS_BEFORE_LOCK - user.wrong_pins} attempts left.")


def _next_0330(now: datetime) -> datetime:
    death = now.astimezone(INDIA).replace(hour=3, minute=30, second=0, microsecond=0)
    return death if death > now else death + timedelta(days=1)


def _base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
