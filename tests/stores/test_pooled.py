"""The pooled store: the contract, and the features of the pool itself."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import InvalidInput, PooledUpstoxStorage, StoreUnavailable, TokenStorage, pooled
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.sqlite.connections import open_connection

from ..contracts.reliability import ReliabilityContract
from ..contracts.store import StoreContract
from ..support import processes
from ..support.processes import USER, Address
from ..support.sqlite import OnASQLiteFile, counts
from ..support.stores import Counts, OpenStore, living


class TestPooled(OnASQLiteFile, StoreContract):
    def connect(self, **options: Any) -> TokenStorage:
        return PooledUpstoxStorage(self.file, **options)

    @pytest.fixture
    def store(self, open_store: OpenStore) -> PooledUpstoxStorage:
        return self.pooled(open_store)

    @staticmethod
    def pooled(open_store: OpenStore, **options: Any) -> PooledUpstoxStorage:
        store = open_store(**options)
        assert isinstance(store, PooledUpstoxStorage)
        return store

    # How many connections

    @pytest.mark.parametrize("size", [1, 3])
    def test_a_thread_that_finds_all_in_use_gets_the_error_in_time(self, open_store: OpenStore, size: int) -> None:
        store = self.pooled(open_store, pool_size=size, timeout=1)
        with borrowed(store, size):
            begin = time.monotonic()
            with pytest.raises(StoreUnavailable, match=rf"for 1 s; pool_size is {size}.*larger pool_size"):
                store.get_valid_token(USER)
            assert 1 <= time.monotonic() - begin < 1.5
        assert store.get_valid_token(USER) is None

    def test_a_waiting_thread_gets_the_first_free_connection(self, open_store: OpenStore) -> None:
        store = self.pooled(open_store, pool_size=1, timeout=10)
        token = store.store_token()["token"]
        with ThreadPoolExecutor(1) as thread:
            with store.get_connection():
                waiting = thread.submit(living, store)
                time.sleep(0.2)
                assert not waiting.done()
            assert waiting.result(timeout=5)["token"] == token

    def test_a_crowd_never_opens_more_connections_than_agreed(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, upstox: LocalUpstox
    ) -> None:
        opened: list[object] = []

        def counted(path: Path) -> sqlite3.Connection:
            opened.append(path)
            return open_connection(path)

        monkeypatch.setattr(pooled.store, "open_connection", counted)
        store = self.pooled(open_store, pool_size=3)
        with ThreadPoolExecutor(8) as threads:
            tokens = {result["token"] for result in threads.map(store.get_or_create_token, [USER] * 400)}
        assert (len(tokens), upstox.logins()) == (1, 1)
        assert 1 <= len(opened) <= 3
        assert store.pool_status()["in_use"] == 0

    def test_the_status_says_what_is_in_use(self, open_store: OpenStore) -> None:
        store = self.pooled(open_store, pool_size=3)
        assert store.pool_status() == {"size": 3, "in_use": 0, "idle": 1, "unopened": 2}
        with borrowed(store, 2):
            assert store.pool_status() == {"size": 3, "in_use": 2, "idle": 0, "unopened": 1}
        assert store.pool_status() == {"size": 3, "in_use": 0, "idle": 2, "unopened": 1}

    @pytest.mark.parametrize("bad", [{"pool_size": 0}, {"pool_size": True}, {"timeout": 0}, {"timeout": float("nan")}])
    def test_a_pool_of_none_is_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            self.connect(**bad)

    # What goes back

    def test_the_transaction_of_one_borrower_is_not_the_next_ones(self, open_store: OpenStore) -> None:
        store = self.pooled(open_store, pool_size=1)
        store.store_token()
        with store.get_connection() as first:
            first.execute("BEGIN")
            first.execute("DELETE FROM upstox_token_audit")
        with store.get_connection() as second:
            assert second is first, "the pool has only this connection"
            assert not second.in_transaction
            assert second.execute("SELECT count(*) FROM upstox_token_audit").fetchone()[0] > 0

    def test_a_connection_that_saw_an_error_does_not_go_back(self, open_store: OpenStore) -> None:
        store = self.pooled(open_store, pool_size=1)
        with pytest.raises(ZeroDivisionError), store.get_connection() as broken:
            broken.execute("BEGIN IMMEDIATE")
            raise ZeroDivisionError
        with pytest.raises(sqlite3.OperationalError, match="nonsense"), store.get_connection() as broken_too:
            broken_too.execute("SELECT nonsense")
        with store.get_connection() as sound:
            assert sound not in (broken, broken_too)
        for closed in (broken, broken_too):
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                closed.execute("SELECT 1")
        assert store.store_token()

    def test_a_connection_that_was_closed_does_not_go_back(self, open_store: OpenStore) -> None:
        store = self.pooled(open_store, pool_size=1)
        with pytest.raises(StoreUnavailable), store.get_connection() as conn:
            conn.close()
        assert store.store_token()

    def test_a_connection_that_comes_back_to_a_closed_store_is_closed(self, store: PooledUpstoxStorage) -> None:
        with store.get_connection() as conn:
            store.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            conn.execute("SELECT 1")

    def test_a_store_that_nobody_uses_any_more_closes_its_connections(self, path: Path) -> None:
        store = PooledUpstoxStorage(path)
        with store.get_connection() as conn:
            pass
        del store
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            conn.execute("SELECT 1")

    def test_a_forked_child_shares_no_connection(self, path: Path) -> None:
        ours = Address("upstox_db_examples:PooledUpstoxStorage", (str(path), 1))
        process, connection = processes.start(processes.fork_and_compare, ours)
        assert connection.recv() == {"idle in the child": 0, "the same connection": False}
        process.join()


class TestPooledUnderCrowdsAndKills(ReliabilityContract):
    seconds_of_crowding = 5
    in_a_crowd = {"timeout": 60.0}

    @pytest.fixture
    def address(self, path: Path) -> Address:
        return Address("upstox_db_examples:PooledUpstoxStorage", (str(path),))

    @pytest.fixture
    def count(self, path: Path) -> Callable[[], Counts]:
        return lambda: counts(path)


@contextmanager
def borrowed(store: PooledUpstoxStorage, count: int) -> Iterator[None]:
    """Hold this many connections, each in a thread of its own."""
    have, give_back = threading.Barrier(count + 1), threading.Event()

    def hold(_: int) -> None:
        with store.get_connection():
            have.wait(10)
            give_back.wait(10)

    with ThreadPoolExecutor(count) as threads:
        holding = threads.map(hold, range(count))
        have.wait(10)
        try:
            yield
        finally:
            give_back.set()
        list(holding)
