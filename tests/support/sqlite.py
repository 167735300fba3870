"""A SQLite file for one test, which the test can also open with the bare driver."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import SQLiteUpstoxStorage, TokenStorage

from .stores import Counts, OnAStore, OpenStore


class OnASQLiteFile(OnAStore):
    """A store on a SQLite file: the plain one or the pooled one."""

    counted = {"audit_reads": True}

    @pytest.fixture(autouse=True)
    def _file(self, path: Path) -> None:
        self.file = path

    def raw_rows(self) -> list[dict[str, Any]]:
        with bare(self.file) as conn:
            return [dict(row) for row in conn.execute("SELECT * FROM upstox_tokens ORDER BY id")]

    def write_raw(self, token_id: Any, **values: Any) -> None:
        with bare(self.file) as conn:
            for column, value in values.items():
                raw = int(value.timestamp()) if isinstance(value, datetime) else value
                conn.execute(f"UPDATE upstox_tokens SET {column} = ? WHERE id = ?", (raw, token_id))


class OnSQLite(OnASQLiteFile):
    def connect(self, **options: Any) -> TokenStorage:
        return SQLiteUpstoxStorage(self.file, **options)

    @pytest.fixture
    def store(self, open_store: OpenStore) -> SQLiteUpstoxStorage:
        store = open_store()
        assert isinstance(store, SQLiteUpstoxStorage)
        return store


def counts(path: Path) -> Counts:
    with bare(path) as conn:
        active = [row["id"] for row in conn.execute("SELECT id FROM upstox_tokens WHERE is_active ORDER BY id")]
        ids = [row["id"] for row in conn.execute("SELECT id FROM upstox_tokens")]  # ids only grow
        created = "SELECT token_id FROM upstox_token_audit WHERE action = 'created'"
        orphans = conn.execute(
            f"SELECT (SELECT count(*) FROM upstox_tokens WHERE id NOT IN ({created})) + "
            f"(SELECT count(*) FROM ({created}) WHERE token_id NOT IN (SELECT id FROM upstox_tokens))"
        ).fetchone()[0]
    return Counts(active, dict(zip(ids, ids, strict=True)), orphans)


@contextlib.contextmanager
def bare(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file with the bare driver, in autocommit mode."""
    conn = sqlite3.connect(path, isolation_level=None, timeout=30)
    conn.row_factory = sqlite3.Row
    try:
        yield conn
    finally:
        conn.close()
