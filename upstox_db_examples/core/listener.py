"""How a store learns that a token may have changed: its database tells, or is asked every now and then."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import NamedTuple

MOMENT = 0.1  # seconds; nobody notices that a thread ends this much later
POLL = 0.5  # seconds between two questions to a server that cannot tell


class TokenState(NamedTuple):
    """What can be known of a user's newest token without reading it. The default is that there is none.

    Attributes:
        generation: see backend.py.
        active: it has not ended. It may have expired.
        in_doubt: it is active, and a login has marked it.
    """

    generation: int = 0
    active: bool = False
    in_doubt: bool = False


class Listener(ABC):
    """Tells when a token may have changed. One thread uses it."""

    @abstractmethod
    def wait(self) -> bool:
        """Wait for a moment, or until the database tells of a change. Return whether a token may have changed.

        A moment is less than a second, because the thread that waits may be asked to end.

        Raises:
            StorageError: this listener can tell no more. Close it and open another one.
        """

    def close(self) -> None:
        """Close what this listener opened. This never raises."""
        return


class Polling(Listener):
    """Says every `POLL` seconds that a token may have changed. It needs no help from the database."""

    def __init__(self) -> None:
        self._next = time.monotonic() + POLL

    def wait(self) -> bool:
        time.sleep(min(MOMENT, max(0.0, self._next - time.monotonic())))
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + POLL
        return True
