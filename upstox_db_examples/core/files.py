"""Write files that are either whole or absent, and open no file that must not be opened.

By POSIX a process loses all of its locks on a file when it closes any descriptor of that file. So a program that opens
and closes its own SQLite database, only to look what it is, takes its locks away, and the next program that closes the
database removes the log that this one goes on writing to. (See "How to corrupt an SQLite database file", section 2.2.)
That is why files are compared with the open ones before they are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import InvalidInput, StoreUnavailable

SQLITE_HEADER = b"SQLite format 3\0"
Identity = tuple[int, int]
"""What makes two paths one file: the device and the inode."""


def identity_of(path: str | os.PathLike[str]) -> Identity | None:
    """Return which file has this path now, or None if there is none. Symbolic links are followed."""
    try:
        found = os.stat(path)  # noqa: PTH116 - each read asks this, and a Path takes twice as long
    except OSError:
        return None
    return found.st_dev, found.st_ino


def files_open_here() -> dict[Identity, int]:
    """Return the files that this process has open, each with one of its descriptors. Windows cannot tell: none."""
    found = {}
    with suppress(OSError):
        for each in list(Path("/dev/fd").iterdir()):
            with suppress(OSError):  # Another thread may have closed it, and one was for this listing.
                file = os.fstat(int(each.name))
                found[file.st_dev, file.st_ino] = int(each.name)
    return found


def is_open_database(path: str | os.PathLike[str]) -> bool:
    """Tell whether the path is a SQLite database that this process has open."""
    identity = identity_of(path)
    descriptor = files_open_here().get(identity) if identity else None
    with suppress(OSError):  # It is open for writing only, so it is no database.
        return descriptor is not None and os.pread(descriptor, len(SQLITE_HEADER), 0) == SQLITE_HEADER
    return False


def open_ordinary(path: str | os.PathLike[str], errors: str = "strict") -> TextIO:
    """Open an ASCII file to read it. This never waits, as it would for the other end of a FIFO.

    Raises:
        InvalidInput: the path is a FIFO, a device or a folder, or a database that this process has open.
        OSError: the file is missing or cannot be read.
    """
    if not stat.S_ISREG(Path(_usable(path)).stat().st_mode):
        raise InvalidInput(f"{path} is not an ordinary file. Copy what it has into one.")
    if is_open_database(path):
        raise InvalidInput(f"{path} is a database in use. Choose another file.")
    return open(path, encoding="ascii", errors=errors, opener=lambda name, flags: os.open(name, flags | _NO_WAIT))


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # Something else may have this name since the check.


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """Return where to write a file: a symbolic link is followed, so that it stays and the file is where it leads.

    Raises:
        InvalidInput: a device, a FIFO or the like is there.
        StoreUnavailable: a folder is there, or the path leads nowhere.
    """
    text = _usable(path)
    try:
        target = Path(os.path.realpath(text))  # This fails if the working folder was deleted.
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be written: {error.strerror or type(error).__name__}.") from error
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be written: {error.strerror or type(error).__name__}.") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # The system refuses to replace a folder.
        raise InvalidInput(f"{path} is not an ordinary file and would be replaced. Choose another file.")
    return target


def _usable(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInput("The path of the file is not usable. Give its name as text.")
    return text


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file with mode 0600 beside `path`. It is renamed to `path` at the end, once it is on the disk.

    Raises:
        StoreUnavailable: the file cannot be written. An existing file at `path` stays.
    """
    import tempfile  # Only here, for it takes as long as the rest of this package.

    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        for each, flags in ((temporary, os.O_RDWR), (path.parent, os.O_RDONLY)):
            descriptor = os.open(each, flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if each == temporary:
                temporary.replace(path)
                temporary = None
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be written: {error.strerror or type(error).__name__}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
