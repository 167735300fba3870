"""Many threads on one SQLite file: they take turns, and Ctrl-C or a fork leaves nobody waiting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import KeyRing, PooledUpstoxStorage, SQLiteUpstoxStorage, StoreUnavailable
from upstox_db_examples.sqlite import connections as sqlite_connections

from ..support.processes import token_data, wait_until

THREADS = 8


def log_in(user_id: str | None) -> AccessTokenData:
    return token_data(user_id or "AB1234")


@pytest.fixture(params=[SQLiteUpstoxStorage, PooledUpstoxStorage])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLiteUpstoxStorage]:
    with request.param(tmp_path / "crowd.db", keys=KeyRing(KeyRing.new_key()), login=log_in) as store:
        yield store


def test_writers_are_served_in_the_order_in_which_they_came(store: SQLiteUpstoxStorage) -> None:
    users = [f"AB{number:04d}" for number in range(THREADS)]
    for user in [*users, "LAST"]:
        store.store_token(user)
    connections = store.backend.connections

    def work(user: str) -> None:
        store.revoke_token(user)
        if user == users[0]:
            store.revoke_token("LAST")  # Whoever has just written goes to the end of the queue.

    calls: list[Future[None]] = []
    with ThreadPoolExecutor(THREADS) as threads, connections.turn_to_write():
        for user in users:
            calls.append(threads.submit(work, user))
            wait_until(lambda: connections.writers.waiting == len(calls), 10)
    for call in calls:
        call.result()
    with connections.lend() as conn:
        written = conn.execute("SELECT user_id FROM upstox_token_audit WHERE action = 'revoked' ORDER BY id").fetchall()
    assert [user for (user,) in written] == [*users, "LAST"]


def test_a_writer_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_connections, "BUSY_SECONDS", 0.05)
    with SQLiteUpstoxStorage(tmp_path / "crowd.db", keys=KeyRing(KeyRing.new_key()), login=log_in) as store:
        with (
            store.backend.connections.turn_to_write(),
            ThreadPoolExecutor(1) as other,
            pytest.raises(StoreUnavailable, match="was locked by another writer"),
        ):
            other.submit(store.store_token, "AB1234").result()
        assert store.store_token("AB1234")["user_id"] == "AB1234"


def test_a_read_that_was_broken_off_makes_no_later_one_wait(
    store: SQLiteUpstoxStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.store_token("AB1234")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    store.backend.connections.is_reading = True  # This is what Ctrl-C at the very start of a read leaves.
    for _ in range(3):
        assert store.get_valid_token("AB1234")
    assert pauses == [sqlite_connections.TURN] * sqlite_connections.TURNS, "only the first read after it paused"


def test_readers_in_a_crowd_all_get_their_tokens(store: SQLiteUpstoxStorage) -> None:
    users = [f"AB{number:04d}" for number in range(THREADS)]
    tokens = {user: store.store_token(user)["token"] for user in users}
    reads: Counter[str] = Counter()
    end = time.monotonic() + 0.5

    def work(user: str) -> None:
        while time.monotonic() < end:
            found = store.get_valid_token(user)
            assert found
            assert found["token"] == tokens[user]
            reads[user] += 1

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, users))
    assert all(reads[user] for user in users), reads
