"""Log several accounts in, one after another, at a pace that Upstox allows. This works on every store."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .checks import require_user_id
from .errors import (
    InvalidInput,
    LoginError,
    LoginInterrupted,
    LoginLimited,
    StorageError,
    TokenNotStored,
)
from .forks import start_anew_in_children
from .life_cycle import LifeCycle, Wish
from .token import TokenResult

logger = logging.getLogger(__name__)

LIMITS = ((1, 1.0), (10, 60.0), (60, 1800.0))  # (most logins, in this many seconds)
ROUNDS = 3  # how many login attempts an account gets, if a retry can help
TOTP_SECONDS = 30  # a one-time password works once; a new one comes after this time


class BatchStopped(BaseException):
    """A batch was told to stop before its next login. An `Exception` would count as one more failed account."""


class Pace:
    """Decides when the next login may begin. Safe to share between threads.

    Rejected: a package for rate limits. It would save 40 lines, but it knows neither one-time passwords nor how long
    Upstox told us to wait.

    Args:
        limits: pairs of a number of logins and the seconds in which at most that many may begin. They cover all
            accounts together, because Upstox does not document whether it counts per account or per address.
        clock: returns seconds that only go forward.
        sleep: waits for a number of seconds.

    Example:
        >>> pace = Pace(limits=[(1, 2.0)])  # one login in two seconds
        >>> results = storage.store_token_batch(["AB1234"], pace=pace, progress=False)
    """

    def __init__(
        self,
        limits: Iterable[tuple[int, float]] = LIMITS,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._limits = tuple(limits)
        self._clock = clock
        self._sleep = sleep
        self._begun: deque[float] = deque(maxlen=max((count for count, _ in self._limits), default=1))
        self._held_until = 0.0
        self._next_turn: dict[str, float] = {}  # when each account gets an unused one-time password
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        """Make the lock anew. A forked child calls this, because another thread may have held it in the parent."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def turn(
        self,
        user_id: str,
        others: Callable[[float], list[float]] | None = None,
        *,
        stopped: threading.Event | None = None,
    ) -> Iterator[None]:
        """Wait for this account's turn; the caller logs in inside the `with` block.

        Args:
            user_id: the account.
            others: takes a number of seconds and returns how many seconds ago other programs began logins within that
                time. Upstox counts those logins as well.
            stopped: once this is set, no turn comes.

        Raises:
            BatchStopped: `stopped` is set.

        A `LoginLimited` raised inside the block holds all accounts back, or only this one if Upstox limits only it.
        """
        begin = self._wait(user_id, others, stopped)
        began, held_until = True, 0.0
        try:
            yield
        except StorageError as error:
            began = isinstance(error, TokenNotStored) or (isinstance(error, LoginError) and error.login_began)
            if isinstance(error, LoginLimited):
                held_until = self._clock() + error.retry_after
                if not error.account_only:
                    with self._lock:
                        self._held_until = max(self._held_until, held_until)
            raise
        finally:
            if began:
                held_until = max(held_until, self._clock() + TOTP_SECONDS - time.time() % TOTP_SECONDS)
            else:
                # It does not count. A store that is down then fails for a hundred accounts at once, and not over half
                # an hour.
                with self._lock, contextlib.suppress(ValueError):
                    self._begun.remove(begin)
            self._next_turn[user_id] = max(held_until, self._next_turn.get(user_id, 0.0))

    def _wait(
        self, user_id: str, others: Callable[[float], list[float]] | None, stopped: threading.Event | None
    ) -> float:
        """Wait for this account's turn and return when it came. A new limit may come during a sleep, so check again."""
        longest = max((seconds for _, seconds in self._limits), default=0.0)
        # A wait may take half an hour, and an event ends it at once. A sleep of the caller's own stays as it is.
        sleep = stopped.wait if stopped and self._sleep is time.sleep else self._sleep
        while True:
            if stopped and stopped.is_set():
                raise BatchStopped
            elsewhere = others(longest) if others and self._limits else []
            with self._lock:
                now = self._clock()
                begun = sorted([*self._begun, *(now - ago for ago in elsewhere)])
                full = [begun[-count] + seconds for count, seconds in self._limits if len(begun) >= count]
                wait = max(self._held_until, self._next_turn.get(user_id, now), *full, now) - now
                if wait <= 0:
                    self._begun.append(now)
                    return now
            logger.info("Waiting %.0f s before the login of %s", wait, user_id)
            sleep(max(wait, 0.001))  # The clock might not notice a shorter sleep.


