"""The SQLite part of the SDK's guide to database storage, rewritten with as few repairs as it needs to run.

Here and in guide_servers.py the tables, indexes, statements and connections are the guide's: tokens are plaintext, each
call opens a connection where the guide does so, and Redis is written before PostgreSQL. "Repaired:" marks each repair.
All five classes take the login as an argument, so that no request is made. Faults that do not stop the code from
running are still there.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from queue import Queue
from typing import Any

from upstox_totp.models import AccessTokenData

Login = Callable[[str | None], AccessTokenData]
DAY = timedelta(hours=24)


class GuideSQLite:
    """One file, which each call opens and closes."""

    def __init__(self, path: str, login: Login) -> None:
        self.path, self.login = path, login
        with self.connection() as conn:
            conn.execute("""
                CREATE TABLE IF NOT EXISTS upstox_tokens (
                    id INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, access_token TEXT NOT NULL,
                    user_name TEXT, email TEXT, broker TEXT, user_type TEXT, products TEXT, exchanges TEXT,
                    is_active BOOLEAN DEFAULT TRUE, created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
                    expires_at TIMESTAMP NOT NULL, metadata TEXT
                )""")
            conn.execute("CREATE INDEX IF NOT EXISTS idx_user_id_active ON upstox_tokens (user_id, is_active)")
            conn.execute("CREATE INDEX IF NOT EXISTS idx_expires_at ON upstox_tokens (expires_at)")
            conn.commit()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        conn = sqlite3.connect(self.path)
        conn.row_factory = sqlite3.Row
        try:
            yield conn
        finally:
            conn.close()

    def store_token(self, user_id: str | None = None) -> dict[str, Any]:
        data = self.login(user_id)
        expires_at = datetime.now() + DAY
        profile = {"is_active_user": data.is_active, "generation_method": "upstox_totp_sdk"}
        with self.connection() as conn:
            conn.execute(
                "UPDATE upstox_tokens SET is_active = FALSE WHERE user_id = ? AND is_active = TRUE", [data.user_id]
            )
            conn.execute(
                "INSERT INTO upstox_tokens (user_id, access_token, user_name, email, broker, user_type, products, "
                "exchanges, expires_at, metadata) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    data.user_id,
                    data.access_token,
                    data.user_name,
                    data.email,
                    data.broker,
                    data.user_type,
                    json.dumps(data.products),
                    json.dumps(data.exchanges),
                    # Repaired: Python 3.12 warns about a datetime as a parameter. This is the text that it would have
                    # become.
                    expires_at.isoformat(" "),
                    json.dumps(profile),
                ),
            )
            conn.commit()
        return {"token": data.access_token, "user_id": data.user_id, "expires_at": expires_at.isoformat()}

    def get_valid_token(self, user_id: str) -> dict[str, Any] | None:
        with self.connection() as conn:
            row = conn.execute(
                "SELECT access_token, expires_at, user_name FROM upstox_tokens WHERE user_id = ? AND is_active = TRUE "
                "AND expires_at > datetime('now', '+1 hour') ORDER BY created_at DESC LIMIT 1",
                (user_id,),
            ).fetchone()
        if row is None:
            return None
        return {"token": row["access_token"], "user_name": row["user_name"], "expires_at": row["expires_at"]}


class GuidePooled:
    """A queue of open connections. It stores tokens, and has no method that reads them."""

    def __init__(self, path: str, login: Login, pool_size: int = 5) -> None:
        self.login = login
        self.pool: Queue[sqlite3.Connection] = Queue(maxsize=pool_size)
        for _ in range(pool_size):
            conn = sqlite3.connect(path, check_same_thread=False)
            conn.row_factory = sqlite3.Row
            self.pool.put(conn)
        with self.connection() as conn:
            conn.execute("""
                CREATE TABLE IF NOT EXISTS upstox_tokens (
                    id INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, access_token TEXT NOT NULL,
                    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP, expires_at TIMESTAMP NOT NULL,
                    is_active BOOLEAN DEFAULT TRUE
                )""")
            conn.commit()

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        conn = self.pool.get()
        try:
            yield conn
        finally:
            self.pool.put(conn)

    def store_token_batch(self, user_ids: list[str]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        with self.connection() as conn:
            for user_id in user_ids:
                try:
                    # Repaired: each user logs in, instead of the same account again and again.
                    data = self.login(user_id)
                    # Repaired: datetime is imported, and converted to text before it becomes a parameter.
                    expires_at = (datetime.now() + DAY).isoformat(" ")
                    conn.execute(
                        "UPDATE upstox_tokens SET is_active = FALSE WHERE user_id = ? AND is_active = TRUE",
                        (data.user_id,),
                    )
                    row = conn.execute(
                        "INSERT INTO upstox_tokens (user_id, access_token, expires_at) VALUES (?, ?, ?) RETURNING id",
                        (data.user_id, data.access_token, expires_at),
                    ).fetchone()
                    results.append({"user_id": data.user_id, "token_id": row[0], "success": True})
                except Exception as error:
                    results.append({"user_id": user_id, "success": False, "error": str(error)})
            conn.commit()
        return results

    def close(self) -> None:
        while not self.pool.empty():
            self.pool.get().close()
