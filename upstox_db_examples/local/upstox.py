"""A local Upstox that the real SDK logs in to. It needs no account and no network, and checks what a login must show.

A login is six requests. Each returns something that a later one has to send:

1. `GET  /api/v2/login/authorization/dialog`: an app sends its client id and redirect URI. It is redirected to a page
   whose address names the user, and a second client id that only this login uses.
2. `POST /service/login/open/v6/auth/1fa/otp/generate`: send the mobile number and the user, get an OTP token.
3. `POST /service/login/open/v4/auth/1fa/otp-totp/verify`: send the OTP token and a TOTP, get a session in a cookie.
4. `POST /service/login/open/v3/auth/2fa`: send the session and the PIN in base64. Five wrong PINs lock the account.
5. `POST /service/login/v2/oauth/authorize`: send the session and the user's approval, get a code that works once.
6. `POST /api/v2/login/authorization/token`: send the code and the client secret, get the access token. The user's
   earlier token dies.

The official one-call login is separate. It counts as step 7:

7. `POST /api/v2/totp-login/authorization/token`: send the client id in the header `x-api-key`, and a JSON body with
   `totp` and `pin`, six digits each. The answer is that of step 6. The limits are 1 request in a second, 10 in a minute
   and 60 in 30 minutes.

A token also arrives when the user approves an access token request in Upstox's own app: see `LocalUpstox.notify`.

In addition, `GET /api/v2/user/profile` tells whether a token lives, `POST /api/v3/order/place` takes any order, and
`DELETE /api/v2/logout` ends a token. Each answers 401 and UDAPI100050 to a dead token. Steps 1 to 6 have no limit: use
`fail()` to simulate one.

**The answer with the token** is what real accounts get, not what the documentation shows: by default it has no `poa`,
its `ddpi` is null, and it has an unknown field. The SDK's own model (upstox-totp 1.0.8) requires `poa` and `ddpi`, so
the bare SDK fails on this answer although the token was made. `shape_answers()` changes the answer.

**How certain the error codes are.** These are documented, and used as documented: UDAPI10005, UDAPI100050, UDAPI100067,
UDAPI100068, UDAPI100069 and UDAPI100073. These were seen in real answers: 1017069, 1017076, 1017106, and UDAPI100500
with the message of `Failure.OTP_LIMIT`. These are not published, so the numbers here are made up: 1017001 (mobile
number), 1017070 (wrong TOTP) and 1017108 (locked).

It is documented what step 7 refuses, but not with which codes. All of these are guesses: UDAPI100036 and status 400 for
a missing or malformed field, UDAPI100016 for an unknown client id and for an account without TOTP, and the login
service's 1017070, 1017076, 1017106 and 1017108 in the API's form with status 401:
`{"status": "error", "errors": [{"errorCode": "1017106", ...}]}`.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from threading import Event, Lock
from typing import Any, Self

from .accounts import Account, User, make_up
from .answers import INSTEAD, TOO_MANY, Failure, Limits, Shape, steps_of
from .service import INNER_REDIRECT_URI, Service, step_of
from .web import HANG_UP, Answer, Shown, WebServer

__all__ = ["INNER_REDIRECT_URI", "Account", "Failure", "LocalUpstox"]


class LocalUpstox:
    """A local Upstox on a free port, safe to share between threads.

    Args:
        clock: the clock for the start and the expiry of tokens. TOTPs use the real time, because the SDK's do.
        totp_once: whether a TOTP works only once, as at Upstox. With False you can log in twice in 30 seconds.
        limits: whether the one-call login (step 7) has its limits. With False you can log in twice in a second.
        monotonic: the clock for the limits, in seconds. A test passes its own clock instead of sleeping.
        host: the address of this machine to listen on. "0.0.0.0" lets containers and other machines in.

    Attributes:
        base_domain: what to set as the SDK client's `base_domain` on this machine. It is known once the server has
            started.
        login_seconds: how long steps 6 and 7 take to answer. The token is made at once, before that time.
        stall_seconds: how long a `Failure.STALL` takes to answer.
        on_step: a function that the server calls twice for each request of a login, in the thread of that request:
            with the step and "request" before it processes the request, and with the step and "answer" before it sends
            the answer. The request waits until the function returns; other requests do not. If the function raises,
            the request gets no answer and the error is printed.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] | None = None,
        totp_once: bool = True,
        limits: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
        host: str = "127.0.0.1",
    ) -> None:
        self.base_domain = ""
        self.host = host
        self.login_seconds: float = 0
        self.stall_seconds: float = 30
        self.on_step: Callable[[int, str], object] | None = None
        self.clock = clock or (lambda: datetime.now(UTC))
        self._server: WebServer | None = None
        self._closing = Event()
        self._lock = Lock()  # protects everything below
        self._service = Service(self.now, totp_once)
        self._limits = Limits(monotonic) if limits else None
        self._failures: list[tuple[Failure, Collection[int]]] = []  # the failure and its possible steps
        self._attempts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start to listen."""
        if self._server is None:
            self._closing.clear()
            self._server = WebServer(self._answer, self.host)
            self.base_domain = f"http://127.0.0.1:{self._server.server_address[1]}/{{stage}}"
        return self

    def close(self) -> None:
        """Hang up on everyone. No thread or socket is left, but accounts and counts stay."""
        server, self._server = self._server, None
        if server:
            self._closing.set()
            server.close()

    def add_account(self, user_id: str, **overrides: Any) -> Account:
        """Make up an account. The same user id always gives the same one. `overrides` are fields of `Account`."""
        account = make_up(user_id, overrides)
        with self._lock:
            self._service.users[user_id] = User(account)
        return account

    def unlock(self, user_id: str) -> None:
        """Forget the wrong PINs."""
        with self._lock:
            self._service.users[user_id].wrong_pins = 0

    def logins(self, user_id: str | None = None) -> int:
        """Count the tokens that were made, for one user or for all."""
        with self._lock:
            return self._service.logins[user_id] if user_id else self._service.logins.total()

    def attempts(self, user_id: str | None = None) -> int:
        """Count the login attempts, for one user or for all, failed ones included: requests of steps 2 and 7."""
        with self._lock:
            return self._attempts[user_id] if user_id else self._attempts.total()

    def orders(self, user_id: str) -> int:
        """Count the orders that this user has placed."""
        with self._lock:
            return self._service.orders[user_id]

    def is_living(self, token: str) -> bool:
        """Tell whether Upstox would still accept this access token."""
        with self._lock:
            return self._service.owner(token) is not None

    def kill_token(self, user_id: str) -> None:
        """End the user's token early, as a change of the app's static IPs does."""
        with self._lock:
            self._service.users[user_id].token = None

    def notify(self, user_id: str, url: str | None = None) -> dict[str, str]:
        """Let the user approve an access token request: a token is made, and Upstox tells the app's notifier URL.

        The times are strings of milliseconds, as in the documentation's example.

        Args:
            user_id: the user who approves.
            url: where to POST the message, without any authentication. Without a URL, the message is only returned.

        Returns:
            The message.

        Raises:
            OSError: the URL did not accept the message: no connection, or a status of 400 or more. The token was made.
        """
        with self._lock:
            user = self._service.users[user_id]
            issued_at = self.now()
            message = {
                "client_id": user.account.client_id,
                "user_id": user_id,
                "access_token": self._service.mint(user),
                "token_type": "Bearer",
                "expires_at": _milliseconds(user.expires),
                "issued_at": _milliseconds(issued_at),
                "message_type": "access_token",
            }
        if url is not None:
            request = urllib.request.Request(url, json.dumps(message).encode(), {"Content-Type": "application/json"})  # noqa: S310  # the caller's own URL
            # Use no proxy, because a proxy would look for the receiver on its own machine.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5):
                pass
        return message

    def shape_answers(
        self,
        *,
        missing: Collection[str] = (),
        null: Collection[str] = (),
        changed: Mapping[str, object] | None = None,
        added: Mapping[str, object] | None = None,
    ) -> None:
        """Set what later answers of steps 6 and 7 look like. Each call starts from the complete documented answer.

        So `shape_answers()` gives the complete answer, which the bare SDK can read.

        Args:
            missing: fields to leave out.
            null: fields to set to null.
            changed: fields that get another value, which may have another type.
            added: new fields.

        Raises:
            ValueError: the answer has no such field, or already has the new one.
            TypeError: a value cannot be written as JSON.
        """
        shape = Shape(missing, null, changed or {}, added or {})
        with self._lock:
            self._service.shape = shape

    def fail(self, kind: Failure | str, times: int = 1, step: int | None = None) -> None:
        """Make the next `times` requests of a login fail, or those of one step."""
        kind = Failure(kind)
        possible = steps_of(kind)
        if step is not None and step not in possible:
            raise ValueError(f"{kind} cannot happen at step {step}.")
        with self._lock:
            self._failures += [(kind, [step] if step else possible)] * times

    def now(self) -> datetime:
        """Return the time by the server's clock."""
        return self.clock()

    def set_clock(self, moment: datetime) -> None:
        """Stop the clock at this moment."""
        if moment.utcoffset() is None:
            raise ValueError("The clock needs a datetime with a time zone.")
        self.clock = lambda: moment

    def move_clock(self, delta: timedelta) -> None:
        """Move the clock forward or back. A running clock keeps running, and a stopped one stays stopped."""
        with self._lock:
            before = self.clock
            self.clock = lambda: before() + delta

    def _answer(self, route: str, shown: Shown) -> Answer:
        """Answer one request, given its route and everything that it sends."""
        step = step_of(route)
        self._tell(step, "request")
        with self._lock:
            failure, answer = self._work(step, route, shown)
        self._tell(step, "answer")
        # Wait without the lock, so that others can log in meanwhile. Closing the server ends the wait.
        slow = self.login_seconds if step in (6, 7) else 0
        seconds = self.stall_seconds if failure is Failure.STALL else slow
        if seconds and self._closing.wait(seconds):
            return HANG_UP
        return HANG_UP if failure is Failure.LOST else answer

    def _work(self, step: int, route: str, shown: Shown) -> tuple[Failure | None, Answer]:
        if step == 2:
            self._attempts[shown["userId"]] += 1
        if step == 7:
            user = self._service.client(shown["x-api-key"])
            self._attempts[user.account.user_id if user else ""] += 1
            if self._limits and not self._limits.admit(shown["x-api-key"]):
                return None, TOO_MANY  # The planned failures wait for a request that gets through.
        planned = next((planned for planned in self._failures if step in planned[1]), None)
        if planned:
            self._failures.remove(planned)
        shown["failure"] = failure = planned[0] if planned else None
        return failure, INSTEAD.get(failure) or self._service.answer(route, shown)

    def _tell(self, step: int, what: str) -> None:
        if step and self.on_step:
            self.on_step(step, what)


def _milliseconds(moment: datetime) -> str:
    return str(int(moment.timestamp()) * 1000)
