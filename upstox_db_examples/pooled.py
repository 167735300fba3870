"""Pattern 5: SQLite with a bounded pool of connections. Many threads, never more open files than you said."""

from __future__ import annotations

import logging
import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack, cast

from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from .checks import require_pool_size, require_positive
from .errors import StoreUnavailable
from .sqlite import SQLiteUpstoxStorage
from .sqlite_connections import SQLiteConnections, connected, explained
from .storage import Options

logger = logging.getLogger(__name__)


class PooledUpstoxStorage(SQLiteUpstoxStorage):
    """Tokens in a SQLite file, read and written through at most `pool_size` connections.

    `SQLiteUpstoxStorage` keeps as many connections as threads were ever busy at once. Here a thread that finds all
    of them in use waits, and is told so after `timeout`. The pool is SQLAlchemy's: a queue of one's own, as in the
    SDK's guide, waits for ever, and hands on the half-done transaction of the borrower before. Who holds a connection
    of `get_connection` and asks the store for something needs a second one.

    Args:
        db_path, audit_reads, options: as for `SQLiteUpstoxStorage`.
        pool_size: how many connections there are at the most. They are opened when first needed.
        timeout: seconds to wait for a free connection.

    Raises:
        InvalidInput: `pool_size` or `timeout` is not a positive number.
        ConfigurationError: the path cannot be used, or holds something else.
    """

    _connections: PooledConnections

    def __init__(
        self,
        db_path: str | os.PathLike[str] = "upstox.db",
        pool_size: int = 5,
        *,
        timeout: float = 5.0,
        audit_reads: bool = False,
        **options: Unpack[Options],
    ) -> None:
        require_pool_size(pool_size)
        require_positive("timeout", timeout)
        self.pool_size = pool_size
        self._timeout = timeout
        super().__init__(db_path, audit_reads=audit_reads, **options)

    def pool_status(self) -> dict[str, int]:
        """How the pool is used now.

        Returns:
            `size`: how many connections there can be. `in_use`: how many are borrowed. `idle`: how many were used and
            are free; one that saw an error is opened anew. `unopened`: how many were not needed so far.
        """
        in_use, idle = self._connections.pool.checkedout(), self._connections.pool.checkedin()
        return {"size": self.pool_size, "in_use": in_use, "idle": idle, "unopened": self.pool_size - in_use - idle}

    def _connections_to(self, path: Path) -> PooledConnections:
        return PooledConnections(path, self.pool_size, self._timeout)


class PooledConnections(SQLiteConnections):
    """A bounded number of them.

    Args:
        path: the database.
        size: how many there are at the most.
        timeout: seconds to wait for a free one.
    """

    def __init__(self, path: Path, size: int, timeout: float) -> None:
        super().__init__(path)
        self._size, self._timeout = size, timeout
        self.pool = self._new_pool()

    @contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """As `SQLiteConnections.lent`.

        Raises:
            StoreUnavailable: also if none came free in time.
        """
        try:
            borrowed = self._from_pool()
            try:
                yield cast(sqlite3.Connection, borrowed.dbapi_connection)
                borrowed.rollback()
                if self._closed:
                    borrowed.invalidate()
            except BaseException as error:
                logger.info("A connection to %s met %s and is not used again", self.path, type(error).__name__)
                borrowed.invalidate()  # It is closed, which rolls back, and the pool opens another when it needs one.
                raise
            finally:
                borrowed.close()  # back to the pool
        except PoolTimeout as error:
            raise StoreUnavailable(
                f"No connection to {self.path} came free for {self._timeout:g} s; pool_size is {self._size}. "
                "Hold connections for a shorter time, or use a larger pool_size."
            ) from error
        except sqlite3.Error as error:
            raise explained(error, self.path) from error

    def close(self) -> None:
        self._closed = True
        _dispose(self.pool, self._process)

    def _from_pool(self) -> Any:
        if self._process != os.getpid():
            # A forked child may not use the parent's connections, nor close them. The old pool's finalizer keeps them.
            self.pool, self._process = self._new_pool(), os.getpid()
        self.refuse_if_closed()
        return self.pool.connect()

    def _new_pool(self) -> QueuePool:
        path = self.path  # A pool that holds `self` would keep it from ever being found unused, and so itself.
        # What is left open is rolled back above, where an error can still be told; in the pool it would only be logged.
        pool = QueuePool(
            lambda: cast(Any, connected(path)),
            pool_size=self._size,
            max_overflow=0,
            timeout=self._timeout,
            use_lifo=True,
            reset_on_return=None,
        )
        weakref.finalize(self, _dispose, pool, os.getpid())
        return pool


def _dispose(pool: QueuePool, process: int) -> None:
    if os.getpid() == process:
        pool.dispose()
