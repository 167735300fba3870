"""Connections to PostgreSQL that never wait for ever: a bounded pool, a deadline for each answer, a lock.

Connections are in psycopg2's asynchronous mode, for only there a server that has stalled can be given up after a set
time. A wait callback would do it, too, but for all other users of psycopg2 in the process as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psycopg2
import psycopg2.extras
from psycopg2 import errorcodes
from psycopg2.extensions import POLL_OK, POLL_READ, connection, make_dsn, parse_dsn

from ..core.backend import LocalLocks, lock_not_had
from ..core.errors import ConfigurationError, StorageError, StoreUnavailable
from ..core.pool import Pool, PoolClosed, PoolTimeout
from ..core.token import Secret

logger = logging.getLogger(__name__)


class _Holding(threading.local):
    """The locks of this thread.

    Attributes:
        conn: the connection that holds them, if any, and the process whose it is: a forked child may not use it.
        logins: the advisory keys of the logins that were begun under them, by the name of the lock.
    """

    def __init__(self) -> None:
        self.conn: tuple[connection, int] | None = None
        self.logins: dict[str, int] = {}


class PostgreSQLConnections:
    """A pool of connections, shared by the threads of a process.

    The pool is our own and not psycopg2's, which raises at once when it is empty and hands out dead connections.

    Args:
        dsn: where the database is, as `psycopg2.connect` takes it.
        pool_size: how many connections there are at the most, and how many more are kept for the holders of locks.
        timeout: seconds for each answer of the server, and for a free connection.

    Raises:
        ConfigurationError: the connection string is none.
    """

    def __init__(self, dsn: Secret, pool_size: int, timeout: float) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self.where = _described(dsn)
        self._hosts = _one_by_one(dsn)
        # A connection that comes back has no transaction to roll back: each message is a transaction of its own.
        self._pool: Pool[connection] = Pool(
            self._connect, connection.close, size=pool_size, timeout=timeout, healthy=self._still_open
        )
        self._process = os.getpid()
        self._closed = False
        self._unlocked: list[connection] = []
        # Only one thread of a process waits at the server, or a crowd would use up its connections.
        self._local_locks = LocalLocks()
        self._holding = _Holding()

    def run(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of one message. Several statements in it are one transaction; the last one's rows come back."""
        with self.session() as conn:
            return self.answer(conn, sql, **values)

    def answer(
        self, conn: connection, sql: str, *, seconds: float | None = None, **values: object
    ) -> list[dict[str, Any]]:
        """As `run`, on this connection, and within these seconds if it is to take longer than other answers."""
        with conn.cursor() as cursor:
            cursor.execute(sql, values or None)
            _wait(conn, seconds or self._timeout)
            return cast(list[dict[str, Any]], cursor.fetchall()) if cursor.description else []

    @contextmanager
    def session(self, *, apart: bool = False) -> Iterator[connection]:
        """The connection that holds this thread's locks, so that a crowd of logins needs no more of them; otherwise a
        pooled one.

        A pooled one also when that connection has died, and the locks with it: a token that Upstox has made has to be
        stored all the same. That is safe, because the lock only keeps others from logging in for nothing. Two writers
        who both believe that they hold it give their tokens the same generation, and the second one is refused.

        Args:
            apart: a pooled one in any case.
        """
        with self._in_our_words():
            held = None if apart else self._held()
            if held is not None:
                yield held
                return
            self._leave_the_parents()
            self.refuse_if_closed()
            with self._pool.borrow() as conn:
                yield conn

    @contextmanager
    def ordinary(self) -> Iterator[connection]:
        """An ordinary psycopg2 connection, outside the pool."""
        with self._in_our_words():
            seconds = max(2, int(self._timeout))  # the least that libpq takes
            conn = self._opened(lambda: psycopg2.connect(self._dsn.reveal(), connect_timeout=seconds))
            try:
                yield conn
            finally:
                conn.close()

    @contextmanager
    def lock(self, name: str, wait: float) -> Iterator[None]:
        """One holder at a time in the whole database, by an advisory lock that belongs to a session.

        Raises:
            StoreUnavailable: not had within `wait` seconds.
        """
        with self._local_locks.hold(name, wait):
            with self._in_our_words():
                self.refuse_if_closed()
                before, outer = self._holding.conn, self._held()
                conn = outer or self._for_a_lock()
            try:
                with self._in_our_words():
                    if not self._wait_for_lock(conn, name, wait):
                        raise lock_not_had(name, wait)
                self._holding.conn = conn, os.getpid()
                yield
            except BaseException:
                if outer is None:
                    conn.close()  # The end of the session frees the lock, as its death does.
                raise
            finally:
                self._holding.conn = before
                if before is None:
                    self._holding.logins.clear()
            if outer is None:
                self._free(conn)
            else:
                self._unlock(conn, name)

    @property
    def logins(self) -> dict[str, int]:
        """The keys of the logins that this thread has begun under its locks, by the names of these."""
        return self._holding.logins

    def begin_login(self, lock: str) -> int:
        """An advisory key that only this login has, and that its thread's connection holds until it leaves this lock.

        Raises:
            StoreUnavailable: the lock is lost, so another login may be under way.
        """
        key = int.from_bytes(os.urandom(8), signed=True) or 1
        with self._in_our_words():
            if self._holding.conn is not None:
                held = self._held()
                if held is None:
                    raise StoreUnavailable(f"The connection to {self.where} that held the lock is gone. Try again.")
                self.answer(held, "SELECT pg_advisory_lock(%(key)s)", key=key)
        self._holding.logins[lock] = key
        return key

    def refuse_if_closed(self) -> None:
        """
        Raises:
            StoreUnavailable: it is closed.
        """
        if self._closed:
            raise StoreUnavailable("This store is closed.")

    def pool_use(self) -> dict[str, int]:
        """`pool_size`, and how many connections are `in_use`, at this moment."""
        return {"pool_size": self._pool.size, "in_use": self._pool.counts()[0]}

    def close(self) -> None:
        self._closed = True
        self._pool.close()
        while self._unlocked and self._process == os.getpid():
            self._unlocked.pop().close()

    def _for_a_lock(self) -> connection:
        """A connection outside the pool, for a login may take long: one that was kept, if it is still good."""
        if self._process == os.getpid():
            with contextlib.suppress(IndexError):
                while True:
                    conn = self._unlocked.pop()
                    if not conn.closed and not _readable(conn):
                        return conn
                    conn.close()
        return self._connect()

    def _held(self) -> connection | None:
        """The connection that holds this thread's locks, while it can be used."""
        held, process = self._holding.conn or (None, None)
        if held is None or process != os.getpid():
            return None
        # One that has something to say without being asked was closed by the server; one that still has to answer was
        # given up. Closed, it frees its locks at the server, too.
        if not held.closed and (held.isexecuting() or _readable(held)):
            logger.warning("The connection to %s that held a lock is lost, another one goes on", self.where)
            held.close()
        return None if held.closed else held

    def _unlock(self, conn: connection, name: str) -> None:
        """Give this lock back and keep the outer one."""
        keys = [_key_of(name)] + ([self.logins[name]] if name in self.logins else [])
        try:
            self.answer(conn, "SELECT pg_advisory_unlock(key) FROM unnest(%(keys)s) AS key", keys=keys)
        except (psycopg2.Error, TimeoutError):
            conn.close()

    def _free(self, conn: connection) -> None:
        """Give the locks back, and keep the connection: making another takes longer than storing a token."""
        try:
            self.answer(conn, "SELECT pg_advisory_unlock_all(); RESET ALL")
        except (psycopg2.Error, TimeoutError):
            conn.close()
            return
        if self._closed or len(self._unlocked) >= self._pool.size or self._process != os.getpid():
            conn.close()
        else:
            self._unlocked.append(conn)

    def _wait_for_lock(self, conn: connection, name: str, wait: float) -> bool:
        key = _key_of(name)
        # With keepalives the server notices in half a minute that the holder's machine is gone.
        settings = (
            "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; "
            f"SET lock_timeout = {max(1, int(wait * 1000))}"
        )
        # Tried first, and only then waited for: a server that stands still looks like a lock that somebody holds.
        if self.answer(conn, f"{settings}; SELECT pg_try_advisory_lock(%(key)s) AS held", key=key)[0]["held"]:
            return True
        try:
            with conn.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_lock(%(key)s)", {"key": key})
                _wait(conn, wait + self._timeout)
        except psycopg2.errors.LockNotAvailable:
            return False
        return True

    def _connect(self) -> connection:
        *others, last = self._hosts
        seconds = self._timeout / len(self._hosts)
        for host in others:
            try:
                return self._connect_to(host, seconds)
            except (psycopg2.Error, TimeoutError) as error:
                logger.info("One host of %s did not serve (%s), the next is tried", self.where, type(error).__name__)
        return self._connect_to(last, seconds)

    def _connect_to(self, host: Secret, seconds: float) -> connection:
        rows_as_dicts = psycopg2.extras.RealDictCursor
        conn = self._opened(lambda: psycopg2.connect(host.reveal(), async_=True, cursor_factory=rows_as_dicts))
        try:
            _wait(conn, seconds)
        except BaseException:
            conn.close()
            raise
        logger.debug("Opened a connection to %s", self.where)
        return conn

    def _opened(self, connect: Callable[[], connection]) -> connection:
        try:
            return connect()
        except psycopg2.Error as error:
            error.__traceback__ = None  # psycopg2's own frames hold the connection string.
            raise

    def _leave_the_parents(self) -> None:
        """A forked child may not use the parent's connections, nor close them. The pool sees to its own."""
        if self._process != os.getpid():
            self._inherited, self._unlocked, self._process = self._unlocked, [], os.getpid()

    def _still_open(self, conn: connection) -> bool:
        # An idle connection has nothing to say: one that has was closed by the server.
        if not _readable(conn):
            return True
        logger.info("The server had ended a connection to %s, another is opened", self.where)
        return False

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except (psycopg2.Error, PoolTimeout, PoolClosed, TimeoutError) as error:
            raise _explained(error, self.where, self._timeout) from error


