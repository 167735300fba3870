"""Signals that wait: Ctrl-C between Upstox's answer and its token in the database would lose the token.

Python runs a signal's handler in the main thread, between any two instructions, and most handlers raise an exception
there. So while a login is under way in the main thread, a signal that has a Python handler is put off, and its handler
runs when the token is stored. In other threads no handler ever runs.

Rejected: to run the login in a thread of its own, which no signal reaches. A login of somebody's own may belong to the
thread that made it, as a browser's does.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

# Those whose handlers raise in some program: at Ctrl-C, at its end, or when a time is over. (To ask for the handlers of
# all 64 signals takes longer than all else that a login does here.)
RAISING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
Handler = Callable[[int, FrameType | None], Any]
_innermost: PutOff | None = None  # There is one main thread, so one login at the most puts signals off.


class PutOff:
    """Put signals off inside a `with`.

    At its end their handlers run, in the order in which the signals came. A second signal of the same kind is not put
    off: whoever presses Ctrl-C twice does not want to wait for the login.

    Attributes:
        before_a_token: a handler has raised at a moment when no token could exist yet (`raise_pending`).
    """

    def __init__(self) -> None:
        self.before_a_token = False
        self._handlers: dict[int, Handler] = {}
        self._pending: list[int] = []

    def __enter__(self) -> Self:
        global _innermost
        if threading.current_thread() is threading.main_thread() and _innermost is None:
            try:
                for number in RAISING:
                    handler = signal.getsignal(number)
                    if callable(handler):
                        signal.signal(number, self._put_off)
                        self._handlers[number] = handler
            except ValueError:  # A subinterpreter has a main thread as well, but no signals.
                return self
            _innermost = self
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: TracebackType | None) -> None:
        global _innermost
        if _innermost is not self:
            return
        _innermost = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            self._run_handlers()
        except BaseException as interrupt:
            if error is not None and getattr(error, "token", None) is not None:
                raise error from interrupt  # It carries a token, which must not be hidden behind the interrupt.
            raise

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        if number in self._pending:
            self._pending.remove(number)
            self._handlers[number](number, frame)
            return
        self._pending.append(number)
        logger.warning(
            "Signal %s waits until the login is over and its token stored. Send it again not to wait.",
            signal.Signals(number).name,
        )

    def _run_handlers(self) -> None:
        while self._pending:
            number = self._pending.pop(0)
            self._handlers[number](number, sys._getframe())


def raise_pending() -> None:
    """Run the handlers of signals that were put off. A login calls this while no token can exist yet."""
    current = _innermost
    if current is not None and threading.current_thread() is threading.main_thread():
        current.before_a_token = True
        current._run_handlers()
        current.before_a_token = False
