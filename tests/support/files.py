"""Files that cannot grow."""

from __future__ import annotations

import resource


def limit_file_size(size: int) -> None:
    """The system refuses to let any file of this process grow beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
