"""What a backend is told about the program that uses it: the time, the name in the audit trail, how long to wait."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

from .checks import require_aware
from .errors import InvalidInput


class Context:
    """What a backend is told about the program that uses it.

    Attributes:
        login_wait: how long to wait for a lock, in seconds.
    """

    def __init__(self, clock: Callable[[], datetime] | None, actor: str | None, login_wait: float) -> None:
        self._clock, self._actor = clock, actor
        self.login_wait = login_wait

    @property
    def actor(self) -> str:
        """The name in the audit trail."""
        return self._actor or f"{_user_and_host()}:{os.getpid()}"

    def now(self) -> datetime:
        """Return the current time in UTC and in whole seconds, which every store can keep.

        Raises:
            InvalidInput: the program's clock returned no aware datetime, or one too near the first or the last year.
        """
        if self._clock is None:
            return datetime.fromtimestamp(int(time.time()), UTC)
        now = require_aware(self._clock(), "The result of clock").replace(microsecond=0)
        if not 1970 <= now.year < 9999:  # Some days are added to it or taken off.
            raise InvalidInput("The result of clock must be within the years 1970 to 9998.")
        return now


@functools.cache
def _user_and_host() -> str:
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may run as a user id without a name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}".encode(errors="replace").decode()
