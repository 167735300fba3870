"""Many threads on one SQLite file: they take turns, and Ctrl-C or a fork leaves nobody waiting."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import KeyRing, PooledUpstoxStorage, SQLiteUpstoxStorage, StoreUnavailable
from upstox_db_examples.sqlite import connections as sqlite_connections

from ..support.processes import token_data

THREADS, STORES_EACH = 8, 6


def log_in(user_id: str | None) -> AccessTokenData:
    return token_data(user_id or "AB1234")


@pytest.fixture(params=[SQLiteUpstoxStorage, PooledUpstoxStorage])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLiteUpstoxStorage]:
    with request.param(tmp_path / "crowd.db", keys=KeyRing(KeyRing.new_key()), login=log_in) as store:
        yield store


def test_no_writer_is_overtaken_again_and_again(store: SQLiteUpstoxStorage) -> None:
    ended: list[int] = []
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        together.wait()
        for _ in range(STORES_EACH):
            store.store_token(f"AB{number:04d}")
            ended.append(number)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, range(THREADS)))
    for end in range(THREADS, len(ended)):
        done = Counter(dict.fromkeys(range(THREADS), 0)) + Counter(ended[:end])
        least = min(done[number] for number in range(THREADS))
        assert max(done.values()) - least <= 2, f"one thread had to watch others: {ended[:end]}"


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
