"""Delay signals: Ctrl-C would lose a token that Upstox has sent and that is not in the database yet.

Python runs a signal's handler in the main thread, between any two instructions, and most handlers raise an exception
there. So while a login runs in the main thread, a signal that has a Python handler is put off, and its handler runs
when the token is stored. So is SIGTERM, from a supervisor, where the system would end the process at once. Handlers
never run in other threads.

Rejected: run the login in a thread of its own, which no signal reaches. A custom login may be tied to the thread that
created it, as a browser is.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

# The signals whose handlers raise in some programs: at Ctrl-C, at shutdown, or at a timeout. (To look up the handlers
# of all 64 signals takes longer than everything else that a login does here.)
RAISING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
# Those that ask a process to end. Without a handler, the system ends it.
ENDING = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
Handler = Callable[[int, FrameType | None], Any]
_outermost: PutOff | None = None  # There is one main thread, so at most one login puts signals off.


class PutOff:
    """Put signals off inside a `with` block.

    The handlers run at the end of the block, in the order in which the signals came. A second signal of the same kind
    is not put off: anyone who presses Ctrl-C twice does not want to wait for the login.

    A login may itself use a store and log in there. Then only the outer login puts signals off, until it ends.

    Attributes:
        raised_before_a_token: the exception that a handler raised when no token could exist yet (`raise_pending`).
    """

    def __init__(self) -> None:
        self.raised_before_a_token: BaseException | None = None
        self._process = os.getpid()
        self._inner = 0  # how many logins are running inside this one
        self._is_inside: PutOff | None = None
        self._handlers: dict[int, Handler] = {}
        self._pending: list[int] = []

    def __enter__(self) -> Self:
        global _outermost
        if threading.current_thread() is threading.main_thread():
            # A child that was forked during a login inherits this state but takes no part in that login.
            if _outermost is not None and _outermost._process == self._process:
                self._is_inside = _outermost
                _outermost._inner += 1
                return self
            try:
                for number in RAISING:
                    handler = signal.getsignal(number)
                    if number in ENDING and handler is signal.SIG_DFL:
                        handler = _end_process
                    if callable(handler):
                        signal.signal(number, self._put_off)
                        self._handlers[number] = handler
            except ValueError:  # A subinterpreter has a main thread but no signals.
                return self
            _outermost = self
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: TracebackType | None) -> None:
        global _outermost
        if self._is_inside is not None:
            self._is_inside._inner -= 1
        if _outermost is not self:
            return
        _outermost = None
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._put_off:  # The login may have set a handler of its own; keep that.
                signal.signal(number, signal.SIG_DFL if handler is _end_process else handler)
        try:
            self._run_handlers()
        except BaseException as interrupt:
            if error is not None and getattr(error, "token", None) is not None:
                raise error from interrupt  # The error carries a token, so the interrupt must not hide it.
            raise

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._handlers[number](number, frame)
            return
        if number in self._pending:
            self._pending.remove(number)
            self._handlers[number](number, frame)
            return
        self._pending.append(number)
        logger.warning(
            "Signal %s waits until the login is over and its token is stored. Send it again to stop right now.",
            signal.Signals(number).name,
        )

    def _run_handlers(self) -> None:
        while self._pending:
            number = self._pending.pop(0)
            self._handlers[number](number, sys._getframe())


def _end_process(number: int, _frame: FrameType | None) -> None:
    """Do what the system does on this signal if nobody handles it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def raise_pending() -> None:
    """Run the handlers of signals that were put off. A login calls this while no token can exist yet."""
    current = _outermost
    if current is None or threading.current_thread() is not threading.main_thread():
        return
    if current._inner or current._process != os.getpid():
        return  # Only the inner login knows that it has no token yet. The outer one may have its own.
    try:
        current._run_handlers()
    except BaseException as interrupt:
        current.raised_before_a_token = interrupt
        raise
