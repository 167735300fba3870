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
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection, cursor

from ..core.backend import ENTRIES_LOCK, NOBODY_LOCK, SCHEMA_LOCK, LocalLocks, lock_timeout
from ..core.errors import StoreUnavailable
from ..core.forks import start_anew_in_children
from .connections import PostgreSQLConnections, is_readable, wait_for_answer
from .queries import LOGINS_THAT_ARE_OVER

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.4  # seconds between two attempts to take a lock behind a pooler

_TRY = "SELECT pg_try_advisory_xact_lock(%(key)s) AS held"
# A login that follows needs a key of its own. To take it in the same message saves one.
_TRY_FOR_LOGIN = f"""
SELECT pg_advisory_xact_lock(%(own)s);
SELECT pg_try_advisory_xact_lock(%(key)s) AS held, ARRAY({LOGINS_THAT_ARE_OVER}) AS over
"""
_RELEASE_INNER = "ROLLBACK TO SAVEPOINT inner_lock; RELEASE SAVEPOINT inner_lock"


class _Holding(threading.local):
    """The locks of this thread.

    Attributes:
        conn: the connection that holds them, if any, and the process that owns it: a forked child may not use it.
        logins: the advisory keys of the logins that this thread began under them, by the name of the lock.
        ready: by the name of the lock, what its next login needs: see `PostgreSQLLocks.begin_login`.
    """

    def __init__(self) -> None:
        self.conn: tuple[connection, int] | None = None
        self.logins: dict[str, int] = {}
        self.ready: dict[str, tuple[int, list[str]]] = {}


class PostgreSQLLocks:
    """The locks of one store. Their connections are apart from the pool, because a login may take long."""

    def __init__(self, connections: PostgreSQLConnections) -> None:
        self._connections, self.where = connections, connections.where
        self._process = os.getpid()
        self._idle: list[tuple[connection, cursor]] = []  # The cursor still expects the answer to the ROLLBACK.
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
                    if not self._acquire(conn, name, wait):
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
                self._holding.ready.pop(name, None)
                marks_may_stay = bool(self._holding.logins)
                if before is None:
                    self._holding.logins.clear()
            if process != os.getpid():  # In a child that was forked meanwhile, it is the parent's. Never close it.
                self._of_the_parent.append(conn)
            elif outer is None:
                self._release(conn, wait=marks_may_stay)
            else:
                self._release_inner(conn)

    @property
    def logins(self) -> dict[str, int]:
        """The keys of the logins that this thread has begun under its locks and that may still have marks, by the name
        of the lock."""
        return self._holding.logins

    def begin_login(self, lock: str) -> tuple[int, list[str]]:
        """Take an advisory key that only this login has. The thread's connection holds it until it leaves this lock.

        Returns:
            the key, and the marks of those logins without a user id that are over.

        Raises:
            StoreUnavailable: the lock is lost, so another login may be under way.
        """
        ready = self._holding.ready.pop(lock, None)
        key, over = ready or (_new_key(), [])
        with self._connections.translating():
            if self._holding.conn is not None:
                held = self._connection_in_use()
                if held is None:
                    raise StoreUnavailable(f"The connection to {self.where} that held the lock is gone. Try again.")
                if ready is None:
                    taken = f"SELECT pg_advisory_xact_lock(%(key)s); {LOGINS_THAT_ARE_OVER}"
                    over = [row["sealed"] for row in self._connections.answer(held, taken, key=key)]
        self._holding.logins[lock] = key
        return key, over

    def close(self) -> None:
        """Close the connections that hold no lock now."""
        while self._idle and self._process == os.getpid():
            self._idle.pop()[0].close()

    def _take(self) -> connection:
        """Get a connection for a lock. Reuse an idle one if it is still good."""
        if self._process != os.getpid():  # A child neither uses nor closes the connections of its parent.
            self._of_the_parent += self._idle
            self._idle, self._process = [], os.getpid()
        with contextlib.suppress(IndexError):
            while True:
                conn, _ = self._idle.pop()
                with contextlib.suppress(psycopg2.Error, TimeoutError):
                    wait_for_answer(conn, self._connections.timeout)
                    if not conn.closed and not is_readable(conn):
                        return conn
                conn.close()
        return self._connections.connect()

    def _acquire(self, conn: connection, name: str, wait: float) -> bool:
        key = _key_of(name)
        inside = conn.info.transaction_status != TRANSACTION_STATUS_IDLE
        begin = "SAVEPOINT inner_lock" if inside else "BEGIN"
        if self._connections.pooled:
            return self._poll(conn, begin, name, wait)
        answer = self._connections.answer
        patience = f"SET LOCAL lock_timeout = {max(1, int(wait * 1000))}"
        # Try before waiting. Otherwise a stalled server would look like a lock that somebody holds.
        if self._try(conn, f"{begin}; {patience}", name):
            return True
        try:
            seconds = wait + self._connections.timeout
            answer(conn, "SELECT pg_advisory_xact_lock(%(key)s)", seconds=seconds, key=key)
        except psycopg2.errors.LockNotAvailable:
            return False
        return True

    def _try(self, conn: connection, begin: str, name: str) -> bool:
        """Begin, and take the lock if it is free. A login without a user id that ends while we wait counts as running:
        at worst a living token is in doubt."""
        key, own = _key_of(name), _new_key()
        if name in (SCHEMA_LOCK, NOBODY_LOCK, ENTRIES_LOCK):  # No login follows, and there may be no tables yet.
            return bool(self._connections.answer(conn, f"{begin}; {_TRY}", key=key)[0]["held"])
        (row,) = self._connections.answer(conn, f"{begin}; {_TRY_FOR_LOGIN}", key=key, own=own)
        self._holding.ready[name] = own, row["over"]
        return bool(row["held"])

    def _poll(self, conn: connection, begin: str, name: str, wait: float) -> bool:
        """Ask again and again. A transaction that waited would hold a session of the pooler, and the holder needs one
        to write its mark."""
        answer, deadline, pause = self._connections.answer, time.monotonic() + wait, FIRST_PAUSE
        key = _key_of(name)
        while True:
            # The first question begins no transaction: its lock is let go at once.
            if begin != "BEGIN" or answer(conn, _TRY, key=key)[0]["held"]:
                if self._try(conn, begin, name):
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

    def _release(self, conn: connection, *, wait: bool) -> None:
        """Release the locks and keep the connection, because opening another takes longer than storing a token.

        Args:
            wait: a login may have left a mark. Readers must not find its lock held once the caller goes on. Otherwise
                whoever takes the connection next waits for the answer.
        """
        try:
            releasing = conn.cursor()
            releasing.execute("ROLLBACK")
            if wait:
                wait_for_answer(conn, self._connections.timeout)
        except (psycopg2.Error, TimeoutError):
            conn.close()
            return
        if self._connections.closed or len(self._idle) >= self._connections.size or self._process != os.getpid():
            conn.close()
        else:
            self._idle.append((conn, releasing))


def _new_key() -> int:
    return int.from_bytes(os.urandom(8), signed=True) or 1  # 0 marks a token whose login nobody knows


def _key_of(name: str) -> int:
    # 64 bits, because all programs of a database share these locks.
    digest = hashlib.sha256(f"upstox_db_examples/{name}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
