"""Files that cannot grow."""

from __future__ import annotations

import resource


def limit_file_size(size: int) -> None:
    """Limit the size of every file that this process writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
