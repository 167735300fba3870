"""Follow a watch in a thread of its own, as a bot does."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

from upstox_db_examples import TokenStorage, Watch

from .forks import in_a_child
from .processes import USER, Address, made_up_login

SECONDS = 20.0  # A change that takes longer is lost, even on a busy machine.


class Given(NamedTuple):
    """What a watch gave, and when."""

    token: str | None
    at: float


class Followed:
    """What a watch gives, in order."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._given: queue.Queue[Given | Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def next(self, seconds: float = SECONDS) -> Given:
        """Return what the watch gives next."""
        try:
            given = self._given.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"the watch gave nothing for {seconds} s") from None
        assert isinstance(given, Given), f"it ended: {given!r}"
        return given

    def token(self) -> str | None:
        return self.next().token

    def ended_within(self, seconds: float = SECONDS) -> float:
        """Return how long it took from now until the iteration ended. Nothing may have been given meanwhile."""
        begin = time.monotonic()
        assert self._given.get(timeout=seconds) is None
        return time.monotonic() - begin

    def is_quiet(self, seconds: float) -> bool:
        """Return whether nothing is given for so long."""
        time.sleep(seconds)
        return self._given.empty()

    def _follow(self) -> None:
        try:
            for result in self.watch:
                self._given.put(Given(result["token"] if result else None, time.monotonic()))
            self._given.put(None)
        except Exception as error:
            self._given.put(error)


def store_when_told(connection: Connection, address: Address) -> None:
    """Store a token for each message that arrives, and send it."""
    store = address.open(login=made_up_login)
    connection.send("ready")
    while connection.recv():
        connection.send(store.store_token(USER)["token"])


def watch_and_fork(connection: Connection, address: Address) -> None:
    """Watch, fork three times, and send how the children ended and whether the parent's watch still tells."""

    def child() -> bool:
        if list(watch):
            return False
        followed.watch.close()
        with store.watch(USER) as mine:
            there = next(mine)
        return there is not None and there["token"] == token

    store = address.open(login=made_up_login)
    token = store.store_token(USER)["token"]
    watch = store.watch(USER)
    next(watch)
    followed = Followed(store.watch(USER))
    told = [followed.token() == token]
    ends = []
    for _ in range(3):
        ends.append(in_a_child(child))
        token = store.store_token(USER)["token"]
        told.append(followed.token() == token)
    connection.send((ends, told))


@contextmanager
def following(store: TokenStorage, user_id: str = USER) -> Iterator[Followed]:
    with store.watch(user_id) as watch:
        yield Followed(watch)


def lookouts() -> list[threading.Thread]:
    """Return the threads that look out for changes in this process."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("watch ")]
