"""A PostgreSQL database for one test, and a record of what is sent to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import psycopg2.extras
import pytest

from upstox_db_examples import PostgreSQLUpstoxStorage, TokenStorage
from upstox_db_examples.postgresql.connections import PostgreSQLConnections

from .stores import Counts, OnAStore, OpenStore


class RowsInPostgreSQL(OnAStore):
    """Direct access to the rows, for every store that keeps its tokens in PostgreSQL."""

    @pytest.fixture(autouse=True)
    def _url(self, postgres_url: str) -> None:
        self.url = postgres_url

    def raw_rows(self) -> list[dict[str, Any]]:
        return bare(self.url, "SELECT * FROM upstox_tokens ORDER BY id")

    def write_raw(self, token_id: Any, **values: Any) -> None:
        for column, value in values.items():
            bare(self.url, f"UPDATE upstox_tokens SET {column} = %s WHERE id = %s", value, token_id)


class OnPostgreSQL(RowsInPostgreSQL):
    def connect(self, **options: Any) -> TokenStorage:
        return PostgreSQLUpstoxStorage(self.url, **options)

    @pytest.fixture
    def store(self, open_store: OpenStore) -> PostgreSQLUpstoxStorage:
        store = open_store()
        assert isinstance(store, PostgreSQLUpstoxStorage)
        return store


def bare(url: str, sql: str, *values: object, **named: object) -> list[dict[str, Any]]:
    """Run one statement with the bare driver, and return its rows."""
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
    """Record what the store sends from now on: one entry per round trip to the server."""
    messages: list[str] = []
    real = PostgreSQLConnections.answer

    def counted(self: PostgreSQLConnections, conn: Any, sql: str, **values: Any) -> Any:
        messages.append(sql)
        return real(self, conn, sql, **values)

    monkeypatch.setattr(PostgreSQLConnections, "answer", counted)
    return messages


@contextlib.contextmanager
def counting(url: str) -> Iterator[Callable[[], Counts]]:
    """Yield a function that counts the rows in the two tables, over one connection."""
    created = "SELECT token_id FROM upstox_token_audit WHERE action = 'created'"
    orphans = (
        f"SELECT (SELECT count(*) FROM upstox_tokens WHERE id NOT IN ({created})) + "
        f"(SELECT count(*) FROM ({created}) AS c WHERE token_id NOT IN (SELECT id FROM upstox_tokens)) AS orphans"
    )
    with contextlib.closing(psycopg2.connect(url)) as conn:
        conn.autocommit = True

        def counts() -> Counts:
            with conn.cursor() as cursor:
                cursor.execute(f"SELECT id, generation, is_active, ({orphans}) FROM upstox_tokens")
                rows = cursor.fetchall()
            active = [row[0] for row in rows if row[2]]
            return Counts(active, {row[0]: row[1] for row in rows}, rows[0][3] if rows else 0)

        yield counts


def counts(url: str) -> Counts:
    with counting(url) as count:
        return count()


def ask(url: str, sql: str = "SELECT 1") -> object:
    conn = psycopg2.connect(url, connect_timeout=5)
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]
    finally:
        conn.close()
