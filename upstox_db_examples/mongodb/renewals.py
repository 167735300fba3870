"""One thread renews the leases of all threads of a store, and ends once there are none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

from ..core.errors import StorageError

logger = logging.getLogger(__name__)


class Lease(NamedTuple):
    name: str
    owner: str


class Renewals:
    """The leases that are renewed until they are given back.

    A thread for each lease was simpler, but to start and to wake it took as long as a message to the server. This one
    is not woken when a lease is given back. It finds out when it next looks.

    Args:
        renew: renews these leases at the server and returns those that other callers have taken over.
        release: gives a lease back at the server. It raises nothing.
        seconds: how long a lease lasts.
    """

    def __init__(
        self, renew: Callable[[Collection[Lease]], list[Lease]], release: Callable[[Lease], None], seconds: float
    ) -> None:
        self._renew, self._release, self._seconds = renew, release, seconds
        self.start_anew()

    def start_anew(self) -> None:
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._held: set[Lease] = set()
        self._unanswered: list[Lease] = []
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        """Renew this lease from now on.

        Raises:
            RuntimeError: the thread cannot be started.
        """
        with self._lock:
            self._held.add(lease)
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="lease renewals", daemon=True)
                thread.start()
                self._thread = thread

    def remove(self, lease: Lease, *, release: bool = False) -> None:
        """Renew this lease no more. Its renewal may be in progress. It finds another owner then, or no lease.

        Args:
            release: the thread also gives it back at the server.
        """
        with self._lock:
            self._held.discard(lease)
            if release and self._thread:  # Without one, there is no lease: it was lost, or never renewed.
                self._unanswered.append(lease)
                self._wake.set()

    def _run(self) -> None:
        pause = self._seconds / 3
        while True:
            self._wake.wait(pause)
            with self._lock:
                self._wake.clear()
                held, unanswered, self._unanswered = set(self._held), self._unanswered, []
                if not held and not unanswered:
                    self._thread = None
                    return
            for lease in unanswered:
                self._release(lease)
            pause = self._renew_all(held)

    def _renew_all(self, held: set[Lease]) -> float:
        """Renew these leases. Return how many seconds the next time is away."""
        try:
            lost = self._renew(held) if held else []
        except StorageError as error:
            for lease in held:
                logger.warning("The lease of %s could not be renewed: %s", lease.name, error)
            return self._seconds / 30  # Retry soon, while it can still succeed.
        for lease in lost:
            with self._lock:
                is_held = lease in self._held
                self._held.discard(lease)
            if is_held:
                logger.warning("Another caller has taken over the lease of %s", lease.name)
        return self._seconds / 3
