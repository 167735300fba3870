"""Watching a user's token: the present one at once, and then each new one, whoever stored it.

The database only tells that something may be newer (listener.py). Then the states of the watched users are read, which
is cheap and not audited, and compared. Only a watch whose token is not the stored one reads it, as every other reader
does: decrypted, and audited by a store that audits reads. So a notification carries no token, and one that comes twice,
or for nothing, costs one small query.

All watches of a store share one thread, the lookout, and one listener. A connection that is lost costs no change: the
states are compared again as soon as there is another one.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from copy import copy
from datetime import datetime, timedelta
from typing import Self

from .backend import Backend
from .errors import StorageError, StoreUnavailable
from .forks import start_anew_in_children
from .life_cycle import LifeCycle
from .listener import Listener, Polling, TokenState
from .settings import Settings
from .token import TokenResult

logger = logging.getLogger(__name__)

# Programs of an earlier version do not tell of their tokens, and a notification can be lost with its connection. So the
# states are also read this often: 2 small queries a minute for a store.
LOOK_ANYWAY = 30.0
LISTEN_AGAIN = 10.0  # seconds for which we poll if the database cannot tell; then it may have learned to
PAUSE = 0.5  # seconds between two attempts while the database does not answer
LONGEST_WAIT = 60.0  # seconds; a suspended machine does not count the time that it slept
_listeners: set[Listener] = set()  # all that are open, so that a forked child never frees, and so closes, its parent's


class News:
    """What the lookout tells one watch. Any thread may use it.

    A thread that holds its lock may take it again, so a signal's handler may close a watch.

    Attributes:
        user_ids: the user id as given and in upper case, as `Users.find` tries them.
        state: the state of the user's newest token; None until the lookout has looked.
        over: there will be no more news.
    """

    def __init__(self, user_id: str) -> None:
        self.user_ids = list(dict.fromkeys((user_id, user_id.upper())))
        self.state: TokenState | None = None
        self.over = False
        self._error: StorageError | None = None
        self._changed = threading.Condition()

    def tell(self, states: Mapping[str, TokenState]) -> None:
        """Take the state of this user from these."""
        found = [states[user_id] for user_id in self.user_ids if user_id in states] or [TokenState()]
        with self._changed:
            self.state, self._error = next((state for state in found if state.active), found[0]), None
            self._changed.notify_all()

    def fail(self, error: StorageError) -> None:
        """Let the next caller of `wait` raise this."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def end(self) -> None:
        """Say that there will be no more news."""
        with self._changed:
            self.over = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """End in a forked child, where a thread of the parent may seem to hold the condition for ever."""
        self._changed, self.over = threading.Condition(), True

    def wait(self, known: TokenState | None, seconds: float | None) -> None:
        """Wait until the state is another than the known one, or it is over, or for this many seconds.

        Raises:
            StorageError: the lookout met an error that has to be mended first.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.over or self._error or self.state != known, seconds)
            error, self._error = self._error, None
        if error is not None:
            raise copy(error) from error  # a copy, because each of many threads adds its own traceback


class Lookout:
    """Looks out for changes on behalf of all watches of a store. Its thread runs as long as there is a watch."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock, self._closed = threading.RLock(), False
        self._thread: threading.Thread | None = None
        # A watch that nobody refers to any more is over, as if it had been closed.
        self._watched: weakref.WeakSet[News] = weakref.WeakSet()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        """End the inherited watches in this child. It has neither the parent's thread nor a connection of its own."""
        inherited, self._watched = list(self._watched), weakref.WeakSet()
        self._lock, self._thread = threading.RLock(), None
        for news in inherited:
            news.abandon()

    def watch(self, user_id: str) -> News:
        """Tell the news of this user from now on.

        Raises:
            StoreUnavailable: the store is closed, or the thread cannot be started.
        """
        news = News(user_id)
        with self._lock:
            if self._closed:
                raise StoreUnavailable("This store is closed.")
            self._watched.add(news)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"watch {self._backend.where}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise StoreUnavailable(
                        f"The thread that watches {self._backend.where} cannot be started: the program is ending, or "
                        "has too many threads. Watch earlier, or with fewer threads."
                    ) from error
                self._thread = thread
        return news

    def close(self) -> None:
        """End all watches, and wait until the thread has let go of the database."""
        with self._lock:
            self._closed = True
            watches, thread = list(self._watched), self._thread
        for news in watches:
            news.end()
        if thread is not None:
            thread.join(1)  # Longer only if the server does not answer. The thread then ends by itself.

    def _run(self) -> None:
        listener: Listener | None = None
        look_at = listen_again_at = 0.0
        is_logged = False
        while self._is_needed():
            try:
                if listener is None or time.monotonic() >= listen_again_at:
                    _close(listener)
                    listener, listen_again_at = self._listen()
                    look_at = 0.0  # Something may have changed before it listened.
                if time.monotonic() >= look_at:
                    self._look()
                    look_at, is_logged = time.monotonic() + LOOK_ANYWAY, False
                if listener.wait():
                    look_at = 0.0
            except StorageError as error:
                _close(listener)
                listener = None
                if self._closed:
                    break
                if not isinstance(error, StoreUnavailable):
                    for news in self._watches():
                        news.fail(error)
                elif not is_logged:
                    logger.warning("New tokens are not noticed until the store answers again: %s", error)
                    is_logged = True
                time.sleep(PAUSE)
        _close(listener)

    def _is_needed(self) -> bool:
        """Return whether there is a watch. Otherwise the thread ends, and the next watch starts another one."""
        with self._lock:
            needed = not self._closed and any(not news.over for news in self._watched)
            if not needed and not self._closed:  # `close` waits for one that ends because the store is closed.
                self._thread = None
        return needed

    def _watches(self) -> list[News]:
        with self._lock:
            return [news for news in self._watched if not news.over]

    def _listen(self) -> tuple[Listener, float]:
        """Return a listener, and when to try to get a better one."""
        again_at = float("inf")
        try:
            listener = self._backend.listen()
        except StorageError as error:
            logger.debug("%s cannot tell of new tokens now, so it is polled: %s", self._backend.where, error)
            listener, again_at = Polling(), time.monotonic() + LISTEN_AGAIN
        _listeners.add(listener)
        return listener, again_at

    def _look(self) -> None:
        watches = self._watches()
        states = self._backend.read_states({user_id for news in watches for user_id in news.user_ids})
        for news in watches:
            news.tell(states)


