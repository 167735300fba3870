"""Connections to PostgreSQL that never wait for ever: a bounded pool, and a deadline for each answer.

Connections use psycopg2's asynchronous mode, because only there can we give up on a stalled server after a set time.
A wait callback would work too, but it would affect all other users of psycopg2 in the process.
"""

from __future__ import annotations

import logging
import select
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psycopg2
from psycopg2.errors import DuplicatePreparedStatement, InvalidSqlStatementName
from psycopg2.extensions import POLL_OK, POLL_READ, TRANSACTION_STATUS_IDLE, connection

from ..core.errors import ConfigurationError, StoreUnavailable
from ..core.pool import Pool, PoolClosed, PoolTimeout
from ..core.token import Secret
from .dsn import read_dsn
from .errors import translate_error
from .prepared import PreparingConnection, message
from .session import FIND_SCHEMA, session_settings, transaction_settings

logger = logging.getLogger(__name__)


class PostgreSQLConnections:
    """A pool of connections, shared by the threads of a process.

    The pool is our own, because psycopg2's raises at once when it is empty and hands out dead connections.

    Args:
        dsn: where the database is, as `psycopg2.connect` takes it.
        pool_size: the maximum number of connections, and how many more are kept for the holders of locks.
        timeout: seconds for each answer of the server, and for a free connection.

    Attributes:
        schema: has the tables. `search_path` decides that for the first connection, and all others keep to it.
        pooled: a pooler such as PgBouncer is in between. It may serve each transaction from another session.

    Raises:
        ConfigurationError: the connection string is invalid.
    """

    def __init__(self, dsn: Secret, pool_size: int, timeout: float) -> None:
        self._dsn, self.where, self.hosts = read_dsn(dsn)
        self.timeout, self.size = timeout, pool_size
        self.schema: str | None = None
        self.pooled = self.closed = False
        self._prepares = True
        self._sessions: dict[weakref.ref[connection], tuple[object, ...]] = {}
        # A returned connection has no transaction to roll back, because each message is its own transaction.
        self._pool: Pool[connection] = Pool(
            self.connect, connection.close, size=pool_size, timeout=timeout, healthy=self._still_open
        )

    def run(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Send one message and return its rows.

        Several statements in it are one transaction, and the rows of the last one come back.
        """
        with self.session() as conn:
            return self.answer(conn, sql, **values)

    def run_prepared(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Do the same as `run`, but the server plans the statements once for each connection."""
        with self.session() as conn:
            if self.pooled or not self._prepares:
                return self.answer(conn, sql, **values)
            this, known = message(sql), cast(PreparingConnection, conn).known
            try:
                rows = self.answer(conn, this.for_session(known), **values)
            except (InvalidSqlStatementName, DuplicatePreparedStatement) as error:
                # Something in between changes the sessions, and nobody noticed. Nothing was executed.
                logger.info("%s keeps no prepared statements (%s), so none are used", self.where, error.pgcode)
                self._prepares = False
            else:
                known |= this.names
                return rows
        return self.run(sql, **values)

    def answer(
        self, conn: connection, sql: str, *, seconds: float | None = None, **values: object
    ) -> list[dict[str, Any]]:
        """Do the same as `run` on this connection. `seconds` is for an answer that takes longer than others."""
        if self.pooled and conn.info.transaction_status == TRANSACTION_STATUS_IDLE:
            first = self._settings.replace("%", "%%") if values else self._settings
            sql = f"{first}; {sql}"
        with conn.cursor() as cursor:
            cursor.execute(sql, values or None)
            _wait(conn, seconds or self.timeout)
            if not cursor.description:
                return []
            names = [column.name for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    @contextmanager
    def session(self) -> Iterator[connection]:
        """Lend a connection of the pool."""
        with self.translating():
            self.refuse_if_closed()
            with self._pool.borrow() as conn:
                yield conn

    @contextmanager
    def ordinary(self) -> Iterator[connection]:
        """Open an ordinary psycopg2 connection, outside the pool.

        Errors of the caller's block stay what they are: they may come from anywhere, such as another database.
        """
        with self.translating():
            seconds = max(2, int(self.timeout))  # libpq's minimum is 2
            conn = self._open(lambda: psycopg2.connect(self._dsn.reveal(), connect_timeout=seconds))
        try:
            yield conn
        finally:
            conn.close()

    def refuse_if_closed(self) -> None:
        """
        Raises:
            StoreUnavailable: the store is closed.
        """
        if self.closed:
            raise StoreUnavailable("This store is closed.")

    def pool_use(self) -> dict[str, int]:
        """Return `pool_size`, and how many connections are `in_use` now."""
        return {"pool_size": self._pool.size, "in_use": self._pool.counts()[0]}

    def close(self) -> None:
        self.closed = True
        self._pool.close()

    def connect(self) -> connection:
        """Open a connection outside the pool, with our settings. The caller closes it."""
        *others, last = self.hosts
        seconds = self.timeout / len(self.hosts)
        for host in others:
            try:
                return self._connect_to(host, seconds)
            except (psycopg2.Error, TimeoutError) as error:
                logger.info("One host of %s failed (%s). Trying the next one.", self.where, type(error).__name__)
        return self._connect_to(last, seconds)

    def _connect_to(self, host: Secret, seconds: float) -> connection:
        conn = self._open(lambda: psycopg2.connect(host.reveal(), PreparingConnection, async_=True))
        deadline = time.monotonic() + seconds
        try:
            _wait(conn, seconds)
            self._make_ours(conn, deadline)
        except BaseException:
            conn.close()
            raise
        logger.debug("Opened a connection to %s", self.where)
        return conn

    def _make_ours(self, conn: connection, deadline: float) -> None:
        """Set what our promises need, whatever the role or the database has set.

        Raises:
            ConfigurationError: this role has no schema for the tables.
        """
        if self.schema is None:
            (found,) = self.answer(conn, FIND_SCHEMA, seconds=deadline - time.monotonic())
            self._settings = transaction_settings(conn.server_version, **found)
            self._look_for_a_pooler(conn, found["pid"])
            self.schema = found["schema"]  # Last, because other threads go on as soon as they see it.
        if self.schema is None:
            raise ConfigurationError(
                f"No schema in the search_path of this role exists in PostgreSQL at {self.where}, or the role may not "
                "use it. Create that schema or set another search_path. The owner of the tables can grant the use of "
                "their schema with init_database(runtime_role=...)."
            )
        if not self.pooled:
            message = session_settings(conn.server_version, self.schema)
            (found,) = self.answer(conn, message, seconds=deadline - time.monotonic())
            self._look_for_a_pooler(conn, found["pid"])

    def _look_for_a_pooler(self, conn: connection, pid: int) -> None:
        """Notice a pooler: it invents the process id that a client gets, or one session serves two of its clients."""
        session = (conn.info.host, conn.info.port, pid)
        known = [
            (each, of_each) for ref, of_each in list(self._sessions.items()) if (each := ref()) and not each.closed
        ]
        shared = any(its == session for each, its in known if each is not conn)
        self._sessions = {weakref.ref(each): its for each, its in [*known, (conn, session)]}
        if not self.pooled and (shared or pid != conn.info.backend_pid):
            self.pooled = True
            logger.info(
                "%s is a pooler, so each message sets what it needs, and a lock is asked for again and again",
                self.where,
            )

    def _open(self, connect: Callable[[], connection]) -> connection:
        try:
            return connect()
        except psycopg2.Error as error:
            error.__traceback__ = None  # psycopg2's frames hold the connection string.
            raise

    def _still_open(self, conn: connection) -> bool:
        # An idle connection has no data to read. If there is some, the server closed it.
        if not is_readable(conn):
            return True
        logger.info("The server closed a connection to %s. Opening another one.", self.where)
        return False

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turn the errors of psycopg2 and of the pool into ours."""
        try:
            yield
        except (psycopg2.Error, PoolTimeout, PoolClosed, TimeoutError) as error:
            raise translate_error(error, self.where, self.timeout, pooled=self.pooled) from error


def _wait(conn: connection, seconds: float) -> None:
    """Wait until the connection has its answer.

    Raises:
        TimeoutError: no answer came within this many seconds. The connection cannot be used again.
    """
    deadline = time.monotonic() + seconds
    while (state := conn.poll()) != POLL_OK:
        left = deadline - time.monotonic()
        if left <= 0 or not _is_ready(conn.fileno(), left, to_read=state == POLL_READ):
            raise TimeoutError


def is_readable(conn: connection, seconds: float = 0) -> bool:
    """Return whether the server has sent something that nobody has read yet, or does so within this many seconds."""
    return _is_ready(conn.fileno(), max(0, seconds))


def _is_ready(descriptor: int, seconds: float, *, to_read: bool = True) -> bool:
    if hasattr(select, "poll"):  # select() fails if a process has more than 1,024 files open.
        poller = select.poll()
        poller.register(descriptor, select.POLLIN if to_read else select.POLLOUT)
        return bool(poller.poll(seconds * 1000))
    # Eventlet removes poll(), and its own select() has no such limit.
    return any(select.select([descriptor] * to_read, [descriptor] * (not to_read), [], seconds))
