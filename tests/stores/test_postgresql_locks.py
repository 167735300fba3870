"""PostgreSQL: the lock of a login, the mark on its token, and a caller that has lost its lock."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    LoginSuperseded,
    PostgreSQLUpstoxStorage,
    StoreUnavailable,
    postgresql,
)

from ..contracts.backend import made_up
from ..support import forks
from ..support.clocks import Clock
from ..support.postgresql import OnPostgreSQL, bare, count_messages
from ..support.processes import USER, token_data
from ..support.stores import OpenStore, living

HOLDERS = """
SELECT DISTINCT pid FROM pg_locks
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class TestPostgreSQL(OnPostgreSQL):
    # Marks

    def test_a_login_that_waits_for_a_new_token_marks_it(self, store: PostgreSQLUpstoxStorage) -> None:
        store.backend.insert(made_up(store, USER))
        waiting = "SELECT count(*) AS waiting FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, metadata"
        with ThreadPoolExecutor(1) as thread, store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute("UPDATE upstox_tokens SET is_active = false, access_token = NULL")
            new = f"INSERT INTO upstox_tokens (generation, access_token, {columns}) SELECT 2, 'x', {columns}"
            cursor.execute(f"{new} FROM upstox_tokens")
            begun = thread.submit(store.backend.begin_login, USER, USER, store.backend.context.now(), {})
            while not bare(self.url, waiting)[0]["waiting"]:
                time.sleep(0.01)
            conn.commit()
            begun.result()
        assert [row["login_lock"] is None for row in self.raw_rows()] == [True, False]

    def test_a_cleanup_does_not_wait_for_a_token_that_somebody_holds(self, open_store: OpenStore, clock: Clock) -> None:
        store = open_store(timeout=1)
        assert isinstance(store, PostgreSQLUpstoxStorage)
        for user_id in (USER, "CD0001"):
            store.backend.insert(made_up(store, user_id))
        clock.advance(days=2)
        with store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1 FROM upstox_tokens WHERE user_id = %s FOR UPDATE", (USER,))
            assert store.cleanup_expired_tokens() == 1
            conn.rollback()
        assert store.cleanup_expired_tokens() == 1

    def test_the_server_notices_within_half_a_minute_that_a_machine_is_gone(
        self, store: PostgreSQLUpstoxStorage
    ) -> None:
        """A machine without power closes no connection, so its locks would stay for the two hours of the default."""
        names = [f"tcp_keepalives_{name}" for name in ("idle", "interval", "count")]
        asked = f"SELECT {', '.join(f'current_setting({name!r})::int AS {name}' for name in names)}"
        connections = store.backend.connections
        with closing(connections.connect()) as for_a_lock, connections.session() as pooled:
            for conn in (for_a_lock, pooled):
                idle, interval, count = connections.answer(conn, asked)[0].values()
                assert 0 < idle + interval * count <= 30

    def test_the_next_holder_of_the_lock_is_not_taken_for_the_login_that_died(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
        with store.backend.lock(USER):
            assert open_store().get_valid_token(USER) is None

    def test_readers_of_a_token_in_doubt_do_not_take_each_other_for_its_login(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
        stop = threading.Event()

        def lock_on_and_on() -> None:
            other = open_store()
            while not stop.is_set():
                with other.backend.lock(USER):
                    pass

        with ThreadPoolExecutor(5) as threads:
            locking = threads.submit(lock_on_and_on)
            found = list(threads.map(lambda _: store.get_valid_token(USER), range(200)))
            stop.set()
            locking.result()
        assert found == [None] * 200

    def test_a_login_itself_still_reads_the_token_that_it_may_replace(self, store: PostgreSQLUpstoxStorage) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            assert living(store)["token"]

    def test_a_read_of_a_marked_token_is_one_round_trip_too(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.backend.insert(made_up(store, USER))
        other = open_store()
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            messages = count_messages(monkeypatch)
            living(other)
            assert len(messages) == 1

    def test_no_lock_is_looked_at_for_a_token_without_a_mark(
        self, store: PostgreSQLUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked = "login_lock / 0"  # fails wherever the column is read
        monkeypatch.setattr(
            postgresql.queries,
            "FIND",
            postgresql.queries.FIND.replace("pg_try_advisory_xact_lock_shared(login_lock)", f"({looked}) = 1"),
        )
        store.backend.insert(made_up(store, USER))
        living(store)
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            with pytest.raises(ConfigurationError, match="SQLSTATE 22012"):
                living(store)

    def test_upstoxs_word_does_not_take_the_mark_of_a_login_that_is_under_way(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store.backend.insert(made_up(store, USER))
        with store.backend.lock("-account-x"):
            store.backend.begin_login(None, "-account-x", store.backend.context.now(), {})
            with ThreadPoolExecutor(1) as thread, other.backend.lock(USER):
                doubtful = thread.submit(other.backend.find_in_doubt, USER).result()
                assert doubtful is not None
                other.backend.clear_doubt(doubtful)
                assert other.backend.find_in_doubt(USER) is not None
        other.backend.clear_doubt(doubtful)
        assert other.backend.find_in_doubt(USER) is None

    # The lock

    def test_a_login_that_comes_too_late_is_refused(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        def login_while_another_is_faster(_: str | None) -> AccessTokenData:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store.backend, "lock", lambda _: open_lock())
                store.store_token(USER)
            return token_data(USER)

        late = open_store(login=login_while_another_is_faster)
        with pytest.raises(LoginSuperseded):
            late.store_token(USER)
        assert [row["is_active"] for row in self.raw_rows()] == [True]
        assert living(store)["token"] != token_data(USER).access_token

    def test_a_token_is_stored_although_the_lock_was_lost_during_the_login(self, open_store: OpenStore) -> None:
        def login_while_the_session_dies(_: str | None) -> AccessTokenData:
            self.kill_who_holds_a_lock()
            return token_data(USER)

        store = open_store(login=login_while_the_session_dies)
        assert store.store_token(USER)["token"] == living(store)["token"]

    def test_a_caller_that_lost_its_lock_uses_another_connection_and_begins_no_login(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        with store.backend.lock(USER):
            self.kill_who_holds_a_lock()
            with pytest.raises(StoreUnavailable, match="that held the lock is gone"):
                store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.insert(made_up(store, USER))
            with open_store(login_wait=1).backend.lock(USER):
                pass
            with store.backend.lock("CD0001"), pytest.raises(StoreUnavailable, match="Waited"):
                open_store(login_wait=0.1).backend.lock("CD0001").__enter__()
        assert living(store)
        with store.backend.lock(USER):
            pass

    def test_a_caller_without_an_answer_goes_on_over_another_connection(self, open_store: OpenStore) -> None:
        store = open_store(timeout=0.5)
        assert isinstance(store, PostgreSQLUpstoxStorage)
        with store.backend.lock(USER):
            with pytest.raises(StoreUnavailable, match="no answer"):
                store.backend.connections.run("SELECT pg_sleep(5)")
            store.backend.insert(made_up(store, USER))
        assert living(store)

    def test_a_refused_statement_costs_nobody_the_lock(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        with store.backend.lock(USER):
            store.backend.insert(made_up(store, USER))
            with pytest.raises(LoginSuperseded):
                store.backend.insert(made_up(store, USER))
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            with pytest.raises(StoreUnavailable, match="Waited"):
                open_store(login_wait=0.1).backend.lock(USER).__enter__()

    def test_an_inner_lock_is_free_when_it_is_left(self, store: PostgreSQLUpstoxStorage, open_store: OpenStore) -> None:
        other = open_store(login_wait=0.1)
        with store.backend.lock("-account-x"):
            with store.backend.lock(USER):
                pass
            with other.backend.lock(USER), pytest.raises(StoreUnavailable, match="Waited"):
                other.backend.lock("-account-x").__enter__()

    def test_a_long_login_keeps_nothing_from_vacuum(self, store: PostgreSQLUpstoxStorage) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            asked = f"SELECT state, backend_xmin, backend_xid FROM pg_stat_activity WHERE pid IN ({HOLDERS})"
            assert bare(self.url, asked) == [
                {"state": "idle in transaction", "backend_xmin": None, "backend_xid": None}
            ]

    def test_a_child_locks_over_a_connection_of_its_own(self, store: PostgreSQLUpstoxStorage) -> None:
        def holders() -> list[Any]:
            return bare(self.url, HOLDERS)

        with store.backend.lock(USER):
            of_the_parent = holders()

        def child() -> bool:
            with store.backend.lock(USER):
                return holders() != of_the_parent

        assert forks.in_a_child(child) == "right"
        with store.backend.lock(USER):
            assert holders() == of_the_parent, "the parent's connection is kept for its next lock"

    def kill_who_holds_a_lock(self) -> None:
        bare(self.url, f"SELECT pg_terminate_backend(pid, 5000) FROM ({HOLDERS}) AS holders")


def open_lock() -> Any:
    return contextlib.nullcontext()
