"""A local Upstox that the real SDK logs in to: no account, no network, and every check that a login has to pass.

A login is six requests. Each gets something that a later one has to show:

1. `GET  /api/v2/login/authorization/dialog`: an app shows its client id and redirect URI. It is sent on to a page
   whose address says who the user is, and names a second client id that only this login uses.
2. `POST /service/login/open/v6/auth/1fa/otp/generate`: the mobile number and the user. Gets an OTP token.
3. `POST /service/login/open/v4/auth/1fa/otp-totp/verify`: the OTP token and a TOTP. Gets a session, in a cookie.
4. `POST /service/login/open/v3/auth/2fa`: the session and the PIN in base64. Five wrong PINs lock the account.
5. `POST /service/login/v2/oauth/authorize`: the session and the user's approval. Gets a code that serves once.
6. `POST /api/v2/login/authorization/token`: the code and the client secret. Gets the access token, and the user's
   earlier one dies.

Beside them, `GET /api/v2/user/profile` tells whether a token lives, and `DELETE /api/v2/logout` ends it. How often one
logs in is not limited: `fail()` says when it is. The error codes are Upstox's, except for 1017001 (mobile number),
1017070 (wrong TOTP) and 1017108 (locked), whose true numbers are not published.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import string
import time
import uuid
from base64 import b64encode, urlsafe_b64encode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from threading import Event, Lock
from typing import Any, Self
from urllib.parse import urlencode

import pyotp

from .web import HANG_UP, Answer, Shown, WebServer

# The rule of 03:30 is written out here once more and not taken from token.py, which this server is there to test.
INDIA = timezone(timedelta(hours=5, minutes=30))
PINS_BEFORE_LOCK = 5
WRONG_REDIRECT = ("UDAPI100068", "Check your 'client_id' and 'redirect_uri'; one or both are incorrect.")
INNER_REDIRECT_URI = "https://api-v2.upstox.com/login/authorization/redirect"  # what the SDK shows in 4 and 5


class Failure(StrEnum):
    """What `LocalUpstox.fail` makes go wrong. Where nothing else is said, the request does nothing."""

    RATE_LIMIT = "rate_limit"  # 429 and UDAPI10005
    SERVER_ERROR = "server_error"  # 500 and UDAPI100500
    HTML = "html"  # 200 and a page instead of JSON
    DROP = "drop"  # the connection ends before the answer does
    STALL = "stall"  # the work is done at once, the answer comes `stall_seconds` later
    OTP_BLOCKED = "otp_blocked"  # step 2: 1017069
    # These make a token all the same: the login counts, and the user's earlier token is dead.
    MISSING_FIELD = "missing_field"  # step 6: the answer lacks `is_active`
    OTHER_USER = "other_user"  # step 6: the answer names the user ZZ9999
    DEAD_TOKEN = "dead_token"  # noqa: S105  # step 6: the token has expired already


STEP_OF = {Failure.OTP_BLOCKED: 2, Failure.MISSING_FIELD: 6, Failure.OTHER_USER: 6, Failure.DEAD_TOKEN: 6}


@dataclass(frozen=True)
class Account:
    """A made-up account. What identifies or opens it stays out of its repr."""

    user_id: str
    user_name: str
    redirect_uri: str
    mobile: str = field(repr=False)
    pin: str = field(repr=False)
    totp_secret: str = field(repr=False)
    client_id: str = field(repr=False)
    client_secret: str = field(repr=False)
    email: str = field(repr=False)
    client_active: bool = True

    def credentials(self) -> dict[str, str]:
        """What `UpstoxTOTP(**...)` takes."""
        return {
            "username": self.mobile,
            "password": self.pin,
            "pin_code": self.pin,
            "totp_secret": self.totp_secret,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "redirect_uri": self.redirect_uri,
        }

    def environ(self) -> dict[str, str]:
        """The same as the UPSTOX_* variables that the SDK reads."""
        return {f"UPSTOX_{name.upper()}": value for name, value in self.credentials().items()}


@dataclass
class _User:
    account: Account
    wrong_pins: int = 0
    used_totps: set[int] = field(default_factory=set)  # the 30-second steps whose code has served
    token: str | None = field(default=None, repr=False)
    expires: datetime = datetime.min  # noqa: DTZ901  # read only where there is a token


def _no(code: str | int, message: str, status: int = 401) -> Answer:
    if isinstance(code, int):  # The login service's form, and its status is 200.
        return Answer({"success": False, "error": {"code": code, "message": message}})
    error = {"errorCode": code, "error_code": code, "message": message, "propertyPath": None, "invalidValue": None}
    return Answer({"status": "error", "errors": [error]}, status)


def _yes(**data: object) -> Answer:
    return Answer({"success": True, "data": data})


PAGE = Answer("<!doctype html><title>Upstox</title>")
# What these failures answer in place of the step.
INSTEAD: dict[Failure | None, Answer] = {
    Failure.RATE_LIMIT: _no("UDAPI10005", "Too many requests.", 429),
    Failure.SERVER_ERROR: _no("UDAPI100500", "Something went wrong.", 500),
    Failure.OTP_BLOCKED: _no(1017069, "OTPs are blocked for 10 minutes."),
    Failure.HTML: PAGE,
    Failure.DROP: HANG_UP,
}


class LocalUpstox:
    """A local Upstox on 127.0.0.1 and a free port, safe to share between threads.

    Args:
        clock: the time that tokens are made and die by. TOTPs go by the real time, because the SDK's do.
        totp_once: whether a TOTP serves only once, as at Upstox. With False one can log in twice in 30 seconds.

    Attributes:
        base_domain: what to set as the SDK client's `base_domain`; known once the server has started.
        login_seconds: how long step 6 takes to answer. The token is made at once, whoever still waits for it.
        stall_seconds: how long a `Failure.STALL` takes to answer.
    """

    def __init__(self, *, clock: Callable[[], datetime] | None = None, totp_once: bool = True) -> None:
        self.base_domain = ""
        self.login_seconds: float = 0
        self.stall_seconds: float = 30
        self._clock = clock or (lambda: datetime.now(UTC))
        self._totp_once = totp_once
        self._signing_key = secrets.token_bytes(32)
        self._server: WebServer | None = None
        self._closing = Event()
        self._lock = Lock()  # around all that follows
        self._users: dict[str, _User] = {}
        self._handed_out: dict[tuple[str, str], _User] = {}  # what and its random value -> to whom
        self._failures: list[tuple[Failure, list[int]]] = []  # what, and at which steps
        self._attempts: Counter[str] = Counter()
        self._logins: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Listen."""
        if self._server is None:
            self._closing.clear()
            self._server = WebServer(self._answer)
            self.base_domain = f"http://127.0.0.1:{self._server.server_address[1]}/{{stage}}"
        return self

    def close(self) -> None:
        """Hang up on everyone. No thread and no socket stays; accounts and counts do."""
        server, self._server = self._server, None
        if server:
            self._closing.set()
            server.close()

    def add_account(self, user_id: str, **overrides: Any) -> Account:
        """Make up an account, always the same for the same user id; `overrides` are fields of `Account`."""

        def made_up(what: str, alphabet: str, length: int) -> str:
            digest = hashlib.sha256(f"{user_id} {what}".encode()).digest()
            return "".join(alphabet[byte % len(alphabet)] for byte in digest[:length])

        made: dict[str, Any] = {
            "user_name": f"User {user_id}",
            "redirect_uri": "https://127.0.0.1/callback",
            "mobile": "5" + made_up("mobile", string.digits, 9),  # No mobile number in India begins with 5.
            "pin": made_up("pin", string.digits, 6),
            "totp_secret": made_up("totp_secret", string.ascii_uppercase + "234567", 32),
            "client_id": str(uuid.uuid5(uuid.NAMESPACE_OID, user_id)),
            "client_secret": made_up("client_secret", string.ascii_lowercase + string.digits, 10),
            "email": f"{user_id.lower()}@example.com",
        }
        account = Account(user_id, **made | overrides)
        with self._lock:
            self._users[user_id] = _User(account)
        return account

    def unlock(self, user_id: str) -> None:
        """Forget the wrong PINs."""
        with self._lock:
            self._users[user_id].wrong_pins = 0

    def logins(self, user_id: str | None = None) -> int:
        """How many tokens were made, for one user or for all."""
        with self._lock:
            return self._logins[user_id] if user_id else self._logins.total()

    def attempts(self, user_id: str | None = None) -> int:
        """How many OTPs were asked for in step 2, for one user or for all, whatever came of it."""
        with self._lock:
            return self._attempts[user_id] if user_id else self._attempts.total()

    def is_living(self, token: str) -> bool:
        """Whether Upstox would still take this access token."""
        with self._lock:
            return self._owner(token) is not None

    def fail(self, kind: Failure | str, times: int = 1, step: int | None = None) -> None:
        """Let the next `times` requests of a login fail, or the next ones of that step."""
        kind = Failure(kind)
        possible = [STEP_OF[kind]] if kind in STEP_OF else [1, 2, 3, 4, 5, 6]
        if step is not None and step not in possible:
            raise ValueError(f"{kind} cannot happen at step {step}.")
        with self._lock:
            self._failures += [(kind, [step] if step else possible)] * times

    def now(self) -> datetime:
        """The time by the server's clock."""
        return self._clock()

    def set_clock(self, moment: datetime) -> None:
        """Stop the clock at this moment."""
        if moment.utcoffset() is None:
            raise ValueError("The clock needs a datetime with a time zone.")
        self._clock = lambda: moment

    def move_clock(self, delta: timedelta) -> None:
        """Put the clock forward or back. If it ran it runs on, if it stood it stands."""
        with self._lock:
            before = self._clock
            self._clock = lambda: before() + delta

    def _answer(self, route: str, shown: Shown) -> Answer:
        """Answer one request, by its route and all that it shows."""
        step, handle = ROUTES.get(route, (0, LocalUpstox._unknown))
        with self._lock:
            planned = next((planned for planned in self._failures if step in planned[1]), None)
            if planned:
                self._failures.remove(planned)
            shown["failure"] = failure = planned[0] if planned else None
            if step == 2:
                self._attempts[shown["userId"]] += 1
            try:
                answer = INSTEAD.get(failure) or handle(self, shown)
            except Answer as refusal:
                answer = refusal
        # Without the lock, so that others can log in meanwhile. Closing the server ends the wait.
        seconds = self.stall_seconds if failure is Failure.STALL else self.login_seconds if step == 6 else 0
        return HANG_UP if seconds and self._closing.wait(seconds) else answer

    def _dialog(self, shown: Shown) -> Answer:
        user = self._client(shown)
        if user is None or shown["redirect_uri"] != user.account.redirect_uri:
            raise _no(*WRONG_REDIRECT)
        if not user.account.client_active:
            raise _no("UDAPI100073", "Your 'client_id' is inactive.")
        address = {"user_id": user.account.user_id, "client_id": self._hand_out("login client", user)}
        return Answer("", 302, Location=f"/login?{urlencode(address)}&user_type=individual")

    def _generate_otp(self, shown: Shown) -> Answer:
        user = self._users.get(shown["userId"])
        if user is None or shown["mobileNumber"] != user.account.mobile:
            raise _no(1017001, "This mobile number is not registered.")
        otp_token = self._hand_out("OTP token", user)
        what_next = {"nextRequestInterval": 30, "isTotpEnabled": True}
        return _yes(message="OTP sent.", validateOTPToken=otp_token, userType="individual", **what_next)

    def _verify_totp(self, shown: Shown) -> Answer:
        user = self._handed_out.pop(("OTP token", shown["validateOtpToken"]), None)
        if user is None:
            raise _no(1017076, "This OTP session is used up.")
        account, totp, now = user.account, pyotp.TOTP(user.account.totp_secret), int(time.time()) // 30
        step = next((step for step in (now, now - 1, now + 1) if totp.generate_otp(step) == shown["otp"]), None)
        if step is None:
            raise _no(1017070, "This TOTP is wrong.")
        if self._totp_once and step in user.used_totps:
            raise _no(1017076, "This TOTP is used up.")
        user.used_totps.add(step)
        profile = {"profileId": 1, "userId": account.user_id, "firstName": account.user_name, "lastName": ""}
        answer = _yes(message="OTP verified.", userType="individual", isSecretPinSet=True, userProfile=profile)
        answer.headers["Set-Cookie"] = f"session={self._hand_out('session', user)}; Path=/; HttpOnly"
        return answer

    def _verify_pin(self, shown: Shown) -> Answer:
        user = self._session("session", shown)
        right = shown["inputText"] == b64encode(user.account.pin.encode()).decode()
        if user.wrong_pins < PINS_BEFORE_LOCK:
            user.wrong_pins = 0 if right else user.wrong_pins + 1
        if user.wrong_pins == PINS_BEFORE_LOCK:
            raise _no(1017108, "This account is locked.")
        if not right:
            raise _no(1017106, f"This PIN is wrong. {PINS_BEFORE_LOCK - user.wrong_pins} attempts left.")
        self._handed_out["session with PIN", shown["session"]] = user
        flags = ("isPlusPlanFastWebsocketEnabled", "isNewRefreshTokenCreated", "isExternalClientOAuthApp")
        return _yes(userType="individual", customerStatus="ACTIVE", refreshTokenExpiry=0, **dict.fromkeys(flags, False))

    def _authorize(self, shown: Shown) -> Answer:
        user = self._session("session with PIN", shown)
        if shown["userOAuthApproval"] is not True:
            raise _no("UDAPI100036", "The user has not approved.")
        for used_up in ("session", "session with PIN"):
            del self._handed_out[used_up, shown["session"]]
        del self._handed_out["login client", shown["client_id"]]
        code = self._hand_out("code", user)
        return _yes(redirectUri=f"{user.account.redirect_uri}?code={code}", isApproved=True)

    def _token(self, shown: Shown) -> Answer:
        owner = self._handed_out.pop(("code", shown["code"]), None)  # It serves once, whatever comes of it.
        user = self._client(shown)
        if user is None or shown["client_secret"] != user.account.client_secret:
            raise _no("UDAPI100069", "Check your 'client_id' and 'client_secret'; one or both are incorrect.")
        if shown["redirect_uri"] != user.account.redirect_uri:
            raise _no(*WRONG_REDIRECT)
        if shown["grant_type"] != "authorization_code":
            raise _no("UDAPI100036", "The grant_type is not authorization_code.")
        if owner is not user:
            raise _no("UDAPI100057", "This code is not one, or is used up.")
        now, failure = self.now(), shown["failure"]
        user.expires = now - timedelta(seconds=1) if failure is Failure.DEAD_TOKEN else _next_0330(now)
        user.token = self._jwt(user.account.user_id, now, user.expires)  # The earlier one dies here.
        self._logins[user.account.user_id] += 1
        extended_token = self._jwt(user.account.user_id, now, now + timedelta(days=365))
        body = _profile(user.account) | {"access_token": user.token, "extended_token": extended_token}
        if failure is Failure.OTHER_USER:
            body["user_id"] = "ZZ9999"
        if failure is Failure.MISSING_FIELD:
            del body["is_active"]
        return Answer(body)

    def _page(self, _: Shown) -> Answer:
        return PAGE

    def _show_profile(self, shown: Shown) -> Answer:
        return Answer({"status": "success", "data": _profile(self._bearer(shown).account)})

    def _logout(self, shown: Shown) -> Answer:
        self._bearer(shown).token = None
        return Answer({"status": "success", "data": True})

    def _unknown(self, _: Shown) -> Answer:
        raise _no("UDAPI10000", "There is no such request.", 404)

    def _hand_out(self, what: str, user: _User) -> str:
        value = secrets.token_urlsafe(16)
        self._handed_out[what, value] = user
        return value

    def _client(self, shown: Shown) -> _User | None:
        return next((user for user in self._users.values() if user.account.client_id == shown["client_id"]), None)

    def _session(self, what: str, shown: Shown) -> _User:
        user = self._handed_out.get((what, shown["session"]))
        if user is None or self._handed_out.get(("login client", shown["client_id"])) is not user:
            raise _no(1017076, "There is no such session.")
        if shown["redirect_uri"] != INNER_REDIRECT_URI:
            raise _no(*WRONG_REDIRECT)
        return user

    def _bearer(self, shown: Shown) -> _User:
        user = self._owner(shown["bearer"])
        if user is None:
            raise _no("UDAPI100050", "Invalid token used to access API")
        return user

    def _owner(self, token: str) -> _User | None:
        return next((u for u in self._users.values() if u.token == token and self.now() < u.expires), None)

    def _jwt(self, user_id: str, now: datetime, expires: datetime) -> str:
        header = {"typ": "JWT", "key_id": "sk_v1.0", "alg": "HS256"}
        claims = {"sub": user_id, "jti": secrets.token_hex(12), "isMultiClient": False, "isPlusPlan": False}
        claims |= {"iat": int(now.timestamp()), "iss": "udapi-gateway-service", "exp": int(expires.timestamp())}
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{_base64url(hmac.digest(self._signing_key, signed.encode(), 'sha256'))}"


