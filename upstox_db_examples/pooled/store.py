"""Pattern 5: SQLite with a bounded pool of connections. Many threads never open more files than you allow."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Unpack

from ..core.checks import require_pool_size, require_positive
from ..core.errors import StorageError, StoreUnavailable
from ..core.pool import Pool, PoolClosed, PoolTimeout
from ..core.settings import Options, Settings
from ..sqlite.connections import SQLiteConnections, hide_path, open_connection, resolve_path, translate_error
from ..sqlite.forks import Connection, is_pending
from ..sqlite.store import SQLiteUpstoxStorage

logger = logging.getLogger(__name__)


class PooledUpstoxStorage(SQLiteUpstoxStorage):
    """Tokens in a SQLite file, read and written through at most `pool_size` connections.

    `SQLiteUpstoxStorage` opens one connection for each thread that is busy at the same time. Here, if all connections
    are in use, a thread waits for its turn and gets an error after `timeout`. (A plain queue, as in the SDK's guide,
    waits for ever, and passes on the previous borrower's unfinished transaction.) A thread that holds a connection from
    `get_connection` needs a second one when it calls the store.

    Args:
        db_path, audit_reads, options: as for `SQLiteUpstoxStorage`.
        pool_size: the maximum number of connections. They are opened when first needed.
        timeout: seconds to wait for a free connection.

    Raises:
        InvalidInput: `pool_size` or `timeout` is not a positive number.
        ConfigurationError: the path cannot be used, or the file holds something else.

    Example:
        >>> from upstox_db_examples import PooledUpstoxStorage
        >>> with PooledUpstoxStorage("upstox.db", pool_size=3) as storage:
        ...     result = storage.get_or_create_token("AB1234")
        ...     with storage.get_connection():
        ...         storage.pool_status()
        {'size': 3, 'in_use': 1, 'idle': 0, 'unopened': 2}
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] = "upstox.db",
        pool_size: int = 5,
        *,
        timeout: float = 5.0,
        audit_reads: bool = False,
        **options: Unpack[Options],
    ) -> None:
        place = hide_path(db_path)
        del db_path
        require_pool_size(pool_size)
        require_positive("timeout", timeout)
        settings = Settings(type(self).__name__, options)
        connections = PooledConnections(resolve_path(place, create=settings.create), pool_size, timeout)
        self.pool_size, self._pool = pool_size, connections.pool
        self._open(connections, settings, audit_reads)

    def pool_status(self) -> dict[str, int]:
        """Tell how the pool is used now.

        Returns:
            `size`: how many connections there can be. `in_use`: how many are borrowed. `idle`: how many are open and
            free. `unopened`: how many are not open, because nobody needed them yet or they saw an error.
        """
        in_use, idle = self._pool.counts()
        return {"size": self.pool_size, "in_use": in_use, "idle": idle, "unopened": self.pool_size - in_use - idle}


class PooledConnections(SQLiteConnections):
    """A bounded number of connections.

    Args:
        path: the database.
        size: the maximum number of connections.
        timeout: seconds to wait for a free one.
    """

    def __init__(self, path: Path, size: int, timeout: float) -> None:
        super().__init__(path)
        self._timeout = timeout
        self.pool = Pool(lambda: open_connection(path), Connection.close, size=size, timeout=timeout)

    def lend(self, *, translate: bool = True) -> AbstractContextManager[Connection]:
        """Lend a connection, as `SQLiteConnections.lend` does.

        Raises:
            StoreUnavailable: also if no connection became free in time.
        """
        return _Borrowed(self, translate)

    def close(self) -> None:
        self._closed = True
        self.pool.close()

    def close_idle(self) -> None:
        self.pool.close_idle()

    def count_idle(self) -> int:
        return self.pool.counts()[1]

    def _read(self, sql: str, values: tuple[object, ...]) -> list[sqlite3.Row]:
        self.refuse_if_closed()
        self.refuse_another_file()
        try:
            with self.pool.borrow() as conn:
                conn.thread = threading.get_ident()
                rows = conn.execute(sql, values).fetchall()
                conn.thread = None
        except (PoolTimeout, PoolClosed) as error:
            raise self.translate_error(error) from error
        return rows

    def translate_error(self, error: PoolTimeout | PoolClosed | sqlite3.Error) -> StorageError:
        """Translate this error into one of ours."""
        if isinstance(error, PoolClosed):
            return StoreUnavailable("This store is closed.")
        if isinstance(error, PoolTimeout):
            return StoreUnavailable(
                f"No connection to {self.path} was free for {self._timeout:g} s; pool_size is {self.pool.size}. "
                "Return connections sooner, or use a larger pool_size."
            )
        return translate_error(error, self.path)


class _Borrowed:
    """A loan from the pool. It ends with a rollback, and raises our errors. A class for speed, like `_Lent`."""

    __slots__ = ("_conn", "_connections", "_loan", "_translate")

    def __init__(self, connections: PooledConnections, translate: bool) -> None:
        self._connections, self._loan, self._translate = connections, connections.pool.borrow(), translate

    def __enter__(self) -> Connection:
        self._connections.refuse_if_closed()
        self._connections.refuse_another_file()
        try:
            self._conn = self._loan.__enter__()
        except (PoolTimeout, PoolClosed, sqlite3.Error) as error:
            raise self._connections.translate_error(error) from error
        self._connections.remember_file()
        self._conn.thread = threading.get_ident()
        return self._conn

    def __exit__(self, kind: object, raised: BaseException | None, traceback: object) -> None:
        if self._conn.inherited:
            return
        error = raised
        if error is None:
            try:
                self._conn.rollback()
            except BaseException as of_the_rollback:
                error = of_the_rollback
        self._conn.thread = None
        if error is None and not is_pending():
            self._loan.__exit__(None, None, None)
        else:  # Closing it also rolls back. The pool opens another when it needs one.
            self._loan.discard()
        if error is not None:
            logger.info("Closed a connection to %s after %s", self._connections.path, type(error).__name__)
        if isinstance(error, sqlite3.Error) and (self._translate or error is not raised):
            raise self._connections.translate_error(error) from error
        if error is not raised and error is not None:
            raise error
