"""Read a file of keys or credentials that only its owner can read."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from pathlib import Path

from .environment import expand_home
from .errors import ConfigurationError
from .token import Secret

LARGEST = 1_000_000  # bytes; a key file has about 50, and a hundred accounts have 30,000


def read_secret_file(path: str | os.PathLike[str], what: str, failed: str = "could not be read") -> Secret:
    """Return the text of the file. A byte order mark is dropped.

    Args:
        what, failed: for messages: what the file is, such as "the key file", and what went wrong with it.

    Raises:
        ConfigurationError: the file is not there, others can read or change it, or it is not UTF-8 text. The error
            shows nothing of its content, and its cause does not either.
    """
    file = expand_home(path)
    try:
        # Otherwise a FIFO that nobody writes to would block for ever. (A shell's <(...) is a FIFO with a writer.)
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _refuse_others(os.fstat(descriptor), file, what)
            os.set_blocking(descriptor, True)
            data = b""
            while len(data) <= LARGEST and (part := os.read(descriptor, LARGEST)):
                data += part
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"{what.capitalize()} {file} {failed}: {reason}.") from error
    text, problem = _decode(data)
    if text is not None:
        return text
    del data, part  # A traceback that prints local variables must not show them.
    raise ConfigurationError(f"{what.capitalize()} {file} {problem}")


def _decode(data: bytes) -> tuple[Secret | None, str]:
    """Return the text, or what is wrong. An error raised here would hold the content (UnicodeDecodeError.object)."""
    if len(data) > LARGEST:
        return None, "is too large to be right."
    if b"\0" in data:
        return None, "is not UTF-8 text. It may be in UTF-16, as PowerShell writes it. Save it as UTF-8."
    try:
        return Secret(data.decode("utf-8-sig")), ""
    except UnicodeDecodeError:
        return None, "is not UTF-8 text. Save it as UTF-8; a key has to be in base64."


def _refuse_others(status: os.stat_result, file: Path, what: str) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        raise ConfigurationError(f"{what.capitalize()} {file} is not an ordinary file.")
    me = os.geteuid()
    if status.st_mode & 0o077:
        raise ConfigurationError(
            f"Others can read {what} {file}. "
            + (f"Run: chmod 600 {shlex.quote(str(file))}" if status.st_uid == me else "Its owner has to change that.")
        )
    # Root may read files of other users, such as one that is mounted into a container.
    if me not in (0, status.st_uid) and status.st_uid != 0:
        raise ConfigurationError(f"{what.capitalize()} {file} belongs to another user, who could change it.")
