"""Before a fork, close the SQLite files of this process, so that parent and child both open them anew.

SQLite keeps a table of its locks in memory, one for each file. A forked child inherits the table, but none of the
locks: the system gives them to the parent alone. So a connection of the child believes that it has locks which it does
not have. The parent, when it closes the database, then takes itself for the last user and removes the log that the
child goes on writing to. The table is empty only when nobody has the file open. (SQLite asks for this, too: "How to
corrupt an SQLite database file", section 2.6.) The wait also keeps the other threads out of SQLite during the fork.
Otherwise the child could inherit a mutex that nobody will ever release.

Python warns that a fork may hang the child if there are other threads. This takes care of this package's own; for
other libraries, fork before threads are started, or use the start methods "spawn" and "forkserver" of multiprocessing.

Rejected: connections in the child past the table, by another name of the file or another VFS. The table goes by inode.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ..core.errors import ConfigurationError
from ..core.files import Identity, files_open_here, identity_of

WAIT = 6.0  # seconds that a fork waits for other threads: a little longer than a statement waits for another writer
PAUSE = 0.001

_open: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()
_stores: weakref.WeakValueDictionary[int, HasIdle] = weakref.WeakValueDictionary()
_forking: set[int] = set()  # threads that are about to fork
_inherited: set[Identity] = set()  # files that were open when this process was forked
_of_the_parent: list[Connection] = []


class HasIdle(Protocol):
    """What keeps connections open while nobody uses them."""

    def close_idle(self) -> None:
        """Close the connections that nobody uses now."""


class Connection(sqlite3.Connection):
    """A connection to a file that exists. A fork waits until it is closed.

    Attributes:
        thread: the thread that uses it, or None.
        log: which file its log was when it first wrote, or None.
        inherited: it belongs to the parent of this process, which may neither use nor close it.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.thread: int | None = threading.get_ident()
        self.log: Identity | None = None
        self.inherited = False
        while True:
            _open[id(self)] = self
            if not _forking or self.thread in _forking:
                break
            del _open[id(self)]
            time.sleep(PAUSE)
        try:
            if _inherited and identity_of(path) in _inherited:
                raise ConfigurationError(
                    f"{path} was open when this process was forked, so SQLite cannot lock it here. Fork outside of "
                    "get_connection(), while no other code has the file open, or open the store in a new process."
                )
            # SQLite must not make the file: it was there when the store was opened.
            address = f"{path.absolute().as_uri()}?mode=rw"
            super().__init__(address, timeout=timeout, isolation_level=None, check_same_thread=False, uri=True)
        except BaseException:
            _open.pop(id(self), None)  # A traceback may keep this object.
            raise

    def close(self) -> None:
        if not self.inherited:
            super().close()
            _open.pop(id(self), None)


def close_before_forks(store: HasIdle) -> None:
    """Close this store's idle connections before each fork of this process."""
    _stores[id(store)] = store


def is_pending() -> bool:
    """Tell whether a thread is about to fork, so that connections must be closed and not kept."""
    return bool(_forking)


def _before() -> None:
    import ctypes  # noqa: F401 - for the child, which must not import anything: another thread may hold the lock.

    me, deadline = threading.get_ident(), time.monotonic() + WAIT
    _forking.add(me)
    while True:
        for reference in _stores.valuerefs():
            store = reference()
            if store is not None:
                with suppress(sqlite3.Error):
                    store.close_idle()
        # This thread's own connection cannot come back before the fork. Then the child refuses to open its file.
        used = [conn for reference in _open.valuerefs() if (conn := reference()) is not None and conn.thread != me]
        if not used or time.monotonic() > deadline:
            break
        del used
        time.sleep(PAUSE)


def _after_in_parent() -> None:
    _forking.discard(threading.get_ident())


def _after_in_child() -> None:
    import ctypes

    _forking.clear()
    _inherited.clear()
    _inherited.update(files_open_here())
    for conn in list(_open.values()):
        conn.inherited = True
        _of_the_parent.append(conn)
        # SQLite must not close it when the interpreter ends, either: it would roll back in the memory that it shares
        # with the parent. So nothing may ever find that the object is not needed any more.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(conn))
    _open.clear()
    for store in list(_stores.values()):
        store.close_idle()  # Those that the parent had no time to close. As they are inherited, this only drops them.


if hasattr(os, "register_at_fork"):  # Windows does not fork.
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
