"""The names of locks, the error of a lock that was not had, and the locks between the threads of one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import StoreUnavailable

# Lock names besides the user ids. They cannot clash, because no user id begins with a hyphen.
SCHEMA_LOCK, NOBODY_LOCK, ENTRIES_LOCK, ACCOUNT_LOCK = "-schema", "-nobody", "-entries", "-account-"


def lock_timeout(name: str, wait: float) -> StoreUnavailable:
    """Error for a lock wait that timed out."""
    if name == SCHEMA_LOCK:
        holder = "another program to make the tables"
    elif name in (NOBODY_LOCK, ENTRIES_LOCK):
        holder = "another transfer"
    else:
        holder = f"another login of {'this account' if name.startswith(ACCOUNT_LOCK) else name}"
    return StoreUnavailable(f"Waited {wait:g} s for {holder}. Try again, or raise login_wait.")


class _LocalLock:
    """A lock, and an entry for each thread that holds it or waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users: list[None] = []


class LocalLocks:
    """Let one thread of this process at a time compete for a database lock, so that only one waits at the database.

    The locks are kept per process, because a forked child may inherit a lock that a thread of its parent holds. A lock
    that nobody uses is forgotten, because an import has as many as there are users.
    """

    def __init__(self) -> None:
        self._locks: dict[tuple[int, str], _LocalLock] = {}

    @contextmanager
    def hold(self, name: str, wait: float) -> Iterator[None]:
        """Hold the lock with this name.

        Raises:
            StoreUnavailable: another thread held it for the whole `wait` seconds.
        """
        key, deadline = (os.getpid(), name), time.monotonic() + wait
        while True:
            local = self._locks.setdefault(key, _LocalLock())
            local.users.append(None)
            if not local.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                local.users.pop()
                raise lock_timeout(name, wait)
            if self._locks.get(key) is local:
                break
            # It was forgotten just before we could say that we use it. Another thread may hold the next one.
            local.lock.release()
        try:
            yield
        finally:
            local.users.pop()
            if not local.users:
                self._locks.pop(key, None)
            local.lock.release()
