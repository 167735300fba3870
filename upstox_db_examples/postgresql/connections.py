"""Connections to PostgreSQL that never wait for ever: a bounded pool, a deadline for each answer, a lock.

Connections use psycopg2's asynchronous mode, because only there can we give up on a stalled server after a set time.
A wait callback would work too, but it would affect all other users of psycopg2 in the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psycopg2
import psycopg2.extras
from psycopg2.extensions import POLL_OK, POLL_READ, connection, make_dsn, parse_dsn

from ..core.addresses import is_host, read_text, read_url
from ..core.backend import LocalLocks, lock_timeout
from ..core.errors import ConfigurationError, StoreUnavailable
from ..core.forks import start_anew_in_children
from ..core.pool import Pool, PoolClosed, PoolTimeout
from ..core.token import Secret
from .errors import translate_error
from .queries import LOGINS_THAT_ARE_OVER
from .session import FIND_SCHEMA, settings

logger = logging.getLogger(__name__)

_WHAT, _EXAMPLE = "The address of PostgreSQL", "postgresql://user:password@host/database"
_SCHEMES = ("postgresql", "postgres")


class _Holding(threading.local):
    """The locks of this thread.

    Attributes:
        conn: the connection that holds them, if any, and the process that owns it: a forked child may not use it.
        logins: the advisory keys of the logins that this thread began under them, by the name of the lock.
    """

    def __init__(self) -> None:
        self.conn: tuple[connection, int] | None = None
        self.logins: dict[str, int] = {}


class PostgreSQLConnections:
    """A pool of connections, shared by the threads of a process.

    The pool is our own, because psycopg2's raises at once when it is empty and hands out dead connections.

    Args:
        dsn: where the database is, as `psycopg2.connect` takes it.
        pool_size: the maximum number of connections, and how many more are kept for the holders of locks.
        timeout: seconds for each answer of the server, and for a free connection.

    Attributes:
        schema: has the tables. `search_path` decides that for the first connection, and all others keep to it.

    Raises:
        ConfigurationError: the connection string is invalid.
    """

    def __init__(self, dsn: Secret, pool_size: int, timeout: float) -> None:
        self._dsn, self.where, self.hosts = read_dsn(dsn)
        self._timeout = timeout
        self.schema: str | None = None
        # A returned connection has no transaction to roll back, because each message is its own transaction.
        self._pool: Pool[connection] = Pool(
            self._connect, connection.close, size=pool_size, timeout=timeout, healthy=self._still_open
        )
        self._process = os.getpid()
        self._closed = False
        self._unlocked: list[connection] = []
        self._of_the_parent: list[connection] = []
        # Only one thread of a process waits at the server. Otherwise a crowd would use up its connections.
        self._local_locks = LocalLocks()
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        self._holding = _Holding()  # A child that is forked during a login takes no part in it.

    def run(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Send one message and return its rows.

        Several statements in it are one transaction, and the rows of the last one come back.
        """
        with self.session() as conn:
            return self.answer(conn, sql, **values)

    def answer(
        self, conn: connection, sql: str, *, seconds: float | None = None, **values: object
    ) -> list[dict[str, Any]]:
        """Do the same as `run` on this connection. `seconds` is for an answer that takes longer than others."""
        with conn.cursor() as cursor:
            cursor.execute(sql, values or None)
            _wait(conn, seconds or self._timeout)
            return cast(list[dict[str, Any]], cursor.fetchall()) if cursor.description else []

    @contextmanager
    def session(self, *, apart: bool = False) -> Iterator[connection]:
        """Lend the connection that holds this thread's locks, or a pooled one if there are no locks.

        So a crowd of logins needs no extra connections. If that connection has died, and the locks with it, this lends
        a pooled one: a token that Upstox has made must be stored anyway. That is safe, because the lock only prevents
        needless logins. If two writers both believe that they hold it, they give their tokens the same generation, and
        the second one is refused.

        Args:
            apart: lend a pooled one in any case.
        """
        with self._translating():
            held = None if apart else self._connection_in_use()
            if held is not None:
                yield held
                return
            self._leave_the_parents()
            self.refuse_if_closed()
            with self._pool.borrow() as conn:
                yield conn

    @contextmanager
    def ordinary(self) -> Iterator[connection]:
        """Open an ordinary psycopg2 connection, outside the pool.

        Errors of the caller's block stay what they are: they may come from anywhere, such as another database.
        """
        with self._translating():
            seconds = max(2, int(self._timeout))  # libpq's minimum is 2
            conn = self._open(lambda: psycopg2.connect(self._dsn.reveal(), connect_timeout=seconds))
        try:
            yield conn
        finally:
            conn.close()

    @contextmanager
    def lock(self, name: str, wait: float) -> Iterator[None]:
        """Hold an advisory lock. It belongs to a session, and the whole database has one holder at a time.

        Raises:
            StoreUnavailable: the lock did not become free within `wait` seconds.
        """
        with self._local_locks.hold(name, wait):
            with self._translating():
                self.refuse_if_closed()
                before, outer = self._holding.conn, self._connection_in_use()
                conn = outer or self._for_a_lock()
            process = os.getpid()
            try:
                with self._translating():
                    if not self._wait_for_lock(conn, name, wait):
                        raise lock_timeout(name, wait)
                self._holding.conn = conn, process
                yield
            except BaseException:
                if process != os.getpid():
                    self._of_the_parent.append(conn)
                elif outer is None:
                    conn.close()  # The lock is freed when the session ends or dies.
                raise
            finally:
                self._holding.conn = before
                if before is None:
                    self._holding.logins.clear()
            if process != os.getpid():  # In a child that was forked meanwhile, it is the parent's. Never close it.
                self._of_the_parent.append(conn)
            elif outer is None:
                self._free(conn)
            else:
                self._unlock(conn, name)

    @property
    def logins(self) -> dict[str, int]:
        """The keys of the logins that this thread has begun under its locks, by the name of the lock."""
        return self._holding.logins

    def begin_login(self, lock: str) -> tuple[int, list[str]]:
        """Take an advisory key that only this login has. The thread's connection holds it until it leaves this lock.

        Returns:
            the key, and the marks of those logins without a user id that are over.

        Raises:
            StoreUnavailable: the lock is lost, so another login may be under way.
        """
        key, over = int.from_bytes(os.urandom(8), signed=True) or 1, []
        with self._translating():
            if self._holding.conn is not None:
                held = self._connection_in_use()
                if held is None:
                    raise StoreUnavailable(f"The connection to {self.where} that held the lock is gone. Try again.")
                taken = f"SELECT pg_advisory_lock(%(key)s); {LOGINS_THAT_ARE_OVER}"
                over = [row["sealed"] for row in self.answer(held, taken, key=key)]
        self._holding.logins[lock] = key
        return key, over

    def refuse_if_closed(self) -> None:
        """
        Raises:
            StoreUnavailable: the store is closed.
        """
        if self._closed:
            raise StoreUnavailable("This store is closed.")

    def pool_use(self) -> dict[str, int]:
        """Return `pool_size`, and how many connections are `in_use` now."""
        return {"pool_size": self._pool.size, "in_use": self._pool.counts()[0]}

    def close(self) -> None:
        self._closed = True
        self._pool.close()
        while self._unlocked and self._process == os.getpid():
            self._unlocked.pop().close()

    def _for_a_lock(self) -> connection:
        """Get a connection outside the pool, because a login may take long. Reuse a kept one if it is still good."""
        if self._process == os.getpid():
            with contextlib.suppress(IndexError):
                while True:
                    conn = self._unlocked.pop()
                    if not conn.closed and not _readable(conn):
                        return conn
                    conn.close()
        return self._connect()

    def _connection_in_use(self) -> connection | None:
        """Return the connection that holds this thread's locks, if it is still usable."""
        held, process = self._holding.conn or (None, None)
        if held is None or process != os.getpid():
            return None
        # If it has data that nobody asked for, the server closed it. If it still owes an answer, we gave up on it.
        # Closing it frees its locks at the server, too.
        if not held.closed and (held.isexecuting() or _readable(held)):
            logger.warning("The connection to %s that held a lock is lost. Using another one.", self.where)
            held.close()
        return None if held.closed else held

    def _unlock(self, conn: connection, name: str) -> None:
        """Release this lock and keep the outer one."""
        keys = [_key_of(name)] + ([self.logins[name]] if name in self.logins else [])
        try:
            self.answer(conn, "SELECT pg_advisory_unlock(key) FROM unnest(%(keys)s) AS key", keys=keys)
        except (psycopg2.Error, TimeoutError):
            conn.close()

    def _free(self, conn: connection) -> None:
        """Release the locks and keep the connection, because opening another takes longer than storing a token."""
        try:
            self.answer(conn, "SELECT pg_advisory_unlock_all()")
        except (psycopg2.Error, TimeoutError):
            conn.close()
            return
        if self._closed or len(self._unlocked) >= self._pool.size or self._process != os.getpid():
            conn.close()
        else:
            self._unlocked.append(conn)

    def _wait_for_lock(self, conn: connection, name: str, wait: float) -> bool:
        key = _key_of(name)
        patience = f"SET lock_timeout = {max(1, int(wait * 1000))}"
        # Try before waiting. Otherwise a stalled server would look like a lock that somebody holds.
        if self.answer(conn, f"{patience}; SELECT pg_try_advisory_lock(%(key)s) AS held", key=key)[0]["held"]:
            return True
        try:
            with conn.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_lock(%(key)s)", {"key": key})
                _wait(conn, wait + self._timeout)
        except psycopg2.errors.LockNotAvailable:
            return False
        return True

    def _connect(self) -> connection:
        *others, last = self.hosts
        seconds = self._timeout / len(self.hosts)
        for host in others:
            try:
                return self._connect_to(host, seconds)
            except (psycopg2.Error, TimeoutError) as error:
                logger.info("One host of %s failed (%s). Trying the next one.", self.where, type(error).__name__)
        return self._connect_to(last, seconds)

    def _connect_to(self, host: Secret, seconds: float) -> connection:
        rows_as_dicts = psycopg2.extras.RealDictCursor
        conn = self._open(lambda: psycopg2.connect(host.reveal(), async_=True, cursor_factory=rows_as_dicts))
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
            self.schema = self.answer(conn, FIND_SCHEMA, seconds=deadline - time.monotonic())[0]["schema"]
        if self.schema is None:
            raise ConfigurationError(
                f"No schema in the search_path of this role exists in PostgreSQL at {self.where}, or the role may not "
                "use it. Create that schema or set another search_path. The owner of the tables can grant the use of "
                "their schema with init_database(runtime_role=...)."
            )
        self.answer(conn, settings(conn.server_version, self.schema), seconds=deadline - time.monotonic())

    def _open(self, connect: Callable[[], connection]) -> connection:
        try:
            return connect()
        except psycopg2.Error as error:
            error.__traceback__ = None  # psycopg2's frames hold the connection string.
            raise

    def _leave_the_parents(self) -> None:
        """Leave the parent's connections alone in a forked child: it must neither use nor close them.

        The pool does this for its own connections.
        """
        if self._process != os.getpid():
            self._inherited, self._unlocked, self._process = self._unlocked, [], os.getpid()

    def _still_open(self, conn: connection) -> bool:
        # An idle connection has no data to read. If there is some, the server closed it.
        if not _readable(conn):
            return True
        logger.info("The server closed a connection to %s. Opening another one.", self.where)
        return False

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except (psycopg2.Error, PoolTimeout, PoolClosed, TimeoutError) as error:
            raise translate_error(error, self.where, self._timeout) from error


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


