"""A bounded pool of connections, for any database: fair between threads, and safe to fork.

A place is the right to have one connection open. There are `size` places, and each one is always in exactly one of two
collections: `_free`, or `_held` under the key of the loan that has it. So a place cannot be lost, and a connection too
many cannot be opened.

Signals, such as Ctrl-C, and garbage collection can run other code in the middle of a function. CPython lets them do so
only at a call, at the start of a function and at a jump back. That is why places are moved by statements, such as
`del self._free[-1]`, and not by calls, such as `self._free.pop()`: between two of these statements nothing can happen.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any


class PoolTimeout(Exception):
    """No connection became free in time."""


class PoolClosed(Exception):
    """The pool lends no more connections."""


class Pool[C]:
    """At most `size` connections, lent to one thread at a time.

    The connection that was used last is lent first. Threads that have to wait are served in the order in which they
    came: a returned connection goes directly to the first one, so no other thread can take it before that one wakes up.
    (A `threading.Condition` or a `queue.Queue` lets the thread that has just returned a connection take it again.)

    Args:
        open: opens a connection. A pool that nobody uses any more is closed at once only if this does not refer to it.
        close: closes a connection.
        size: how many connections can be open at any time. They are opened when first needed.
        timeout: seconds to wait for a free connection.
        healthy: says whether a connection that was idle can still be used. One that cannot be used is replaced.
    """

    def __init__(
        self,
        open: Callable[[], C],
        close: Callable[[C], object],
        *,
        size: int,
        timeout: float,
        healthy: Callable[[C], bool] | None = None,
    ) -> None:
        self._open, self._close, self.healthy = open, close, healthy
        self.size, self._timeout = size, timeout
        self._closed = False
        # Reentrant: a garbage collection while this thread has the lock may find a loan that was interrupted.
        self._lock = threading.RLock()
        self._free: list[C | None] = [None] * size  # None: not opened. The last one is lent next.
        self._held: dict[int, C | None] = {}
        self._waiting: dict[int, threading.Lock] = {}  # in order of arrival; empty while a place is free
        _pools.add(self)

    def borrow(self) -> Loan[C]:
        """Lend a connection for a `with` block. After an exception in the block it is closed, and replaced when needed.

        Raises:
            PoolTimeout: no connection became free in time.
            PoolClosed: the pool is closed, or was closed during the wait.
        """
        return Loan(self)

    def counts(self) -> tuple[int, int]:
        """Return how many connections are in use and how many are idle, both at the same moment."""
        with self._lock:
            return len(self._held), sum(conn is not None for conn in self._free)

    @property
    def waiting(self) -> int:
        """How many threads wait for a connection now."""
        return len(self._waiting)

    def close_idle(self) -> None:
        """Close the idle connections. Their places stay, and each is opened again when it is needed."""
        while not self._closed and any(conn is not None for conn in self._free):
            loan = Loan(self)
            if self._take_free_place(id(loan)):
                loan.discard()

    def close(self) -> None:
        """Close the idle connections. Those in use are closed when they come back; threads that wait get an error."""
        self._closed = True
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            free, self._free = self._free, []
        for turn in waiting.values():
            turn.release()
        for conn in free:
            if conn is not None:
                self._close(conn)

    def __del__(self) -> None:
        if hasattr(self, "_waiting"):  # The constructor finished.
            self.close()

    def _take(self, key: int) -> C:
        if not self._take_free_place(key):
            self._wait_for_place(key)
        conn = self._held[key]
        if conn is not None and self.healthy is not None and not self.healthy(conn):
            self._held[key] = None
            self._close(conn)
            conn = None
        if conn is None:
            self._held[key] = conn = self._open()
        return conn

    def _take_free_place(self, key: int, turn: threading.Lock | None = None) -> bool:
        """Take a place if one is free. Otherwise join the waiting threads, if `turn`, the lock to wake by, is given."""
        with self._lock:
            if self._closed:
                raise PoolClosed
            if self._free:
                self._held[key] = self._free[-1]
                del self._free[-1]
                return True
            if turn is not None:
                self._waiting[key] = turn
            return False

    def _wait_for_place(self, key: int) -> None:
        turn = threading.Lock()
        turn.acquire()
        if self._take_free_place(key, turn):
            return
        turn.acquire(timeout=self._timeout)
        if key not in self._held:
            raise PoolClosed if self._closed else PoolTimeout(f"All {self.size} were in use for {self._timeout:g} s.")

    def _give_back(self, key: int, *, broken: bool) -> None:
        """Stop waiting, and return this loan's place. In a forked child, a loan of the parent has no place."""
        try:
            # Close it before the place is passed on. Otherwise one connection too many would be open for a moment.
            if (broken or self._closed) and (conn := self._held.get(key)) is not None:
                self._held[key] = None
                self._close(conn)
        finally:
            with self._lock:
                if key in self._waiting:
                    del self._waiting[key]
                if key in self._held:
                    conn = self._held[key]
                    for first in self._waiting:  # `next(iter(...))` would be two calls.
                        turn = self._waiting[first]
                        del self._waiting[first], self._held[key]
                        self._held[first] = conn
                        turn.release()
                        break
                    else:
                        del self._held[key]
                        if conn is None:
                            self._free[:0] = [None]
                        else:
                            self._free += [conn]
        if self._closed:
            self.close()  # It may have been closed since the check above.


class Loan[C]:
    """A connection on loan. This is not a generator, because only `__del__` can finish an interrupted return."""

    __slots__ = ("_pool",)

    def __init__(self, pool: Pool[C]) -> None:
        self._pool = pool

    def __enter__(self) -> C:
        try:
            return self._pool._take(id(self))
        except BaseException:
            self._pool._give_back(id(self), broken=True)
            raise

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._pool._give_back(id(self), broken=error is not None)

    def discard(self) -> None:
        """End the loan and close its connection."""
        self._pool._give_back(id(self), broken=True)

    def __del__(self) -> None:
        # Ctrl-C at the very start of `__exit__` skips the rest of it. It can also come at the start of `__init__`, and
        # then there is no `_pool`.
        pool = getattr(self, "_pool", None)
        if pool is not None and (id(self) in pool._held or id(self) in pool._waiting):
            pool._give_back(id(self), broken=True)


_pools: weakref.WeakSet[Pool[Any]] = weakref.WeakSet()
_of_the_parent: list[object] = []


def _empty_the_pools() -> None:
    """Give a forked child empty pools. It must not use or close its parent's connections, or wait for a thread's lock.

    The connections are kept here, because Python would close them as soon as nothing refers to them.
    """
    for pool in list(_pools):
        _of_the_parent.append((pool._free, pool._held))
        pool._lock = threading.RLock()
        pool._free, pool._held, pool._waiting = [None] * pool.size, {}, {}


if hasattr(os, "register_at_fork"):  # Windows does not fork.
    os.register_at_fork(after_in_child=_empty_the_pools)