def _close(listener: Listener | None) -> None:
    if listener is not None:
        listener.close()
        _listeners.discard(listener)


class Watch(Iterator[TokenResult | None]):
    """An iterator over a user's tokens: the present one at once, and then each new one, whoever stored it.

    It gives None when the user has no working token: it was revoked or has expired, or it is in doubt when the watch
    begins. (A token that comes into doubt later is not taken back. You have it, and a 401 will tell if it is dead.)
    Tokens that were replaced before you asked for the next one are left out. A watch never logs in. It waits while the
    database cannot be reached, and then gives the last token, if that is another one.

    Each token is handed out as `get_valid_token` does it: it is counted as a use and audited by a store that audits
    reads, and an error means the same. After an error you can go on: the next call tries again.

    One thread at a time may iterate. `close` may come from any thread and from a signal's handler; then the iteration
    ends. It also ends when the store is closed, and in a forked child, which makes a watch of its own. It is a context
    manager. A watch that is neither closed nor used any more ends by itself.

    Attributes:
        user_id: the user.

    Example:
        >>> with storage.watch("AB1234") as watch:
        ...     at_once = next(watch)  # None, because there is no token yet
        ...     token = storage.store_token("AB1234")
        ...     next(watch)["token"] == token["token"]
        True
    """

    def __init__(self, user_id: str, news: News, life_cycle: LifeCycle, settings: Settings, store: object) -> None:
        self.user_id = user_id
        self._news, self._life_cycle = news, life_cycle
        self._margin, self._now = settings.policy.margin, settings.context.now
        self._store = store  # A store that nobody refers to closes its connections.
        self._given: int | None = None  # the generation of the last token given; 0 for None
        self._seen: TokenState | None = None  # the state when the store was asked last
        self._given_until: datetime | None = None

    def __next__(self) -> TokenResult | None:
        """Wait for the next token, for as long as it takes.

        Raises:
            StopIteration: the watch or the store is closed.
            KeyUnavailable, TokenRefused: there is a token, but it cannot be read or trusted.
            ConfigurationError: the database is not usable any more.
        """
        while not self._news.over:
            state, seconds = self._news.state, self._seconds_left()
            if self._is_due(state) or seconds == 0:
                seconds = PAUSE
                try:
                    found = self._life_cycle.find(self.user_id)
                except StoreUnavailable as error:
                    logger.info("The token of %s cannot be read now: %s", self.user_id, error)
                else:
                    # A copy in the hybrid's Redis may be a moment behind. Then ask again.
                    generation, known = found.generation if found else 0, state or TokenState()
                    if found is None or generation >= known.generation + (known.generation > 0 and not known.active):
                        result = self._life_cycle.hand_out(found) if found else None
                        is_another = generation != self._given
                        self._given, self._seen = generation, state
                        self._given_until = found.expires_at - self._margin if found else None
                        if is_another:
                            return result
                        continue
            self._news.wait(state, seconds)
        raise StopIteration

    def close(self) -> None:
        """End the iteration. A second call is harmless."""
        self._news.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.user_id!r})"

    def _is_due(self, state: TokenState | None) -> bool:
        """Return whether the store may have another token than the one given last."""
        if self._given is None or state is None:
            return self._given is None
        if self._given and (state.generation, state.active) == (self._given, True):
            return False  # The mark of a login comes and goes, and the token stays.
        if not self._given and not state.active:
            return False  # There was none, and there is none.
        return state != self._seen

    def _seconds_left(self) -> float | None:
        """Return how long to wait at most. It is 0 when the token given last has expired."""
        if self._given_until is None:
            return None
        left = (self._given_until - self._now()) / timedelta(seconds=1)
        return min(max(left, 0.0), LONGEST_WAIT)
