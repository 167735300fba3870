"""Pools of SQLite connections, and a count of the connections that are open."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

from upstox_db_examples.core.pool import Pool

from ..support.processes import wait_until

Connection = sqlite3.Connection


class Opener:
    """Opens connections to a SQLite file, and counts how many are open."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.opened = self.open_now = self.most = 0
        self.fails = False
        self._all: list[Connection] = []

    def open(self) -> Connection:
        if self.fails:
            raise sqlite3.OperationalError("unable to open database file")
        with self._lock:
            self.opened += 1
            self.open_now += 1
            self.most = max(self.most, self.open_now)
        conn = sqlite3.connect(self._path, check_same_thread=False)
        self._all.append(conn)
        return conn

    def close_all(self) -> None:
        """Close every connection, also those that nobody holds after a Ctrl-C: Python 3.13 warns about open ones."""
        for conn in self._all:
            conn.close()

    def close(self, conn: Connection) -> None:
        with self._lock:
            self.open_now -= 1
        conn.close()

    def pool(self, size: int = 1, *, timeout: float = 10, **options: Any) -> Pool[Connection]:
        return Pool(self.open, self.close, size=size, timeout=timeout, **options)


def is_open(conn: Connection) -> bool:
    try:
        return bool(conn.execute("SELECT 1").fetchone())
    except sqlite3.ProgrammingError:
        return False


def wait_for(pool: Pool[Connection], waiting: int) -> None:
    wait_until(lambda: pool.waiting == waiting)
