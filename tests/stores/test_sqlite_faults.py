"""SQLite: a full disk, another writer, crowds and kills, and a naive store on which these tests fail."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    SQLiteUpstoxStorage,
    StoreUnavailable,
    TokenNotStored,
)
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.sqlite import connections as sqlite_connections
from upstox_db_examples.sqlite.connections import open_connection

from ..contracts.reliability import ReliabilityContract
from ..support import processes
from ..support.clocks import Clock
from ..support.files import limit_file_size
from ..support.processes import USER, Address, token_data
from ..support.sqlite import OnSQLite, bare, counts
from ..support.stores import Counts, OpenStore, living


class TestSQLite(OnSQLite):
    # A full disk, another writer

    def test_a_full_database_costs_no_login_and_loses_nothing(
        self, store: SQLiteUpstoxStorage, upstox: LocalUpstox
    ) -> None:
        token = store.store_token()["token"]
        with full(store):
            for size in (1000, 100, 0):  # until there is no room for anything
                with pytest.raises(StoreUnavailable, match="disk is full"):
                    while True:
                        store.backend.record(USER, "filler", store.backend.context.now(), {"filler": "x" * size})
            with pytest.raises(StoreUnavailable, match="disk is full"):
                store.store_token()
            assert upstox.attempts() == 1, "no second login may begin"
            assert living(store)["token"] == token
        assert store.store_token()["token"] != token

    def test_a_disk_that_is_nearly_full_takes_the_token_or_refuses_before_the_login(self, tmp_path: Path) -> None:
        outcomes = set()
        for spare in range(0, 120_000, 4096):
            logins: list[str] = []

            def login(user_id: str | None, logins: list[str] = logins) -> AccessTokenData:
                logins.append("login")
                return token_data(user_id or USER)

            path = tmp_path / f"{spare}.db"
            with SQLiteUpstoxStorage(path, login=login, keys=processes.KEY) as store:
                store.store_token(USER)
                limit_file_size(path.with_name(f"{path.name}-wal").stat().st_size + spare - 60_000)
                try:
                    store.store_token(USER)
                except StoreUnavailable:
                    outcomes.add("refused")
                    assert logins == ["login"], f"a login was wasted with {spare} bytes to spare"
                else:
                    outcomes.add("stored")
                finally:
                    limit_file_size(resource.RLIM_INFINITY)
        assert outcomes == {"refused", "stored"}

    def test_a_token_that_cannot_be_stored_is_in_the_error(self, open_store: OpenStore) -> None:
        def login_while_the_disk_fails(user_id: str | None) -> AccessTokenData:
            limit_file_size(1024)
            return token_data(user_id or USER)

        store = open_store(login=login_while_the_disk_fails)
        try:
            with pytest.raises(TokenNotStored, match="disk that failed or is full") as caught:
                store.store_token(USER)
        finally:
            limit_file_size(resource.RLIM_INFINITY)
        assert caught.value.token.reveal() == token_data(USER).access_token
        assert "eyJ0eXAieyJ0" not in f"{caught.value} {caught.value!r}"
        assert self.raw_rows() == []

    def test_another_writer_is_waited_for_and_then_named(
        self, path: Path, open_store: OpenStore, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_connections, "BUSY_SECONDS", 0.2)
        store = open_store()
        token = store.store_token()["token"]
        with bare(path) as other:
            other.execute("BEGIN IMMEDIATE")
            assert living(store)["token"] == token, "reads must go on"
            with pytest.raises(StoreUnavailable, match="locked by another writer"):
                store.store_token()
            other.execute("ROLLBACK")
        assert upstox.logins() == 1
        assert store.store_token()

    # Connections

    def test_threads_share_a_few_connections_and_all_are_closed(self, store: SQLiteUpstoxStorage) -> None:
        store.store_token()
        for _ in range(5):
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda _: store.get_valid_token(USER), range(80)))
        assert 1 <= store.backend.connections.count_idle() <= 9
        store.close()
        assert store.backend.connections.count_idle() == 0

    def test_an_open_transaction_is_rolled_back_when_a_connection_comes_back(self, store: SQLiteUpstoxStorage) -> None:
        with store.get_connection() as conn:
            conn.execute("BEGIN")
            conn.execute("DELETE FROM upstox_token_audit")
        with store.get_connection() as conn:
            assert not conn.in_transaction
        with pytest.raises(ZeroDivisionError), store.get_connection() as conn:
            conn.execute("BEGIN IMMEDIATE")
            raise ZeroDivisionError
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            conn.execute("SELECT 1")
        assert store.store_token()


class TestSQLiteUnderCrowdsAndKills(ReliabilityContract):
    @pytest.fixture
    def address(self, path: Path) -> Address:
        return Address("upstox_db_examples:SQLiteUpstoxStorage", (str(path),))

    @pytest.fixture
    def count(self, path: Path) -> Callable[[], Counts]:
        return lambda: counts(path)


class Promises(ReliabilityContract):
    seconds_of_crowding = 5


class TestANaiveStoreUnderCrowdsAndKills:
    """Show that the reliability tests fail on a store that cannot keep the promises."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock(datetime.now(UTC))

    @pytest.fixture
    def naive(self, path: Path) -> Address:
        return Address("tests.support.naive:NaiveStorage", (str(path),))

    def test_several_processes_log_in(self, naive: Address, upstox: LocalUpstox, account: Account) -> None:
        with pytest.raises(AssertionError):
            Promises().test_of_32_processes_one_logs_in(naive, upstox, account)

    @pytest.mark.slow
    def test_a_crowd_whose_token_is_refused_logs_in(
        self, naive: Address, upstox: LocalUpstox, account: Account
    ) -> None:
        with pytest.raises(AssertionError, match="one login before them, and one for all of them"):
            Promises().test_of_1024_callers_whose_token_is_refused_one_logs_in(naive, upstox, account)

    def test_a_holder_woken_late_makes_a_second_token(self, naive: Address) -> None:
        with pytest.raises(AssertionError, match="two tokens look active"):
            Promises().test_a_holder_woken_late_makes_no_second_token(naive)

    def test_nobody_waits_for_a_login(self, naive: Address, upstox: LocalUpstox, account: Account) -> None:
        with pytest.raises(AssertionError, match="although another process is logging in"):
            Promises().test_a_killed_login_holds_nobody_up(naive, upstox, account)

    @pytest.mark.slow
    def test_a_killed_writer_leaves_a_mess(self, naive: Address, path: Path) -> None:
        with pytest.raises(AssertionError, match="none active"):
            Promises().test_a_writer_can_be_killed_200_times(naive, lambda: counts(path))

    @pytest.mark.slow
    def test_a_rotation_in_two_steps_takes_tokens_away(self, path: Path) -> None:
        with pytest.raises(AssertionError, match="missing while keys were rotated"):
            Promises().test_a_rotation_can_be_killed_at_any_moment(
                Address("tests.support.naive:RotatesInTwoSteps", (str(path),))
            )

    @pytest.mark.slow
    def test_a_lock_that_removes_its_file_lets_two_in(self, naive: Address, tmp_path: Path) -> None:
        with pytest.raises(AssertionError):
            Promises().test_the_lock_lets_one_in_at_a_time(naive, tmp_path)


@contextlib.contextmanager
def full(store: SQLiteUpstoxStorage) -> Iterator[None]:
    """Make SQLite itself report that the database cannot grow."""
    with store.get_connection() as conn:
        pages = conn.execute("PRAGMA page_count").fetchone()[0]

    def limited(path: Path) -> sqlite3.Connection:  # the limit belongs to a connection
        conn = open_connection(path)
        conn.execute(f"PRAGMA max_page_count = {pages}")
        return conn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_connections, "open_connection", limited)
        store.backend.connections.close_idle()
        yield
    store.backend.connections.close_idle()
