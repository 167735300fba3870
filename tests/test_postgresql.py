"""PostgreSQL: the contract, and what is PostgreSQL's own."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import psycopg2.extras
import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    KeyRing,
    LoginSuperseded,
    PostgreSQLUpstoxStorage,
    StorageError,
    StoreUnavailable,
    TokenStorage,
    postgresql,
)
from upstox_db_examples.core.token import Secret, StoredToken
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.servers import PostgreSQLServer
from upstox_db_examples.local.upstox import LocalUpstox

from .backend_contract import made_up
from .conftest import Clock, shown_with_locals
from .contract import OpenStore, StoreContract, living
from .faults import ServerContract
from .processes import USER, Address, made_up_login, token_data
from .reliability import Counts, ReliabilityContract


class PostgreSQLOfTheFirstSchema(PostgreSQLUpstoxStorage):
    _steps = PostgreSQLUpstoxStorage._steps[:1]


class TestPostgreSQL(StoreContract):
    @pytest.fixture(autouse=True)
    def _url(self, postgres_url: str) -> None:
        self.url = postgres_url

    def connect(self, **options: Any) -> TokenStorage:
        return PostgreSQLUpstoxStorage(self.url, **options)

    def raw_rows(self) -> list[dict[str, Any]]:
        return bare(self.url, "SELECT * FROM upstox_tokens ORDER BY id")

    def write_raw(self, token_id: Any, **values: Any) -> None:
        for column, value in values.items():
            bare(self.url, f"UPDATE upstox_tokens SET {column} = %s WHERE id = %s", value, token_id)

    @pytest.fixture
    def store(self, open_store: OpenStore) -> PostgreSQLUpstoxStorage:
        store = open_store()
        assert isinstance(store, PostgreSQLUpstoxStorage)
        return store

    # One statement

    def test_a_read_with_its_count_and_audit_is_one_round_trip(
        self, store: PostgreSQLUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        messages = count_messages(monkeypatch)
        living(store)
        assert len(messages) == 1

    def test_a_store_is_one_message_and_one_transaction(
        self, store: PostgreSQLUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        messages = count_messages(monkeypatch)
        store.store_token()
        assert len([sql for sql in messages if "INSERT INTO upstox_tokens" in sql]) == 1
        commits = "SELECT count(DISTINCT xmin::text) AS commits FROM upstox_token_audit WHERE token_id IS NOT NULL"
        assert bare(self.url, commits) == [{"commits": 2}], "created; then deactivated and created together"

    def test_a_read_that_waits_for_a_new_token_gets_it(self, store: PostgreSQLUpstoxStorage) -> None:
        store.store_token()
        waiting = "SELECT count(*) AS waiting FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, account, metadata, access_token"
        replacement = store._encrypt(Secret("eyJ0eXAi-new"), dataclasses.replace(self.active(), generation=2))
        with ThreadPoolExecutor(1) as thread, store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute(f"CREATE TEMP TABLE old AS SELECT {columns} FROM upstox_tokens")
            cursor.execute("UPDATE upstox_tokens SET is_active = false, access_token = NULL")
            cursor.execute(f"INSERT INTO upstox_tokens (generation, {columns}) SELECT 2, {columns} FROM old")
            cursor.execute("UPDATE upstox_tokens SET access_token = %s WHERE is_active", (replacement.ciphertext,))
            read = thread.submit(living, store)
            while not bare(self.url, waiting)[0]["waiting"]:
                time.sleep(0.01)
            conn.commit()
            assert read.result()["token"] == "eyJ0eXAi-new"

    # Marks

    def test_a_login_that_waits_for_a_new_token_marks_it(self, store: PostgreSQLUpstoxStorage) -> None:
        store._insert(made_up(store, USER))
        waiting = "SELECT count(*) AS waiting FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, metadata"
        with ThreadPoolExecutor(1) as thread, store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute("UPDATE upstox_tokens SET is_active = false, access_token = NULL")
            new = f"INSERT INTO upstox_tokens (generation, access_token, {columns}) SELECT 2, 'x', {columns}"
            cursor.execute(f"{new} FROM upstox_tokens")
            begun = thread.submit(store._begin_login, USER, USER, store._now(), {})
            while not bare(self.url, waiting)[0]["waiting"]:
                time.sleep(0.01)
            conn.commit()
            begun.result()
        assert [row["login_lock"] is None for row in self.raw_rows()] == [True, False]

    def test_the_next_holder_of_the_lock_is_not_taken_for_the_login_that_died(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        store._insert(made_up(store, USER))
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
        with store._lock(USER):
            assert open_store().get_valid_token(USER) is None

    def test_readers_of_a_token_in_doubt_do_not_take_each_other_for_its_login(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        store._insert(made_up(store, USER))
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
        stop = threading.Event()

        def lock_on_and_on() -> None:
            other = open_store()
            while not stop.is_set():
                with other._lock(USER):
                    pass

        with ThreadPoolExecutor(5) as threads:
            locking = threads.submit(lock_on_and_on)
            found = list(threads.map(lambda _: store.get_valid_token(USER), range(200)))
            stop.set()
            locking.result()
        assert found == [None] * 200

    def test_a_login_itself_still_reads_the_token_that_it_may_replace(self, store: PostgreSQLUpstoxStorage) -> None:
        store._insert(made_up(store, USER))
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            assert living(store)["token"]

    def test_a_read_of_a_marked_token_is_one_round_trip_too(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store._insert(made_up(store, USER))
        other = open_store()
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            messages = count_messages(monkeypatch)
            living(other)
            assert len(messages) == 1

    def test_no_lock_is_looked_at_for_a_token_without_a_mark(
        self, store: PostgreSQLUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked = "login_lock / 0"  # fails wherever it is looked at
        monkeypatch.setattr(
            postgresql.queries,
            "USE",
            postgresql.USE.replace("pg_try_advisory_xact_lock_shared(login_lock)", f"({looked}) = 1"),
        )
        store._insert(made_up(store, USER))
        living(store)
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            with pytest.raises(StoreUnavailable):
                living(store)

    def test_upstoxs_word_does_not_take_the_mark_of_a_login_that_is_under_way(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store._insert(made_up(store, USER))
        with store._lock("-account-x"):
            store._begin_login(None, "-account-x", store._now(), {})
            with ThreadPoolExecutor(1) as thread, other._lock(USER):
                doubtful = thread.submit(other._in_doubt, USER).result()
                assert doubtful is not None
                other._clear_doubt(doubtful)
                assert other._in_doubt(USER) is not None
        other._clear_doubt(doubtful)
        assert other._in_doubt(USER) is None

    def test_two_logins_that_mark_everybody_do_not_wait_for_each_other(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        for number in range(50):
            store._insert(made_up(store, f"CD{number:04}"))

        def mark_all(name: str) -> None:
            other = open_store()
            for _ in range(10):
                with other._lock(name):
                    other._begin_login(None, name, other._now(), {})
                    other._end_login(name, in_doubt=False)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(mark_all, [f"-account-{number}" for number in range(4)]))
        assert {row["login_lock"] for row in self.raw_rows()} == {None}

    # Constraints

    def test_a_later_token_that_is_active_stays(self, store: PostgreSQLUpstoxStorage) -> None:
        store._insert(made_up(store, USER, 5))
        with pytest.raises(LoginSuperseded):
            store._insert(made_up(store, USER, 3))
        assert [(row["generation"], row["is_active"]) for row in self.raw_rows()] == [(5, True)]

    def test_another_unique_constraint_is_no_newer_login(self, store: PostgreSQLUpstoxStorage) -> None:
        bare(self.url, "CREATE UNIQUE INDEX one_for_each_email ON upstox_tokens (email)")
        store._insert(dataclasses.replace(made_up(store, USER), email="someone@example.com"))
        another = dataclasses.replace(made_up(store, "CD0001"), email="someone@example.com")
        with pytest.raises(StoreUnavailable, match="The constraint one_for_each_email"):
            store._insert(another)

    def active(self) -> StoredToken:
        (row,) = bare(self.url, f"SELECT {postgresql.HANDED_OUT} FROM upstox_tokens WHERE is_active")
        return postgresql.store._token(row)

    def test_a_refused_audit_entry_refuses_the_token(self, store: PostgreSQLUpstoxStorage, upstox: LocalUpstox) -> None:
        store.store_token()
        bare(self.url, "ALTER TABLE upstox_token_audit ADD CHECK (action NOT IN ('used', 'login')) NOT VALID")
        with pytest.raises(StorageError):
            store.get_valid_token(USER)
        with pytest.raises(StorageError):
            store.store_token()
        assert upstox.attempts() == 1, "no login was spent"
        assert store.get_user_statistics(USER)["total_usage"] == 0

    # The schema

    def test_a_user_type_that_upstox_adds_later_is_kept(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda _: token_data(USER).model_copy(update={"user_type": "a_new_kind_of_user"}))
        store.store_token()
        assert self.raw_rows()[0]["user_type"] == "a_new_kind_of_user"

    def test_many_can_make_the_schema_at_once(self, open_store: OpenStore) -> None:
        with ThreadPoolExecutor(8) as threads:
            stores = list(threads.map(lambda _: open_store(), range(8)))
        assert stores[0].store_token()["token"] == living(stores[7])["token"]

    def test_an_older_schema_is_taken_forward_and_a_later_one_is_refused(self, store: PostgreSQLUpstoxStorage) -> None:
        class Later(PostgreSQLUpstoxStorage):
            _steps = (*PostgreSQLUpstoxStorage._steps, "ALTER TABLE upstox_tokens ADD COLUMN colour text")

        store.store_token()
        with Later(self.url):
            assert self.raw_rows()[0]["colour"] is None
        with pytest.raises(ConfigurationError, match=r"schema version 3, but this package knows 2. Upgrade it"):
            PostgreSQLUpstoxStorage(self.url)

    def test_the_first_schema_is_taken_forward_with_the_token_in_it(
        self, open_store: OpenStore, another_postgres_url: str
    ) -> None:
        PostgreSQLOfTheFirstSchema(self.url).close()
        of_the_first, self.url = self.url, another_postgres_url
        token = made_up(open_store(), USER)
        self.url = of_the_first
        bare(
            self.url,
            "INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, products, exchanges, created_at, "
            "expires_at, metadata) VALUES (%(user_id)s, %(ciphertext)s, %(key_id)s, 1, '[]', '[]', %(created_at)s, "
            "%(expires_at)s, '{}')",
            user_id=token.user_id,
            ciphertext=token.ciphertext,
            key_id=token.key_id,
            created_at=token.created_at,
            expires_at=token.expires_at,
        )
        store = open_store()
        assert living(store)["token"] == f"a token of {USER}, number 1"
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
        assert store.get_valid_token(USER) is None
        assert bare(self.url, "SELECT version FROM upstox_schema") == [{"version": 2}]

    def test_a_step_that_fails_leaves_the_schema_as_it_was(self, store: PostgreSQLUpstoxStorage) -> None:
        class Broken(PostgreSQLUpstoxStorage):
            _steps = (
                *PostgreSQLUpstoxStorage._steps,
                "ALTER TABLE upstox_tokens ADD COLUMN colour text; SELECT nonsense",
            )

        with pytest.raises(StorageError):
            Broken(self.url)
        assert store.store_token()
        assert "colour" not in self.raw_rows()[0]

    def test_tables_of_another_program_are_refused_and_left_alone(self, postgres_url: str) -> None:
        bare(postgres_url, "CREATE TABLE upstox_tokens (id serial, access_token text)")
        with pytest.raises(ConfigurationError, match="made by another program"):
            PostgreSQLUpstoxStorage(postgres_url)

    def test_the_database_itself_refuses_a_second_active_token(self, store: PostgreSQLUpstoxStorage) -> None:
        store.store_token()
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, metadata"
        with pytest.raises(psycopg2.errors.UniqueViolation, match="one_active_token"):
            bare(
                self.url,
                f"INSERT INTO upstox_tokens (generation, access_token, {columns}) "
                f"SELECT 99, 'x', {columns} FROM upstox_tokens",
            )

    def test_a_login_that_comes_too_late_is_refused(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        def login_while_another_is_faster(_: str | None) -> AccessTokenData:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store, "_lock", lambda _: open_lock())
                store.store_token(USER)
            return token_data(USER)

        late = open_store(login=login_while_another_is_faster)
        with pytest.raises(LoginSuperseded):
            late.store_token(USER)
        assert [row["is_active"] for row in self.raw_rows()] == [True]
        assert living(store)["token"] != token_data(USER).access_token

    @pytest.mark.slow
    def test_each_query_uses_an_index_with_a_million_old_tokens(self, store: PostgreSQLUpstoxStorage) -> None:
        fill(self.url, 1_000_000, store._now())
        values = {
            "user_id": USER, "now": store._now(), "alive_after": store._now(), "actor": "a", "limit": 10, "key_id": "k",
            "account": "x", "action": "a", "reason": "{}", "metadata": "{}",
            "performed_at": store._now(), "position": 0, "generation": 1, "key": 7, "mark": 0, "moment": store._now(),
            "process": "p",
        }  # fmt: skip
        for name in (
            "USE",
            "ERASE",
            "EXPIRE",
            "HISTORY",
            "STATISTICS",
            "AUDIT",
            "NEWEST",
            "OF_ACCOUNT",
            "USE_UNMARKED",
            "ERASE_EARLIER",
            "IN_DOUBT",
            "CLEAR_DOUBT",
            "MARK",
            "MARK_ALL",
            "UNMARK",
            "LOGINS_SINCE",
            "OTHER_KEYS",
            "TOKENS_OF",
            "ENTRIES_OF",
        ):
            statements = getattr(postgresql, name).removeprefix(f"\n{postgresql.RECORD};").split(";")
            rows = [row for sql in statements for row in bare(self.url, f"EXPLAIN {sql}", **values)]
            plan = "\n".join(row["QUERY PLAN"] for row in rows)
            assert "Seq Scan" not in plan, f"{name}\n{plan}"
            assert "Index" in plan, f"{name}\n{plan}"
            if name in ("USE", "ERASE", "USE_UNMARKED", "ERASE_EARLIER", "IN_DOUBT", "MARK"):
                assert "one_active_token" in plan, plan
            if name == "LOGINS_SINCE":
                assert "using logins" in plan, plan
            if name == "EXPIRE":
                assert "ciphertext_by_expiry" in plan, plan
        store.store_token()
        begin = time.perf_counter()
        living(store)
        assert time.perf_counter() - begin < 1, "a scan of a million rows would take longer"

    # Who may do what

    def test_the_runtime_role_stores_and_reads_and_cannot_touch_the_audit_trail(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore, clock: Clock
    ) -> None:
        role = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            store.init_database(runtime_role=role)
            url = as_role(self.url, role, "secret")
            owner_url, self.url = self.url, url
            runtime = open_store()
            self.url = owner_url
            first = runtime.store_token()
            assert living(runtime)["token"] == first["token"]
            runtime.store_token()
            runtime.revoke_token(USER)
            runtime.rotate_keys()
            runtime.store_token()
            clock.set(7, 3, 30)
            assert runtime.cleanup_expired_tokens() == 1
            assert len(runtime.get_audit_trail(USER)) > 5
            for forbidden in (
                "DELETE FROM upstox_token_audit",
                "UPDATE upstox_token_audit SET actor = 'nobody'",
                "TRUNCATE upstox_token_audit",
                "DROP TABLE upstox_token_audit",
                "ALTER TABLE upstox_token_audit DISABLE TRIGGER ALL",
                "DELETE FROM upstox_tokens",
                "UPDATE upstox_tokens SET user_id = 'XX0001'",
                "UPDATE upstox_tokens SET expires_at = now() + interval '1 year'",
                "DROP TABLE upstox_tokens",
                "UPDATE upstox_schema SET version = 0",
            ):
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    bare(url, forbidden)
        finally:
            bare(self.url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    def test_a_runtime_role_is_told_who_takes_an_older_schema_forward_and_how(self) -> None:
        role = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            with PostgreSQLOfTheFirstSchema(self.url) as owner:
                grants = "GRANT SELECT ON upstox_schema, upstox_tokens TO {role}"
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(postgresql.queries, "GRANTS", grants)
                    owner.init_database(runtime_role=role)
            runtime = as_role(self.url, role, "secret")
            with pytest.raises(ConfigurationError, match=f"owner: upstox-db init --runtime-role {role}$"):
                PostgreSQLUpstoxStorage(runtime)
            assert bare(self.url, "SELECT version FROM upstox_schema") == [{"version": 1}]
            PostgreSQLUpstoxStorage(self.url).init_database(runtime_role=role)
            PostgreSQLUpstoxStorage(runtime).close()
        finally:
            bare(self.url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    def test_a_role_with_an_odd_name_is_quoted(self, store: PostgreSQLUpstoxStorage) -> None:
        with pytest.raises(ConfigurationError, match="does not know that role"):
            store.init_database(runtime_role='x"; DROP TABLE upstox_tokens; --%s')
        assert self.raw_rows() == []

    # Connections

    def test_a_pool_that_is_too_small_says_so_in_time(self, open_store: OpenStore) -> None:
        store = open_store(pool_size=1, timeout=0.5)
        assert isinstance(store, PostgreSQLUpstoxStorage)
        with store._connections.session():
            begin = time.monotonic()
            with ThreadPoolExecutor(1) as thread, pytest.raises(StoreUnavailable, match="pool_size"):
                thread.submit(store.get_valid_token, USER).result()
            assert 0.5 <= time.monotonic() - begin < 0.75 + 0.5
        assert store.get_valid_token(USER) is None

    def test_a_crowd_of_threads_gets_by_with_a_small_pool(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        store = open_store(pool_size=2)
        with ThreadPoolExecutor(32) as threads:
            tokens = {result["token"] for result in threads.map(store.get_or_create_token, [USER] * 64)}
        assert len(tokens) == 1
        assert upstox.logins() == 1

    def test_logins_of_several_users_at_once_reuse_their_connections(self, open_store: OpenStore) -> None:
        everybody = [f"CD{n:04}" for n in range(4)]
        barrier = threading.Barrier(4)

        def log_in_together(user_id: str | None) -> AccessTokenData:
            barrier.wait(10)
            return token_data(user_id or USER)

        def backends() -> set[Any]:
            mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            return {row["pid"] for row in bare(self.url, mine)}

        store = open_store(login=log_in_together)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(store.store_token, everybody))
            before = backends()
            list(threads.map(store.store_token, everybody))
        assert backends() == before
        assert len(before) >= 4

    def test_backends_that_were_killed_are_replaced_silently(self, store: PostgreSQLUpstoxStorage) -> None:
        token = store.store_token()["token"]
        with ThreadPoolExecutor(5) as threads:
            list(threads.map(lambda _: living(store), range(20)))
        bare(
            self.url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        time.sleep(0.2)
        assert living(store)["token"] == token

    def test_a_token_is_stored_although_the_lock_was_lost_during_the_login(self, open_store: OpenStore) -> None:
        def login_while_the_session_dies(_: str | None) -> AccessTokenData:
            self.kill_who_holds_a_lock()
            return token_data(USER)

        store = open_store(login=login_while_the_session_dies)
        assert store.store_token(USER)["token"] == living(store)["token"]

    def test_who_has_lost_the_lock_goes_on_by_another_connection_and_begins_no_login(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        with store._lock(USER):
            self.kill_who_holds_a_lock()
            with pytest.raises(StoreUnavailable, match="that held the lock is gone"):
                store._begin_login(USER, USER, store._now(), {})
            store._insert(made_up(store, USER))
            with open_store(login_wait=1)._lock(USER):
                pass
            with store._lock("CD0001"), pytest.raises(StoreUnavailable, match="Waited"):
                open_store(login_wait=0.1)._lock("CD0001").__enter__()
        assert living(store)
        with store._lock(USER):
            pass

    def test_who_got_no_answer_in_time_goes_on_by_another_connection(self, open_store: OpenStore) -> None:
        store = open_store(timeout=0.5)
        assert isinstance(store, PostgreSQLUpstoxStorage)
        with store._lock(USER):
            with pytest.raises(StoreUnavailable, match="no answer"):
                store._run("SELECT pg_sleep(5)")
            store._insert(made_up(store, USER))
        assert living(store)

    def test_a_refused_statement_costs_nobody_the_lock(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore
    ) -> None:
        with store._lock(USER):
            store._insert(made_up(store, USER))
            with pytest.raises(LoginSuperseded):
                store._insert(made_up(store, USER))
            store._begin_login(USER, USER, store._now(), {})
            with pytest.raises(StoreUnavailable, match="Waited"):
                open_store(login_wait=0.1)._lock(USER).__enter__()

    def test_an_inner_lock_is_free_when_it_is_left(self, store: PostgreSQLUpstoxStorage, open_store: OpenStore) -> None:
        other = open_store(login_wait=0.1)
        with store._lock("-account-x"):
            with store._lock(USER):
                pass
            with other._lock(USER), pytest.raises(StoreUnavailable, match="Waited"):
                other._lock("-account-x").__enter__()

    def kill_who_holds_a_lock(self) -> None:
        bare(
            self.url,
            "SELECT pg_terminate_backend(pid, 5000) FROM (SELECT DISTINCT pid FROM pg_locks "
            "WHERE locktype = 'advisory' AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())) AS holders",
        )

    def test_the_guides_connection_is_an_ordinary_one(self, store: PostgreSQLUpstoxStorage) -> None:
        with store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute("CREATE TABLE mine (x int)")
            conn.commit()
        with pytest.raises(StorageError), store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute("SELECT nonsense")
        assert conn.closed

    @pytest.mark.parametrize(
        "bad", ["", "postgresql://user:hunter2hunter2@host:port/db", "password=hunter2hunter2 nonsense", None]
    )
    def test_a_bad_connection_string_is_refused_without_showing_it(self, bad: Any) -> None:
        with pytest.raises(StorageError) as caught:
            PostgreSQLUpstoxStorage(bad, timeout=1)
        assert "hunter2" not in shown_with_locals(caught.value)

    def test_a_first_host_that_gives_no_answer_is_passed_over(self, open_store: OpenStore) -> None:
        parts = urlsplit(self.url)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # as a machine that was switched off
            dead, alive = f"127.0.0.1:{silent.getsockname()[1]}", f"{parts.hostname}:{parts.port}"
            user = parts.netloc.rpartition("@")[0]
            self.url = urlunsplit(parts._replace(netloc=f"{user}@{dead},{alive}"))
            store = open_store(timeout=2)
            assert store.store_token()["token"] == living(store)["token"]

    def test_a_wrong_password_is_said_and_not_shown(self) -> None:
        wrong = as_role(self.url, "postgres", "hunter2hunter2")
        with pytest.raises(ConfigurationError, match="refused the role or its password") as caught:
            PostgreSQLUpstoxStorage(wrong)
        assert "hunter2" not in shown_with_locals(caught.value)


class TestPostgreSQLUnderCrowdsAndKills(ReliabilityContract):
    # 32 processes with a connection of the pool and one for a lock each: a server takes a hundred of them.
    in_a_crowd = {"pool_size": 1, "timeout": 60.0}

    @pytest.fixture
    def address(self, postgres_url: str) -> Address:
        PostgreSQLUpstoxStorage(postgres_url).close()
        return Address("upstox_db_examples:PostgreSQLUpstoxStorage", (postgres_url,))

    @pytest.fixture
    def count(self, postgres_url: str) -> Callable[[], Counts]:
        created = "SELECT token_id FROM upstox_token_audit WHERE action = 'created'"
        orphans = (
            f"SELECT (SELECT count(*) FROM upstox_tokens WHERE id NOT IN ({created})) + "
            f"(SELECT count(*) FROM ({created}) AS c WHERE token_id NOT IN (SELECT id FROM upstox_tokens)) AS orphans"
        )

        def counted() -> Counts:
            rows = bare(postgres_url, "SELECT id, generation, is_active FROM upstox_tokens")
            active = [row["id"] for row in rows if row["is_active"]]
            generations = {row["id"]: row["generation"] for row in rows}
            return Counts(active, generations, bare(postgres_url, orphans)[0]["orphans"])

        return counted


class TestAServerThatFails(ServerContract):
    kind, name = PostgreSQLServer, "postgresql"

    def connect(self, url: str, **options: Any) -> TokenStorage:
        return PostgreSQLUpstoxStorage(url, **options)


def test_tls_is_verified_and_a_wrong_authority_is_refused(
    tmp_path: Path, keys: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POSTGRES_URL", raising=False)
    with PostgreSQLServer(tls=True) as server:
        verified = f"{server.url}?sslmode=verify-full&sslrootcert="
        with PostgreSQLUpstoxStorage(f"{verified}{server.ca_file}", login=made_up_login, keys=keys) as store:
            store.store_token(USER)
            with store._connections.session() as conn:
                assert conn.info.ssl_in_use
        wrong_authority, _, _ = make_certificates(tmp_path)
        wrong_host = verified.replace("127.0.0.1", "another.name") + f"{server.ca_file}&hostaddr=127.0.0.1"
        for refused in (f"{verified}{wrong_authority}", wrong_host):
            with pytest.raises(ConfigurationError, match="failed the TLS check"):
                PostgreSQLUpstoxStorage(refused)


def bare(url: str, sql: str, *values: object, **named: object) -> list[dict[str, Any]]:
    """One statement by the bare driver."""
    conn = psycopg2.connect(url, cursor_factory=psycopg2.extras.RealDictCursor)
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute(sql, values or named or None)
            return [dict(row) for row in cursor.fetchall()] if cursor.description else []
    finally:
        conn.close()


def as_role(url: str, role: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{role}:{password}@{parts.hostname}:{parts.port}"))


def count_messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the store sends from now on: one entry for each message to the server and its answer."""
    messages: list[str] = []
    real = psycopg2.extras.RealDictCursor.execute

    def counted(cursor: Any, query: str, vars: Any = None) -> Any:
        messages.append(query)
        return real(cursor, query, vars)

    monkeypatch.setattr(psycopg2.extras.RealDictCursor, "execute", counted)
    return messages


def open_lock() -> Any:
    return contextlib.nullcontext()


def fill(url: str, count: int, now: datetime) -> None:
    """Old tokens of a thousand users, as years of use leave them, and a living one of each."""
    bare(
        url,
        "INSERT INTO upstox_tokens (user_id, key_id, generation, products, exchanges, is_active, created_at, "
        "expires_at, account, metadata) "
        "SELECT 'U' || n %% 1000, 'k', n, '[]', '[]', false, now(), now(), 'a' || n %% 1000, '{}' "
        "FROM generate_series(1, %s) AS n",
        count,
    )
    bare(
        url,
        "UPDATE upstox_tokens SET is_active = true, access_token = 'x', expires_at = %s + interval '1 day' "
        "WHERE generation <= 1000",
        now,
    )
    bare(
        url,
        "INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at) "
        "SELECT id, user_id, 'created', 'tests', created_at FROM upstox_tokens",
    )
    conn = psycopg2.connect(url)
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")
    conn.close()