def _wait(conn: connection, seconds: float) -> None:
    """Until the connection has its answer.

    Raises:
        TimeoutError: it has none after this many seconds; the connection is of no more use.
    """
    deadline = time.monotonic() + seconds
    while (state := conn.poll()) != POLL_OK:
        poller = select.poll()  # and not select(), which fails where a process has more than 1,024 files open
        poller.register(conn.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError


def _key_of(name: str) -> int:
    # 64 bits, for a database has one set of these locks for all its programs.
    digest = hashlib.sha256(f"upstox_db_examples/{name}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def violated(error: StorageError) -> str | None:
    """The constraint that has refused a statement."""
    diagnosis = getattr(error.__cause__, "diag", None)
    return getattr(diagnosis, "constraint_name", None)


def _readable(conn: Any) -> bool:
    poller = select.poll()
    poller.register(conn.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def _described(dsn: Secret) -> str:
    """Where the database is, without any password."""
    try:
        parts = parse_dsn(dsn.reveal())
        return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
    except (psycopg2.Error, TypeError):
        pass  # Its text may hold the password. Raised below, our error has no cause that shows it.
    raise ConfigurationError(
        "The connection string is not one that PostgreSQL understands, such as postgresql://user:password@host/database."
    )


def _one_by_one(dsn: Secret) -> list[Secret]:
    """A connection string for each host: libpq itself, asynchronous, waits for the first one until it is given up."""
    parts = parse_dsn(dsn.reveal())
    lists = {name: parts[name].split(",") for name in ("host", "hostaddr", "port") if name in parts}
    number = max((len(values) for values in lists.values()), default=1)
    if number == 1:
        return [dsn]
    each = ({name: values[n if len(values) > 1 else 0] for name, values in lists.items()} for n in range(number))
    return [Secret(make_dsn(**(parts | host))) for host in each]


_EXPLANATIONS: dict[str, tuple[type[StorageError], str]] = {
    errorcodes.INSUFFICIENT_PRIVILEGE: (
        ConfigurationError,
        "does not allow this role to do that. The owner grants it by init_database(runtime_role=...).",
    ),
    errorcodes.READ_ONLY_SQL_TRANSACTION: (StoreUnavailable, "is read-only, as a standby is. Write to the primary."),
    errorcodes.DISK_FULL: (StoreUnavailable, "has a full disk. Make room and try again."),
    errorcodes.TOO_MANY_CONNECTIONS: (
        StoreUnavailable,
        "has no connection left. Use a smaller pool_size, or a pooler.",
    ),
    errorcodes.UNDEFINED_TABLE: (ConfigurationError, "has lost its tables. Run init_database()."),
    errorcodes.UNDEFINED_OBJECT: (ConfigurationError, "does not know that role."),
}


def _explained(error: Exception, where: str, timeout: float) -> StorageError:
    if isinstance(error, PoolClosed):
        return StoreUnavailable("This store is closed.")
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(f"No connection to {where} came free for {timeout:g} s. Use a larger pool_size.")
    if isinstance(error, TimeoutError):
        return StoreUnavailable(f"PostgreSQL at {where} gave no answer for {timeout:g} s. Try again.")
    state, text = getattr(error, "pgcode", None), str(error)
    # (An end of file is a server that died.)
    if state is None and re.search(r"certificate|not support SSL|SSL error: (?!unexpected eof)", text):
        return ConfigurationError(
            f"PostgreSQL at {where} did not pass the check of TLS: its certificate, its host name, or the authority in "
            "sslrootcert. Mend that; without it somebody else could be listening."
        )
    if state is None and "authentication failed" in text:
        return ConfigurationError(f"PostgreSQL at {where} refused the role or its password. Check both.")
    if state in _EXPLANATIONS:
        kind, what = _EXPLANATIONS[state]
        return kind(f"PostgreSQL at {where} {what}")
    if state and state.startswith("23"):
        name = getattr(getattr(error, "diag", None), "constraint_name", None)
        return StoreUnavailable(f"PostgreSQL at {where} refuses this by the constraint {name} (SQLSTATE {state}).")
    if state is None:
        return StoreUnavailable(
            f"PostgreSQL at {where} cannot be reached, or refused the role or its password. Check both and try again."
        )
    return StoreUnavailable(f"PostgreSQL at {where} could not do it (SQLSTATE {state}). Try again.")