# The whole process shares one pace, because Upstox counts logins across all batches and stores.
PACE = Pace()


class BatchResult(dict[str, Any]):
    """The result for one account: plain data without any token, as `store_token_batch` describes it.

    Attributes:
        exception: why the account failed. A `TokenNotStored` carries a working token that no database has.

    Example:
        >>> result, = storage.store_token_batch(["AB1234"], progress=False)
        >>> result["user_id"], result["success"], result["kept"]
        ('AB1234', True, False)
    """

    exception: Exception | None = None


def store_batch(
    life_cycle: LifeCycle, user_ids: Iterable[str], *, replace: bool, progress: bool, pace: Pace
) -> list[BatchResult]:
    """See `TokenStorage.store_token_batch`."""
    given = _check_user_ids(user_ids)
    due = list(dict.fromkeys(given))
    results: dict[str, BatchResult] = {}
    try:
        with progress_bar(len(due), "account", progress) as advance:
            # Accounts retry in rounds, so the others get their turn while one waits for its next one-time password.
            for tries_left in reversed(range(ROUNDS)):
                again = []
                for user_id in due:
                    results[user_id] = result = _store_one(life_cycle, user_id, replace, len(given) > 1, pace)
                    _raise_interrupt_behind(result.exception)
                    if tries_left and _can_be_tried_again(result.exception):
                        again.append(user_id)
                    else:
                        advance()
                due = again
    except BaseException as interrupt:
        # Nobody gets the results now, and some of them may have tokens that are nowhere else.
        unsaved = [
            result.exception
            for result in results.values()
            if isinstance(result.exception, StorageError) and result.exception.token
        ]
        if not unsaved:
            raise
        unsaved[0].others = unsaved[1:]
        raise unsaved[0] from interrupt
    return [results[user_id] for user_id in given]


def _raise_interrupt_behind(error: Exception | None) -> None:
    """Raise the Ctrl-C that came during this login. An error with a token has taken its place; see interrupts.py."""
    behind = error.__cause__ if error else None
    if behind is not None and not isinstance(behind, Exception):
        raise behind


def _store_one(life_cycle: LifeCycle, user_id: str, replace: bool, several: bool, pace: Pace) -> BatchResult:
    try:
        require_user_id(user_id)
        if not replace and (living := life_cycle.read(user_id)):
            return _success(user_id, living, kept=True)
        life_cycle.refuse_a_guess(user_id, several=several)
        # Wait here and not inside the login, because the login holds the user's lock.
        with pace.turn(user_id, life_cycle.seconds_since_other_logins):
            # Unlike `store_token`, a batch does not override an earlier refusal.
            token = life_cycle.log_in(user_id, Wish(replace=True)) if replace else life_cycle.read_or_log_in(user_id)
        return _success(user_id, token, kept=False)
    except Exception as error:
        return _failure(user_id, error)


def _can_be_tried_again(error: Exception | None) -> bool:
    """Return whether a retry is safe and useful. If a token may exist, the next login would kill it."""
    return isinstance(error, LoginLimited) or (isinstance(error, LoginInterrupted) and not error.token_may_exist)


def _success(user_id: str, token: TokenResult, *, kept: bool) -> BatchResult:
    whose = {"user_id": user_id, "token_id": token["token_id"], "success": True}
    return BatchResult(whose, expires_at=token["expires_at"], kept=kept)


def _failure(user_id: str, error: Exception) -> BatchResult:
    kind = type(error).__name__
    # Our own errors hold no secret. The text of a custom login's error may hold one.
    text = str(error) if isinstance(error, StorageError) else f"{kind}: the text may hold a secret. See .exception."
    result = BatchResult(user_id=user_id, success=False, error=text, error_type=kind)
    result.exception = error
    return result


def _check_user_ids(user_ids: Iterable[str]) -> list[str]:
    is_list = isinstance(user_ids, Iterable) and not isinstance(user_ids, str | bytes)
    given = list(user_ids) if is_list else []
    if not is_list or not all(isinstance(user_id, str) for user_id in given):
        raise InvalidInput("user_ids must be a list of user ids, and each must be a string.")
    return given


@contextlib.contextmanager
def progress_bar(total: int, unit: str, shown: bool) -> Iterator[Callable[[], object]]:
    """Yield a function to call after each finished item. Without tqdm there is no bar."""
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm if shown else None
    except ModuleNotFoundError:
        tqdm = None
    if tqdm is None:
        yield lambda: None
    else:
        with tqdm(total=total, desc=f"{unit.capitalize()}s", unit=unit) as bar:
            yield bar.update
