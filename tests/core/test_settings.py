"""The options of a store: an unusable one is refused before the database is touched and before any login."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import (
    Accounts,
    ExpiryPolicy,
    HybridUpstoxStorage,
    InvalidInput,
    KeyRing,
    MongoUpstoxStorage,
    PooledUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SdkLogin,
    SQLiteUpstoxStorage,
    TokenStorage,
    open_store,
)

from ..support.leaks import find, shown_with_locals

Open = Callable[..., TokenStorage]
# Nothing listens there: a store that asked its database first would raise another error.
NOWHERE = "postgresql://127.0.0.1:1/upstox"
STORES: dict[str, Open] = {
    "sqlite": partial(SQLiteUpstoxStorage, "upstox.db"),
    "pooled": partial(PooledUpstoxStorage, "upstox.db"),
    "postgresql": partial(PostgreSQLUpstoxStorage, NOWHERE),
    "mongodb": partial(MongoUpstoxStorage, "mongodb://127.0.0.1:1/"),
    "hybrid": partial(HybridUpstoxStorage, "redis://127.0.0.1:1/0", NOWHERE),
    "by its address": partial(open_store, "sqlite:///upstox.db"),
}
RAW = b"\x01\x02raw key of thirty-two bytes.."
UNUSABLE: list[tuple[str, list[Any], str]] = [
    ("login_wait", [1e10, 10**400, 86_401, 0, -1, float("inf"), float("nan"), True, "5", None], "at most 86400"),
    ("renew_pause", [1e300, 10**400, 0, None], "at most 86400"),
    ("actor", ["a\0b", "\ud800", b"x", 5, "x" * 201], "actor must be text"),
    ("login", [SdkLogin], r"Write login=SdkLogin\(\)"),
    ("login", [Accounts], r"Write login=Accounts\(\)"),
    ("login", ["x", {}, 0, {"username": "1"}], r"Write login=SdkLogin\(\)"),
    ("policy", ["x", 60, ExpiryPolicy, timedelta(minutes=1)], "policy must be an ExpiryPolicy"),
    ("keys", [RAW, bytearray(RAW), RAW.hex(), [RAW], KeyRing, 0], r"Write keys=KeyRing\(key\)"),
    ("clock", [5, datetime.now(UTC), datetime], "Write a function that returns the current time"),
]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("open_one", STORES.values(), ids=STORES)
def test_an_unusable_option_is_refused_before_the_database_is_touched(open_one: Open, in_a_folder: Path) -> None:
    for name, values, told in UNUSABLE:
        for value in values:
            with pytest.raises(InvalidInput, match=told):
                open_one(**{name: value})
    assert list(in_a_folder.iterdir()) == []


@pytest.mark.parametrize("open_one", STORES.values(), ids=STORES)
def test_a_raw_key_in_place_of_a_key_ring_is_never_shown(open_one: Open) -> None:
    for raw in (RAW, RAW.hex(), [RAW]):
        with pytest.raises(InvalidInput) as caught:
            open_one(keys=raw)
        assert find([RAW, RAW.hex()], shown_with_locals(caught.value).encode()) == set()


def test_a_store_takes_what_is_odd_and_usable() -> None:
    for actor in ("", None, "\u0935\u094d\u092f", "x" * 200):
        with SQLiteUpstoxStorage("upstox.db", actor=actor, keys=KeyRing.default, login_wait=86_400) as store:  # type: ignore[arg-type]
            assert store.backend.context.actor.startswith(actor or "")
            with pytest.raises(InvalidInput, match=r"Write login=SdkLogin\(\)"):
                store.login = SdkLogin  # type: ignore[assignment]


def test_a_clock_at_the_end_of_time_costs_no_login() -> None:
    logins: list[object] = []
    for moment in (
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime(9999, 1, 2, tzinfo=UTC),
    ):
        with (
            pytest.raises(InvalidInput, match="1970 to 9998"),
            SQLiteUpstoxStorage("upstox.db", clock=partial(max, moment, moment), login=logins.append) as store,
        ):
            store.get_or_create_token("AB1234")
    assert logins == []


@pytest.mark.parametrize(
    "unusable",
    [
        {"margin": 60},
        {"margin": None},
        {"margin": timedelta(minutes=-5)},
        {"margin": timedelta.max},
        {"margin": timedelta(days=1)},
        {"time_of_day": "03:30"},
        {"time_of_day": time(22, 0, tzinfo=UTC)},
        {"zone": None},
        {"zone": "Asia/Kolkata"},
    ],
)
def test_an_unusable_policy_is_refused_where_it_is_made(unusable: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"^{next(iter(unusable))} must be"):
        ExpiryPolicy(**unusable)