def _key_of(name: str) -> int:
    # 64 bits, because all programs of a database share these locks.
    digest = hashlib.sha256(f"upstox_db_examples/{name}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def _readable(conn: Any) -> bool:
    return _is_ready(conn.fileno(), 0)


def _is_ready(descriptor: int, seconds: float, *, to_read: bool = True) -> bool:
    if hasattr(select, "poll"):  # select() fails if a process has more than 1,024 files open.
        poller = select.poll()
        poller.register(descriptor, select.POLLIN if to_read else select.POLLOUT)
        return bool(poller.poll(seconds * 1000))
    # Eventlet removes poll(), and its own select() has no such limit.
    return any(select.select([descriptor] * to_read, [descriptor] * (not to_read), [], seconds))


def read_dsn(dsn: Secret) -> tuple[Secret, str, list[Secret]]:
    """Return the cleaned connection string, where it leads (without any password), and one string for each host.

    Asynchronous libpq would spend all the time on the first host.

    Raises:
        ConfigurationError: libpq cannot read it, or its hosts, ports or database cannot be right.
    """
    dsn = read_text(dsn, _WHAT)
    if dsn.reveal().startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)):
        dsn = read_url(dsn, _SCHEMES, _WHAT, _EXAMPLE)
    try:
        # The encoding, because PGCLIENTENCODING or a role may name one that has no Hindi letters.
        parts: dict[str, str] = parse_dsn(dsn.reveal()) | {"client_encoding": "UTF8"}
        lists = {name: parts[name].split(",") for name in ("host", "hostaddr", "port") if parts.get(name)}
        number = max((len(values) for values in lists.values()), default=1)
        if _can_be_right(lists, number) and "://" not in parts.get("dbname", ""):
            where = f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
            each = (
                {name: values[n if len(values) > 1 else 0] for name, values in lists.items()} for n in range(number)
            )
            return dsn, where, [Secret(make_dsn(**(parts | host))) for host in each]
        del parts, lists
    except psycopg2.Error:
        pass  # This error may hold the password. We raise ours below, so that it has no cause.
    raise ConfigurationError(
        f"PostgreSQL cannot read the connection string. Use one such as {_EXAMPLE}, with as many ports as hosts."
    )


def _can_be_right(lists: dict[str, list[str]], number: int) -> bool:
    # libpq takes one port for all hosts. Otherwise there must be a value for each.
    return (
        all(len(values) == number or (name == "port" and len(values) == 1) for name, values in lists.items())
        and all(is_host(value) for name in ("host", "hostaddr") for value in lists.get(name, ()))
        and all(is_host("", value) for value in lists.get("port", ()))
    )
