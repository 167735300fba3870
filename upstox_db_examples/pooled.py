"""Pattern 5: SQLite with a bounded pool of connections. Many threads, never more open files than you said."""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack, cast

from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from .errors import InvalidInput, StoreUnavailable
from .sqlite import SQLiteUpstoxStorage, explained
from .storage import Options


class PooledUpstoxStorage(SQLiteUpstoxStorage):
    """Tokens in a SQLite file, read and written through at most `pool_size` connections.

    `SQLiteUpstoxStorage` keeps as many connections as threads were ever busy at once. Here a thread that finds all
    of them in use waits, and is told so after `timeout`. The pool is SQLAlchemy's: a queue of one's own, as in the
    SDK's guide, waits for ever, and hands on the half-done transaction of the borrower before.

    Args:
        db_path, audit_reads, options: as for `SQLiteUpstoxStorage`.
        pool_size: how many connections there are at the most. They are opened when first needed.
        timeout: seconds to wait for a free connection.

    Raises:
        InvalidInput: `pool_size` or `timeout` is not a positive number.
        ConfigurationError: the path cannot be used, or holds something else.
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
        if type(pool_size) is not int or pool_size < 1:
            raise InvalidInput("pool_size must be a whole number from 1 up.")
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise InvalidInput("timeout must be a positive number of seconds.")
        self.pool_size = pool_size
        self._timeout = timeout
        self._pool = self._new_pool()
        super().__init__(db_path, audit_reads=audit_reads, **options)

    @contextmanager
    def get_connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of the pool, in autocommit mode. A transaction that is left open is rolled back.

        Who holds one and asks the store for something needs a second one.

        Raises:
            StoreUnavailable: none came free in time, or SQLite could not do it.
            ConfigurationError: SQLite said so inside, in our words.
        """
        try:
            borrowed = self._from_pool()
            try:
                yield cast(sqlite3.Connection, borrowed.dbapi_connection)
                borrowed.rollback()
                if self._closed:
                    borrowed.invalidate()
            except BaseException:
                borrowed.invalidate()  # It is closed, which rolls back, and the pool opens another when it needs one.
                raise
            finally:
                borrowed.close()  # back to the pool
        except PoolTimeout as error:
            raise StoreUnavailable(
                f"No connection to {self.db_path} came free for {self._timeout:g} s; pool_size is {self.pool_size}. "
                "Hold connections for a shorter time, or use a larger pool_size."
            ) from error
        except sqlite3.Error as error:
            raise explained(error, self.db_path) from error

    def pool_status(self) -> dict[str, int]:
        """How the pool is used now.

        Returns:
            `size`: how many connections there can be. `in_use`: how many are borrowed. `idle`: how many are open and
            free. `unopened`: how many were not needed so far, or were thrown away after an error.
        """
        in_use, idle = self._pool.checkedout(), self._pool.checkedin()
        return {"size": self.pool_size, "in_use": in_use, "idle": idle, "unopened": self.pool_size - in_use - idle}

    def close(self) -> None:
        self._closed = True
        _dispose(self._pool, self._process)

    def _from_pool(self) -> Any:
        if self._process != os.getpid():
            # A forked child may not use the parent's connections, nor close them. The old pool's finalizer keeps them.
            self._pool, self._process = self._new_pool(), os.getpid()
        if self._closed:
            raise StoreUnavailable("This store is closed.")
        return self._pool.connect()

    def _new_pool(self) -> QueuePool:
        # A proxy: a pool that holds the store would keep the store from ever being found unused, and so itself.
        store = weakref.proxy(self)
        # What is left open is rolled back above, where an error can still be told; in the pool it would only be logged.
        pool = QueuePool(
            lambda: store._connect(),
            pool_size=self.pool_size,
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
