"""The token: its fields, its expiry, and how it stays out of sight.

An Upstox access token expires at the next 03:30 in India, whenever it was made: a token from 20:00 on Tuesday lives for
7.5 hours, and one from 02:30 on Wednesday lives for one hour. The sources are Upstox's documentation of the token API
and the `exp` of real tokens, which is 22:00 UTC to the second.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, time, timedelta, timezone, tzinfo
from typing import Any, NamedTuple, NoReturn

# We use a fixed offset and not ZoneInfo("Asia/Kolkata"): India has had this offset without summer time since 1945, and
# a slim container has no time zone database.
IST = timezone(timedelta(hours=5, minutes=30), "IST")


class Secret:
    """A string that shows only its first characters and its length wherever it is printed or logged.

    A plain `str` would show up in every traceback that prints local variables.

    Example:
        >>> pin = Secret("123456")
        >>> print(pin, pin.reveal())
        …(6 chars) 123456
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the whole string."""
        return self._value

    def __repr__(self) -> str:
        shown = self._value[:4] if len(self._value) >= 32 else ""
        return f"{shown}…({len(self._value)} chars)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("A secret cannot be pickled, because anyone who reads the file would see it.")


@dataclass(slots=True)
class StoredToken:
    """One token as a store keeps it: the ciphertext and everything known about the token.

    Attributes:
        ciphertext: the encrypted token (see cipher.py).
        key_id: the key that encrypted it.
        generation: 1 for the user's first token, and one more for each later one. Two logins that ran at the same
            time would write the same number, so the later write is refused.
        account: the credentials that made it, so that a caller who names no user gets the right token.
        created_at, expires_at, last_used_at: aware datetimes, UTC.
        issued_at: Upstox's own time of issue (`iat`) in UTC, if it can be read. It stays after the token has ended.
        in_doubt: a login may have replaced this token at Upstox, and the outcome is not known (yet).
        token_id: the store's own id of the row, once it is stored.
        source: the database that answered, if a store has two.
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


def fields_of_token(token: StoredToken) -> dict[str, Any]:
    """Return the fields by name. (`dataclasses.asdict` would copy the values, too, and take ten times as long.)"""
    return {name: getattr(token, name) for name in _STORED}


_STORED = tuple(field.name for field in fields(StoredToken))


class AuditEntry(NamedTuple):
    """One audit entry in a form that moves between stores: what was done, by whom and when.

    Attributes:
        generation: the generation of the token; None for an entry that belongs to no token, such as a login.
        position: the store's own id of the entry, which it needs to find the next ones. It means nothing elsewhere.
    """

    action: str
    actor: str
    performed_at: datetime
    metadata: dict[str, Any]
    generation: int | None
    position: Any = None


class TokenResult(Mapping[str, Any]):
    """The result that a store returns. It reads like a dict: `result["token"]` is the whole token, output is masked.

    This is a Mapping and not a dict, because json.dumps, pprint, rich and pytest look inside a dict and would show the
    token. Times become ISO text only on access, because most callers want only the token.

    Example:
        >>> result = storage.get_or_create_token("AB1234")
        >>> print(result["user_id"], result.masked_token)
        AB1234 eyJ0…(336 chars)
        >>> len(result["token"])
        336
    """

    __slots__ = ("_fields", "_token")

    def __init__(self, token: Secret, fields: dict[str, Any]) -> None:
        self._token = token
        self._fields = fields

    @property
    def masked_token(self) -> Secret:
        """The token, masked when it is printed."""
        return self._token

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
        raise TypeError("A result cannot be pickled: the file would show its token. Pass result['token'] on yourself.")


@dataclass(frozen=True)
class ExpiryPolicy:
    """Decides when a token expires, and when a login is worth its cost.

    Attributes:
        time_of_day, zone: every token expires at this time, 03:30 in India.
        margin: how far this machine's clock may be off, less than a day. `get_valid_token` returns no token that
            expires sooner.

    Raises:
        InvalidInput: a value is of another type, the margin is out of bounds, or `time_of_day` has a zone of its own.

    Example:
        >>> from datetime import datetime
        >>> from upstox_db_examples.core.token import IST
        >>> tuesday_evening = datetime(2026, 1, 6, 20, 0, tzinfo=IST)
        >>> ExpiryPolicy().next_death(tuesday_evening).astimezone(IST).isoformat()
        '2026-01-07T03:30:00+05:30'
    """

    time_of_day: time = time(3, 30)
    zone: tzinfo = IST
    margin: timedelta = timedelta(minutes=1)

    def __post_init__(self) -> None:
        from .errors import InvalidInput  # Only here: errors.py imports this file.

        if not isinstance(self.time_of_day, time) or self.time_of_day.tzinfo is not None:
            raise InvalidInput("time_of_day must be a time without a zone, such as time(3, 30).")
        if not isinstance(self.zone, tzinfo):
            raise InvalidInput('zone must be a time zone, such as ZoneInfo("Asia/Kolkata").')
        if not isinstance(self.margin, timedelta) or not timedelta(0) <= self.margin < timedelta(days=1):
            raise InvalidInput("margin must be a timedelta from 0 to less than a day, such as timedelta(minutes=1).")

    def next_death(self, now: datetime) -> datetime:
        """Return when a token made now expires, in UTC. This is always after `now`."""
        today = now.astimezone(self.zone).date()
        # Compare in UTC. Two moments of one zone are compared by the clock on the wall, which goes back in autumn. The
        # day before counts too: in spring its time of day may not exist and fall on the next day.
        days = (today + timedelta(days=number) for number in (-1, 0, 1, 2))
        deaths = (datetime.combine(day, self.time_of_day, self.zone).astimezone(UTC) for day in days)
        return next(death for death in deaths if death > now)

    def expires_at(self, token: Secret, now: datetime) -> datetime:
        """Return when this token expires, in UTC: its own `exp` or the first 03:30 after issue, whichever is earlier.

        Args:
            now: replaces the time of issue if the token does not tell it. The token's own time is better: this
                machine's clock may be a day behind, and then the token would expire before its first use.
        """
        own, rule = jwt_expiry(token), self.next_death(issued_at(token) or now)
        return min(own, rule) if own else rule

    def worth_keeping(self, now: datetime) -> datetime:
        """Return a moment in UTC. A login is due only if no stored token expires after it.

        Inside the margin a new token would usually expire at the same 03:30, so a login would only kill a working
        token. The stored one is kept until its last second, unless a new one would really live longer.
        """
        return min(now + self.margin, self.next_death(now) - timedelta(seconds=1))


def jwt_claims(token: Secret) -> dict[str, Any]:
    """Return the claims of a JWT, or an empty dict for anything else.

    The signature is not checked, because only Upstox has the key. Upstox calls the token opaque, so an unreadable token
    is never an error.
    """
    try:
        payload = token.reveal().split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (LookupError, ValueError, TypeError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def jwt_expiry(token: Secret) -> datetime | None:
    """Return the `exp` of a JWT in whole seconds, UTC; None for anything else.

    It is not verified: a forged `exp` can only shorten the token's life here.
    """
    return _moment(jwt_claims(token).get("exp"))


def issued_at(token: Secret) -> datetime | None:
    """Return the `iat` of a JWT, the time of issue by Upstox's clock, in whole seconds, UTC; None for anything else."""
    return _moment(jwt_claims(token).get("iat"))


def subject(token: Secret) -> str | None:
    """Return the `sub` of a JWT, the user id it was made for, unverified; None for anything else."""
    named = jwt_claims(token).get("sub")
    return named if isinstance(named, str) else None


def _moment(claim: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(int(claim), UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return None
