"""Files that are all written, or none of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .core.errors import ConfigurationError


def write(files: Mapping[str, bytes], folder: Path) -> int:
    """Write what is not there yet, all of it or nothing; how many that was. What is the same is left alone.

    Raises:
        ConfigurationError: other files have these names, or the folder cannot be written.
    """
    differ, due, made = [], [], []
    try:
        for name, content in files.items():
            try:
                (folder / name).lstat()  # A link to nowhere is there, too.
            except FileNotFoundError:
                due.append(folder / name)
            else:
                differ += [name] if (folder / name).read_bytes() != content else []
        if differ:
            raise ConfigurationError(
                f"{folder} has different files with these names, so nothing was written: {', '.join(sorted(differ))}. "
                "Choose another folder, or move them away."
            )
        try:
            for target in due:
                for parent in reversed(target.parents):
                    if not parent.exists():
                        parent.mkdir()
                        made.append(parent)
                made.append(_part(target))
                _part(target).write_bytes(files[target.relative_to(folder).as_posix()])
            # Each gets its name when all are on the disk. Half a file would differ when the command is run again.
            for target in due:
                _part(target).replace(target)
        except BaseException:
            for each in reversed(made):
                with suppress(OSError):
                    each.rmdir() if each.is_dir() else each.unlink()
            raise
    except OSError as error:
        where = error.filename or folder
        raise ConfigurationError(f"{where} cannot be read or written: {error.strerror}. Nothing was copied.") from error
    return len(due)


def write_file(content: bytes, file: Path) -> int:
    """Write one file into a folder that exists. Return 0 if it was there already, and 1 otherwise.

    Raises:
        ConfigurationError: there is no such folder, a different file has this name, or it cannot be written.
    """
    with suppress(OSError):  # `write` reports what cannot be looked at.
        if not file.parent.is_dir():
            raise ConfigurationError(f"There is no folder {file.parent}. Make it first. Nothing was copied.")
        if file.is_file() and file.read_bytes() != content:
            raise ConfigurationError(f"{file} is there and differs. Choose another name, or move it away.")
    return write({file.name: content}, file.parent)


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")
