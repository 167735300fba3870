"""What a fork must not carry into the child: locks that other threads hold, and what belongs to one thread's login.

Only the forking thread lives on in a child, so a lock that another thread held is never released there. Python warns
of this when a process with threads forks. Our own locks are made anew in the child. Those inside of a library cannot
be, so a fork waits until no thread is in that library by way of this package.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

WAIT = 6.0  # seconds that a fork waits for other threads
PAUSE = 0.001

_anew: weakref.WeakSet[StartsAnew] = weakref.WeakSet()
_inside: dict[int, int] = {}  # the thread of each block that is under way
_forking: set[int] = set()  # threads that are about to fork


class StartsAnew(Protocol):
    """What has locks, or something that belongs to one thread."""

    def start_anew(self) -> None:
        """Make these anew. In a forked child this is called before any other code, and it may wait for nothing."""


def start_anew_in_children(one: StartsAnew) -> None:
    """Let this object start anew in each child that is forked while it lives."""
    _anew.add(one)


@contextmanager
def no_fork() -> Iterator[None]:
    """Let no other thread fork during this block, which must be short."""
    me, block = threading.get_ident(), object()
    while True:
        _inside[id(block)] = me
        if not _forking or me in _forking:
            break
        del _inside[id(block)]
        time.sleep(PAUSE)
    try:
        yield
    finally:
        _inside.pop(id(block), None)


def _before() -> None:
    me, deadline = threading.get_ident(), time.monotonic() + WAIT
    _forking.add(me)
    while any(thread != me for thread in list(_inside.values())) and time.monotonic() < deadline:
        time.sleep(PAUSE)


def _after_in_parent() -> None:
    _forking.discard(threading.get_ident())


def _after_in_child() -> None:
    _forking.clear()
    _inside.clear()
    for one in list(_anew):
        one.start_anew()


if hasattr(os, "register_at_fork"):  # Windows does not fork.
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
