"""SQLite counts, for each connection, the changes that others have made to the file. Asking for the count is cheap."""

from __future__ import annotations

import time
from pathlib import Path

from ..core.listener import MOMENT, Listener
from .connections import SQLiteConnections
from .forks import Connection


class DataVersion(Listener):
    """Asks for the count ten times a second, which takes some millionths of a second each time.

    It has a connection of its own, because a connection does not count its own changes. Like all others, it is closed
    before a fork. A watch of the file system would need another way on each system, and would miss a shared memory.

    Args:
        path: the database file.
    """

    def __init__(self, path: Path) -> None:
        self._connections = SQLiteConnections(path)
        self._seen: tuple[Connection, int] | None = None

    def wait(self) -> bool:
        time.sleep(MOMENT)
        with self._connections.lend() as conn:
            version: int = conn.execute("PRAGMA data_version").fetchone()[0]
        before, self._seen = self._seen, (conn, version)
        # The counts of two connections cannot be compared.
        return before is None or before[0] is not conn or before[1] != version

    def close(self) -> None:
        self._connections.close()
