"""Worker threads for asyncio and trio. Their number is bounded, and a cancellation does not interrupt their work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any
from weakref import WeakKeyDictionary

from anyio import CancelScope, CapacityLimiter, get_cancelled_exc_class, to_thread
from anyio.lowlevel import RunVar

from .core.errors import StorageError


class Call[R]:
    """A function and its arguments. The repr hides them: a traceback that prints local variables would show a token."""

    __slots__ = ("_args", "_function", "_kwargs")

    def __init__[**P](self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs

    def __call__(self) -> R:
        return self._function(*self._args, **self._kwargs)


class Lane:
    """Worker threads for one kind of work.

    Args:
        threads: how many of them run at the same time, for each event loop.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @property
    def limiter(self) -> CapacityLimiter:
        """The limiter of the running event loop, because anyio's limiters belong to one loop."""
        try:
            limiters = _limiters.get()
        except LookupError:
            _limiters.set(limiters := WeakKeyDictionary())
        if self not in limiters:
            limiters[self] = CapacityLimiter(self._threads)
        return limiters[self]

    async def run[R](self, call: Callable[[], R], *, on_cancel: Callable[[], object] = lambda: None) -> R:
        """Run the call on a thread and return its result.

        A cancelled call that has not begun does not begin. One that has begun is finished first, because its login may
        have made a token that still has to be stored, and because the thread holds locks and a place in this lane.
        (Rejected: to abandon the thread, as anyio itself does when asyncio's `Task.cancel` comes. Nobody would see the
        error with a token that could not be stored, and the bound on threads would not hold.)

        Args:
            on_cancel: is called on a thread if a call that has begun is cancelled. It may make the call end sooner.

        Raises:
            StorageError: in place of the cancellation, if the call failed with a token that no database has.
        """
        future = Future[R]()
        async with self.limiter:
            try:
                await to_thread.run_sync(_settle, future, call, abandon_on_cancel=True, limiter=CapacityLimiter(1))
            except BaseException as stop:  # In trio, Ctrl-C arrives here as well.
                if isinstance(stop, GeneratorExit) or future.cancel():
                    raise
                with CancelScope(shield=True):
                    interrupt = await _until_done(future, on_cancel)
                error = future.exception()
                if isinstance(error, StorageError) and error.token is not None:
                    raise error from error.__cause__
                if interrupt is not None:
                    raise interrupt from None
                raise
        try:
            return future.result()
        finally:
            del future  # Its error's traceback leads to this frame. Together they would outlive the call.


_limiters: RunVar[WeakKeyDictionary[Lane, CapacityLimiter]] = RunVar("the limiters of upstox_db_examples")


def _settle[R](future: Future[R], call: Callable[[], R]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)


async def _until_done(future: Future[Any], on_cancel: Callable[[], object]) -> KeyboardInterrupt | None:
    """Wait until the call is done, and return the Ctrl-C that came meanwhile."""

    def finish() -> None:
        try:
            on_cancel()
        finally:
            wait([future])

    interrupt = None
    while not future.done():
        try:
            # A scope does not hold asyncio's `Task.cancel` back, and `asyncio.run` cancels every task when it ends.
            with contextlib.suppress(get_cancelled_exc_class()):
                await to_thread.run_sync(finish, abandon_on_cancel=True, limiter=CapacityLimiter(1))
        except KeyboardInterrupt as error:  # Nor does a scope hold trio's back.
            interrupt = error
    return interrupt
