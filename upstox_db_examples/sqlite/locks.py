"""Locks between processes, by files that stay. The system frees a lock when its holder dies.

Rejected: the package filelock. Where a file system refuses flock it goes over to a file whose existence is the lock,
which a dead holder keeps for ever. And a child that was forked meanwhile can release its parent's lock with it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import ConfigurationError
from ..core.locks import lock_timeout

PAUSE = 0.05  # seconds between two attempts

_held: set[int] = set()  # the descriptors whose locks this process holds

if sys.platform == "win32":
    import msvcrt

    def _try_to_lock(descriptor: int, *, shared: bool = False) -> None:  # noqa: ARG001 - there is only one kind
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            raise BlockingIOError from None

    def _unlock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_to_lock(descriptor: int, *, shared: bool = False) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def hold(path: str, name: str, wait: float) -> Iterator[None]:
    """Hold the lock of this file. The file and its folder are made if they are missing, and they stay: unlinking the
    file would let two in.

    Args:
        path: of the file. Not a `Path`: Python 3.12 keeps the name of each for ever, and an import locks every user.

    Raises:
        StoreUnavailable: somebody else held it for the whole `wait` seconds; `name` says who.
        ConfigurationError: there can be no lock there.
    """
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            Path(path).parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(f"No lock file can be made in {Path(path).parent}: {error.strerror}.") from error
    process, deadline = os.getpid(), time.monotonic() + wait
    _held.add(descriptor)
    try:
        while True:
            try:
                _try_to_lock(descriptor)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise lock_timeout(name, wait) from error
                time.sleep(PAUSE)
            except OSError as error:
                raise ConfigurationError(
                    f"The file system of {Path(path).parent} refuses locks ({error.strerror}), as some network file "
                    "systems do, and without them two programs would log in at once. Put the database on a local disk."
                ) from error
        try:
            yield
        finally:
            if process == os.getpid():  # A forked child would release the lock of its parent.
                _unlock(descriptor)
    finally:
        if process == os.getpid():
            _held.discard(descriptor)
            os.close(descriptor)


def is_held(path: str) -> bool:
    """Tell whether somebody holds the lock of this file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        # A shared lock, so that two readers at once do not mistake each other for the holder.
        _try_to_lock(descriptor, shared=True)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return False


def _close_the_parents() -> None:
    """In a forked child: give up the parent's locks, or they would outlive the parent. They are still the parent's."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork.
    os.register_at_fork(after_in_child=_close_the_parents)