ROUTES: dict[str, tuple[int, Callable[[LocalUpstox, Shown], Answer]]] = {
    "GET /api/v2/login/authorization/dialog": (1, LocalUpstox._dialog),
    "POST /service/login/open/v6/auth/1fa/otp/generate": (2, LocalUpstox._generate_otp),
    "POST /service/login/open/v4/auth/1fa/otp-totp/verify": (3, LocalUpstox._verify_totp),
    "POST /service/login/open/v3/auth/2fa": (4, LocalUpstox._verify_pin),
    "POST /service/login/v2/oauth/authorize": (5, LocalUpstox._authorize),
    "POST /api/v2/login/authorization/token": (6, LocalUpstox._token),
    "GET /login": (0, LocalUpstox._page),
    "GET /api/v2/user/profile": (0, LocalUpstox._show_profile),
    "DELETE /api/v2/logout": (0, LocalUpstox._logout),
}


def _profile(account: Account) -> dict[str, Any]:
    who = {"email": account.email, "user_id": account.user_id, "user_name": account.user_name}
    what = {"broker": "UPSTOX", "user_type": "individual", "poa": False, "ddpi": False, "is_active": True}
    lists = {"exchanges": "NSE NFO BSE CDS BFO BCD", "products": "D CO I", "order_types": "MARKET LIMIT SL SL-M"}
    return who | what | {name: values.split() for name, values in lists.items()}


def _next_0330(now: datetime) -> datetime:
    death = now.astimezone(INDIA).replace(hour=3, minute=30, second=0, microsecond=0)
    return death if death > now else death + timedelta(days=1)


def _base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
