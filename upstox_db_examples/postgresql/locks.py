"""The locks of logins: advisory locks, one holder at a time in the whole database.

A lock belongs to a transaction that stays open while the lock is held, so it works behind a pooler in transaction mode,
too. (A lock of the session would not: there all programs share a few sessions, so several of them would hold it.) The
transaction does nothing else. What the holder reads and writes goes over the pool, because a mark must be visible
before the login begins. An open transaction without a snapshot keeps nothing from VACUUM.

If the connection of a lock dies, its lock is free. The holder still stores its token, because Upstox has made it and
the earlier one is dead. That is safe: the lock only prevents needless logins. If two writers both believe that they
hold it, they give their tokens the same generation, and the second one is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection

from ..core.errors import StoreUnavailable
from ..core.forks import start_anew_in_children
from ..core.locks import LocalLocks, lock_timeout
from .connections import PostgreSQLConnections, is_readable
from .queries import LOGINS_THAT_ARE_OVER

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.4  # seconds between two attempts to take a lock behind a pooler

_TRY = "SELECT pg_try_advisory_xact_lock(%(key)s) AS held"
_RELEASE_INNER = "ROLLBACK TO SAVEPOINT inner_lock; RELEASE SAVEPOINT inner_lock"


class _Holding(threading.local):
    """The locks of this thread.

    Attributes:
        conn: the connection that holds them, if any, and the process that owns it: a forked child may not use it.
        logins: the advisory keys of the logins that this thread began under them, by the name of the lock.
    """

    def __init__(self) -> None:
        self.conn: tuple[connection, int] | None = None
        self.logins: dict[str, int] = {}


class PostgreSQLLocks:
    """The locks of one store. Their connections are apart from the pool, because a login may take long."""

    def __init__(self, connections: PostgreSQLConnections) -> None:
        self._connections, self.where = connections, connections.where
        self._process = os.getpid()
        self._idle: list[connection] = []
        self._of_the_parent: list[object] = []
        # Only one thread of a process waits at the server. Otherwise a crowd would use up its connections.
        self._local_locks = LocalLocks()
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        self._holding = _Holding()  # A child that is forked during a login takes no part in it.

    @contextmanager
    def hold(self, name: str, wait: float) -> Iterator[None]:
        """Hold the lock with this name. Inside of another one it becomes free when this block ends, and not later.

        Raises:
            StoreUnavailable: the lock did not become free within `wait` seconds.
        """
        with self._local_locks.hold(name, wait):
            with self._connections.translating():
                self._connections.refuse_if_closed()
                before, outer = self._holding.conn, self._connection_in_use()
                conn = outer or self._take()
            process = os.getpid()
            try:
                with self._connections.translating():
                    if not self._acquire(conn, _key_of(name), wait):
                        raise lock_timeout(name, wait)
                self._holding.conn = conn, process
                yield
            except BaseException:
                if process != os.getpid():
                    self._of_the_parent.append(conn)
                elif outer is None:
                    conn.close()  # The lock is freed when the session ends or dies.
                else:
                    self._release_inner(conn)
                raise
            finally:
                self._holding.conn = before
                if before is None:
                    self._holding.logins.clear()
            if process != os.getpid():  # In a child that was forked meanwhile, it is the parent's. Never close it.
                self._of_the_parent.append(conn)
            elif outer is None:
                self._release(conn)
            else:
                self._release_inner(conn)

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
        with self._connections.translating():
            if self._holding.conn is not None:
                held = self._connection_in_use()
                if held is None:
                    raise StoreUnavailable(f"The connection to {self.where} that held the lock is gone. Try again.")
                taken = f"SELECT pg_advisory_xact_lock(%(key)s); {LOGINS_THAT_ARE_OVER}"
                over = [row["sealed"] for row in self._connections.answer(held, taken, key=key)]
        self._holding.logins[lock] = key
        return key, over

    def close(self) -> None:
        """Close the connections that hold no lock now."""
        while self._idle and self._process == os.getpid():
            self._idle.pop().close()

    def _take(self) -> connection:
        """Get a connection for a lock. Reuse an idle one if it is still good."""
        if self._process != os.getpid():  # A child neither uses nor closes the connections of its parent.
            self._of_the_parent += self._idle
            self._idle, self._process = [], os.getpid()
        with contextlib.suppress(IndexError):
            while True:
                conn = self._idle.pop()
                if not conn.closed and not is_readable(conn):
                    return conn
                conn.close()
        return self._connections.connect()

    def _acquire(self, conn: connection, key: int, wait: float) -> bool:
        inside = conn.info.transaction_status != TRANSACTION_STATUS_IDLE
        begin = "SAVEPOINT inner_lock" if inside else "BEGIN"
        if self._connections.pooled:
            return self._poll(conn, begin, key, wait)
        answer = self._connections.answer
        patience = f"SET LOCAL lock_timeout = {max(1, int(wait * 1000))}"
        # Try before waiting. Otherwise a stalled server would look like a lock that somebody holds.
        if answer(conn, f"{begin}; {patience}; {_TRY}", key=key)[0]["held"]:
            return True
        try:
            seconds = wait + self._connections.timeout
            answer(conn, "SELECT pg_advisory_xact_lock(%(key)s)", seconds=seconds, key=key)
        except psycopg2.errors.LockNotAvailable:
            return False
        return True

    def _poll(self, conn: connection, begin: str, key: int, wait: float) -> bool:
        """Ask again and again. A transaction that waited would hold a session of the pooler, and the holder needs one
        to write its mark."""
        answer, deadline, pause = self._connections.answer, time.monotonic() + wait, FIRST_PAUSE
        while True:
            # The first question begins no transaction: its lock is let go at once.
            if begin != "BEGIN" or answer(conn, _TRY, key=key)[0]["held"]:
                if answer(conn, f"{begin}; {_TRY}", key=key)[0]["held"]:
                    return True
                answer(conn, _RELEASE_INNER if begin != "BEGIN" else "ROLLBACK")
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, pause * random.uniform(0.5, 1)))  # noqa: S311 -- so that they do not ask all at once
            pause = min(2 * pause, LONGEST_PAUSE)

    def _connection_in_use(self) -> connection | None:
        """Return the connection that holds this thread's locks, if it is still usable."""
        held, process = self._holding.conn or (None, None)
        if held is None or process != os.getpid():
            return None
        # If it has data that nobody asked for, the server closed it. If it still owes an answer, we gave up on it.
        # Closing it frees its locks at the server, too.
        if not held.closed and (held.isexecuting() or is_readable(held)):
            logger.warning("The connection to %s that held a lock is lost. Using another one.", self.where)
            held.close()
        return None if held.closed else held

    def _release_inner(self, conn: connection) -> None:
        """Release this lock and keep the outer one."""
        try:
            self._connections.answer(conn, _RELEASE_INNER)
        except (psycopg2.Error, TimeoutError):
            conn.close()

    def _release(self, conn: connection) -> None:
        """Release the locks and keep the connection, because opening another takes longer than storing a token."""
        try:
            self._connections.answer(conn, "ROLLBACK")
        except (psycopg2.Error, TimeoutError):
            conn.close()
            return
        if self._connections.closed or len(self._idle) >= self._connections.size or self._process != os.getpid():
            conn.close()
        else:
            self._idle.append(conn)


def _key_of(name: str) -> int:
    # 64 bits, because all programs of a database share these locks.
    digest = hashlib.sha256(f"upstox_db_examples/{name}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
