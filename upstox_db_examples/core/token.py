"""What a token is, when it dies, and how it stays out of sight.

An Upstox access token dies at the next 03:30 in India, whenever it was made: one from 20:00 on Tuesday lives for
7.5 hours, one from 02:30 on Wednesday for one. Source: Upstox's documentation of the token API, and the `exp` of
real tokens, which is 22:00 UTC to the second.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta, timezone, tzinfo
from typing import Any, NamedTuple, NoReturn

# A fixed offset and not ZoneInfo("Asia/Kolkata"): India has had this one offset and no summer time since 1945,
# and a slim container has no time zone database.
IST = timezone(timedelta(hours=5, minutes=30), "IST")


class Secret:
    """A string that shows only its first characters and its length, wherever it is printed or logged.

    A plain `str` would show itself in every traceback that prints local variables.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The whole string."""
        return self._value

    def __repr__(self) -> str:
        shown = self._value[:4] if len(self._value) >= 32 else ""
        return f"{shown}…({len(self._value)} chars)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("A secret is not pickled, for a pickle shows it to whoever reads the file.")


@dataclass(slots=True)
class StoredToken:
    """One token as a store keeps it: encrypted, with what is known about it beside it.

    Attributes:
        ciphertext: the encrypted token (see cipher.py).
        key_id: the key that encrypted it.
        generation: 1 for the user's first token, one more for each that follows. Two logins that were under way
            at once would write the same number, so the later write is refused.
        account: which credentials made it, so that a caller who names no user finds the right one again.
        created_at, expires_at, last_used_at: aware datetimes, UTC.
        issued_at: Upstox's own time of issue (`iat`), where it can be read; UTC. It stays after the token has ended.
        in_doubt: a login may have replaced this token at Upstox, and its outcome is not known (yet).
        token_id: the store's own id of the row, once it is stored.
        source: which database answered, where a store has two.
    """

    user_id: str
    ciphertext: str
    key_id: str
    generation: int
    created_at: datetime
    expires_at: datetime
    user_name: str | None = None
    email: str | None = None
    broker: str | None = None
    user_type: str | None = None
    products: list[str] = field(default_factory=list)
    exchanges: list[str] = field(default_factory=list)
    account: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    token_id: int | str | None = None
    usage_count: int = 0
    last_used_at: datetime | None = None
    issued_at: datetime | None = None
    in_doubt: bool = False
    source: str | None = None


class AuditEntry(NamedTuple):
    """What was done, by whom and when, as it moves from one store to another.

    Attributes:
        generation: of the token to which it was done; None for what belongs to no token, such as a login.
        position: the store's own id of the entry, by which it finds those that follow; of no meaning elsewhere.
    """

    action: str
    actor: str
    performed_at: datetime
    metadata: dict[str, Any]
    generation: int | None
    position: Any = None


class TokenResult(Mapping[str, Any]):
    """What a store hands out. Reads like a dict; `result["token"]` is the whole token, any display is masked.

    A Mapping and not a dict: json.dumps, pprint, rich and pytest look inside a dict and would show the token. Times
    are given as ISO text, made when they are looked at: most callers want the token alone.
    """

    __slots__ = ("_fields", "_token")

    def __init__(self, token: Secret, fields: dict[str, Any]) -> None:
        self._token = token
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        if key == "token":
            return self._token.reveal()
        value = self._fields[key]
        return value.isoformat() if isinstance(value, datetime) else value

    def __iter__(self) -> Iterator[str]:
        yield "token"
        yield from self._fields

    def __len__(self) -> int:
        return 1 + len(self._fields)

    def __repr__(self) -> str:
        return repr({"token": self._token, **{name: self[name] for name in self._fields}})

    def __reduce__(self) -> NoReturn:
        raise TypeError("A result is not pickled, for a pickle shows its token. Pass result['token'] on yourself.")


@dataclass(frozen=True)
class ExpiryPolicy:
    """When a token dies, and when a login is worth its price.

    Attributes:
        time_of_day, zone: every token dies at this time, 03:30 in India.
        margin: how far this machine's clock may be off. `get_valid_token` hands out nothing that dies sooner.
    """

    time_of_day: time = time(3, 30)
    zone: tzinfo = IST
    margin: timedelta = timedelta(minutes=1)

    def next_death(self, now: datetime) -> datetime:
        """When a token made now dies, strictly after `now`; UTC."""
        local = now.astimezone(self.zone)
        death = datetime.combine(local.date(), self.time_of_day, self.zone)
        if death <= local:
            death = datetime.combine(local.date() + timedelta(days=1), self.time_of_day, self.zone)
        return death.astimezone(UTC)

    def expires_at(self, token: Secret, now: datetime) -> datetime:
        """When this token dies: the earlier of its own `exp` and of 03:30 after it was issued; UTC.

        Args:
            now: in place of the time of issue, where the token does not tell that. Its own is better: this machine's
                clock may be a day behind, and would have the token die before it is used.
        """
        own, rule = jwt_expiry(token), self.next_death(issued_at(token) or now)
        return min(own, rule) if own else rule

    def worth_keeping(self, now: datetime) -> datetime:
        """A login is due only where no token dies after this moment; UTC.

        Inside the margin a new token would usually die at the very same 03:30. Logging in would only kill the
        living one, so it is kept until its last second unless a new one would really live longer.
        """
        return min(now + self.margin, self.next_death(now) - timedelta(seconds=1))


def jwt_claims(token: Secret) -> dict[str, Any]:
    """What a JWT says of itself; empty for anything else.

    The signature is not checked: the key is Upstox's. Upstox calls the token opaque, so a token that cannot be read is
    never an error.
    """
    try:
        payload = token.reveal().split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (LookupError, ValueError, TypeError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def jwt_expiry(token: Secret) -> datetime | None:
    """The `exp` of a JWT in whole seconds, UTC; None for anything else.

    It is not verified: a forged `exp` can only shorten the token's life here.
    """
    return _moment(jwt_claims(token).get("exp"))


def issued_at(token: Secret) -> datetime | None:
    """The `iat` of a JWT in whole seconds, UTC: when Upstox made it, by Upstox's clock. None for anything else."""
    return _moment(jwt_claims(token).get("iat"))


def subject(token: Secret) -> str | None:
    """The `sub` of a JWT: the user id that it was made for, unverified. None for anything else."""
    named = jwt_claims(token).get("sub")
    return named if isinstance(named, str) else None


def _moment(claim: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(int(claim), UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return None
