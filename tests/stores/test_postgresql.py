"""PostgreSQL: the contract, one statement for each change, indexes and constraints."""

from __future__ import annotations

import dataclasses
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import psycopg2
import psycopg2.extras
import pytest

from upstox_db_examples import (
    LoginSuperseded,
    PostgreSQLUpstoxStorage,
    StorageError,
    StoreUnavailable,
    postgresql,
)
from upstox_db_examples.core.token import Secret, StoredToken
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.postgresql.prepared import message
from upstox_db_examples.postgresql.rows import read_token

from ..contracts.backend import made_up
from ..contracts.store import StoreContract
from ..support.postgresql import OnPostgreSQL, bare, count_messages
from ..support.processes import USER
from ..support.stores import living


class TestPostgreSQL(OnPostgreSQL, StoreContract):
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
        names = message(postgresql.queries.STORE).names
        assert len([sql for sql in messages if all(name in sql for name in names)]) == 1
        commits = "SELECT count(DISTINCT xmin::text) AS commits FROM upstox_token_audit WHERE token_id IS NOT NULL"
        assert bare(self.url, commits) == [{"commits": 2}], "created; then deactivated and created in one commit"

    def test_a_read_that_waits_for_a_new_token_gets_it(self, store: PostgreSQLUpstoxStorage) -> None:
        store.store_token()
        waiting = "SELECT count(*) AS waiting FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, account, metadata, access_token"
        replacement = store.cipher.replace_ciphertext(
            dataclasses.replace(self.active(), generation=2), Secret("eyJ0eXAi-new")
        )
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

    # Indexes

    @pytest.mark.slow
    def test_each_query_uses_an_index_with_many_old_tokens(self, store: PostgreSQLUpstoxStorage) -> None:
        fill(self.url, 50_000, store.backend.context.now())
        now = store.backend.context.now()
        values = {
            "user_id": USER, "now": now, "alive_after": now, "harmless": [], "note": None,
            "actor": "a", "limit": 10, "key_id": "k", "after": "",
            "account": "x", "action": "a", "reason": "{}", "metadata": "{}",
            "performed_at": now, "position": 0, "generation": 1, "key": 7, "mark": 0, "moment": now,
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
            # There are a few notes, and a few logins without a user id that are running.
            assert not re.search("Seq Scan on (?!upstox_login_notes)", plan), f"{name}\n{plan}"
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
        assert time.perf_counter() - begin < 1, "a scan of all rows would take longer"

    # Constraints

    def test_a_later_token_that_is_active_stays(self, store: PostgreSQLUpstoxStorage) -> None:
        store.backend.insert(made_up(store, USER, 5))
        with pytest.raises(LoginSuperseded):
            store.backend.insert(made_up(store, USER, 3))
        assert [(row["generation"], row["is_active"]) for row in self.raw_rows()] == [(5, True)]

    def test_another_unique_constraint_is_no_newer_login(self, store: PostgreSQLUpstoxStorage) -> None:
        bare(self.url, "CREATE UNIQUE INDEX one_for_each_email ON upstox_tokens (email)")
        store.backend.insert(dataclasses.replace(made_up(store, USER), email="someone@example.com"))
        another = dataclasses.replace(made_up(store, "CD0001"), email="someone@example.com")
        with pytest.raises(StoreUnavailable, match="The constraint one_for_each_email"):
            store.backend.insert(another)

    def active(self) -> StoredToken:
        (row,) = bare(self.url, f"SELECT {postgresql.HANDED_OUT} FROM upstox_tokens WHERE is_active")
        return read_token(row)

    def test_a_refused_audit_entry_refuses_the_token(self, store: PostgreSQLUpstoxStorage, upstox: LocalUpstox) -> None:
        store.store_token()
        bare(self.url, "ALTER TABLE upstox_token_audit ADD CHECK (action NOT IN ('used', 'login')) NOT VALID")
        with pytest.raises(StorageError):
            store.get_valid_token(USER)
        with pytest.raises(StorageError):
            store.store_token()
        assert upstox.attempts() == 1, "the store must not waste a login"
        assert store.get_user_statistics(USER)["total_usage"] == 0


def fill(url: str, count: int, now: datetime) -> None:
    """Insert the old tokens of a thousand users, as after years of use, and an active one for each user."""
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
