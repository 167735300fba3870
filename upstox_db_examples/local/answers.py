"""The local Upstox's answers: refusals, failures on demand, the shape of a token answer, and the limits."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .web import HANG_UP, Answer


class Failure(StrEnum):
    """The failures that `LocalUpstox.fail` can cause. The request does nothing unless the failure says that it does."""

    RATE_LIMIT = "rate_limit"  # 429 and UDAPI10005
    SERVER_ERROR = "server_error"  # 500 and UDAPI100500
    HTML = "html"  # 200 and a page instead of JSON
    DROP = "drop"  # the connection ends before the request is processed
    STALL = "stall"  # the work is done at once, the answer comes `stall_seconds` later
    OTP_BLOCKED = "otp_blocked"  # step 2: 1017069
    OTP_LIMIT = "otp_limit"  # step 2: 500 and UDAPI100500 again, but its message says that a limit was reached
    # These make a token anyway: the login counts, and the user's earlier token is dead. They happen at steps 6 and 7.
    LOST = "lost"  # the connection ends after the work is done and before the answer
    NO_TOKEN = "no_token"  # noqa: S105  # the answer lacks `access_token`
    NO_USER = "no_user"  # the answer lacks `user_id`
    MISSING_FIELD = "missing_field"  # the answer lacks `is_active`
    OTHER_USER = "other_user"  # the answer names the user ZZ9999
    DEAD_TOKEN = "dead_token"  # noqa: S105  # the token has expired already
    ENVELOPE = "envelope"  # the answer is wrapped: {"status": "success", "data": {...}}
    PLAIN_TYPE = "plain_type"  # the answer is the right JSON, but says that it is text/plain


ANY_STEP = range(1, 8)
AT_OTP = {Failure.OTP_BLOCKED, Failure.OTP_LIMIT}
AT_ANY_STEP = {Failure.RATE_LIMIT, Failure.SERVER_ERROR, Failure.HTML, Failure.DROP, Failure.STALL}


def steps_of(failure: Failure) -> Collection[int]:
    """Return the steps at which this failure can happen."""
    return ANY_STEP if failure in AT_ANY_STEP else (2,) if failure in AT_OTP else (6, 7)


def no(code: str | int, message: str, status: int = 401) -> Answer:
    """Make a refusal. It has the login service's form if the code is a number, and the API's form otherwise."""
    if isinstance(code, int):  # The login service answers 200 even when it refuses.
        return Answer({"success": False, "error": {"code": code, "message": message}})
    error = {"errorCode": code, "error_code": code, "message": message, "propertyPath": None, "invalidValue": None}
    return Answer({"status": "error", "errors": [error]}, status)


def yes(**data: object) -> Answer:
    """Make an answer of the login service that accepts."""
    return Answer({"success": True, "data": data})


PAGE = Answer("<!doctype html><title>Upstox</title>")
TOO_MANY = no("UDAPI10005", "Too many requests.", 429)
OTP_LIMIT = "You have exceeded the maximum number of times you can generate an OTP"
# These failures answer instead of the step.
INSTEAD: dict[Failure | None, Answer] = {
    Failure.RATE_LIMIT: TOO_MANY,
    Failure.SERVER_ERROR: no("UDAPI100500", "Something went wrong.", 500),
    Failure.OTP_BLOCKED: no(1017069, "OTPs are blocked for 10 minutes."),
    Failure.OTP_LIMIT: no("UDAPI100500", OTP_LIMIT, 500),
    Failure.HTML: PAGE,
    Failure.DROP: HANG_UP,
}


# The documented fields.
TOKEN_FIELDS = {"email", "user_id", "user_name", "broker", "user_type", "poa", "ddpi", "is_active"}
TOKEN_FIELDS |= {"exchanges", "products", "order_types", "access_token", "extended_token"}


@dataclass(frozen=True)
class Shape:
    """How the answer with a token differs from the documented one.

    The default is what real accounts got in 2026: no `poa`, a null `ddpi`, and a field that the SDK does not know.
    """

    missing: Collection[str] = ("poa",)
    null: Collection[str] = ("ddpi",)
    changed: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[str, object] = field(default_factory=lambda: {"is_plus_plan": False})

    def __post_init__(self) -> None:
        # Checked here, because it is used in a thread of the server.
        if unknown := {*self.missing, *self.null, *self.changed} - TOKEN_FIELDS:
            raise ValueError(
                f"A token answer has no {', '.join(sorted(unknown))}. Its fields: {', '.join(sorted(TOKEN_FIELDS))}."
            )
        if twice := TOKEN_FIELDS.intersection(self.added):
            raise ValueError(f"A token answer already has {', '.join(sorted(twice))}. Use `changed`.")
        json.dumps([dict(self.changed), dict(self.added)])

    def of(self, body: dict[str, Any]) -> dict[str, Any]:
        """Give an answer this shape."""
        body = body | dict.fromkeys(self.null) | dict(self.changed) | dict(self.added)
        return {name: value for name, value in body.items() if name not in self.missing}


def token_answer(body: dict[str, Any], failure: Failure | None) -> Answer:
    """Make the answer with a token, broken in the way of this failure."""
    lacks = {Failure.NO_TOKEN: "access_token", Failure.NO_USER: "user_id", Failure.MISSING_FIELD: "is_active"}
    if failure in lacks:
        body.pop(lacks[failure], None)  # The shape may lack it already.
    if failure is Failure.OTHER_USER:
        body["user_id"] = "ZZ9999"
    answer = Answer({"status": "success", "data": body} if failure is Failure.ENVELOPE else body)
    if failure is Failure.PLAIN_TYPE:
        answer.headers["Content-Type"] = "text/plain"
    return answer


class Limits:
    """The documented limits of the one-call login, for each client id."""

    WINDOWS = ((1, 1), (10, 60), (60, 30 * 60))  # number of requests, seconds

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._admitted: dict[str, deque[float]] = {}

    def admit(self, client_id: str) -> bool:
        """Tell whether this client may make a request now. A refused request does not count."""
        now, before = self._monotonic(), self._admitted.setdefault(client_id, deque(maxlen=60))
        for most, seconds in self.WINDOWS:
            if sum(moment > now - seconds for moment in before) >= most:
                return False
        before.append(now)
        return True
