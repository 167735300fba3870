"""Write files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StoreUnavailable


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file with mode 0600 beside `path`. It is renamed to `path` at the end, once it is on the disk.

    Raises:
        StoreUnavailable: the file cannot be written. An existing file at `path` stays.
    """
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
