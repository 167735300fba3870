"""Ctrl-C at every point of the pool's code."""

from __future__ import annotations

import contextlib
import dis
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import pytest

from upstox_db_examples.core import pool as pool_module
from upstox_db_examples.core.pool import Pool, PoolTimeout

from ..support.pools import Connection, Opener, is_open, wait_for
from ..support.processes import wait_until


def test_ctrl_c_while_waiting_leaves_the_queue(opener: Opener) -> None:
    pool = opener.pool(timeout=60)
    me = threading.get_ident()

    def interrupt() -> None:
        wait_for(pool, 1)
        signal.pthread_kill(me, signal.SIGINT)

    with ThreadPoolExecutor(1) as thread, pool.borrow():
        interrupting = thread.submit(interrupt)
        with pytest.raises(KeyboardInterrupt), pool.borrow():
            pass
        interrupting.result()
        assert (pool.counts(), pool.waiting) == ((1, 0), 0)
    with pool.borrow() as conn:
        assert is_open(conn)
    pool.close()


class InterruptAt:
    """Ctrl-C at the n-th point in the pool's code at which CPython would run a signal handler.

    These points are the start of a function, the end of a call, and a jump back.
    """

    def __init__(self, point: int) -> None:
        self._left, self.raised = point, False
        self._after_a_call: FrameType | None = None

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != pool_module.__file__ or frame.f_code.co_name == "__del__":
            return None  # Python itself ignores an exception in a `__del__`.
        frame.f_trace_opcodes = True
        if event == "call" or (event == "opcode" and frame is self._after_a_call):
            self._left -= 1
            if self._left == 0:
                self.raised = True
                raise KeyboardInterrupt
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]] if event == "opcode" else ""
        ends = name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD")
        self._after_a_call = frame if ends else None
        return self.trace

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)
            self._after_a_call = None


def borrow_one(pool: Pool[Connection]) -> None:
    with pool.borrow():
        pass


def borrow_and_fail(pool: Pool[Connection]) -> None:
    with contextlib.suppress(ZeroDivisionError), pool.borrow():
        raise ZeroDivisionError


def borrow_a_dead_one(pool: Pool[Connection]) -> None:
    pool.healthy = lambda _: False
    borrow_one(pool)


USES = {
    "one that has to be opened": (0, borrow_one),
    "an idle one": (1, borrow_one),
    "a dead one": (1, borrow_a_dead_one),
    "one that breaks": (1, borrow_and_fail),
}


def at_each_point(use: Callable[[], None], begin: Callable[[], None], check: Callable[[], None]) -> int:
    """Repeat the use, each time interrupted one point later. Return the number of points."""
    for point in itertools.count(1):
        begin()
        interrupt = InterruptAt(point)
        # After this statement nothing refers to the exception any more, so the loan is gone as well.
        with contextlib.suppress(KeyboardInterrupt), interrupt.traced():
            use()
        check()
        if not interrupt.raised:
            return point - 1
    raise AssertionError


class TestCtrlCAtAnyPoint:
    @pytest.fixture(autouse=True)
    def _pool(self, opener: Opener) -> None:
        self.opener = opener

    def begin(self, idle: int = 0, **options: Any) -> None:
        self.pool = self.opener.pool(**options)
        for _ in range(idle):
            borrow_one(self.pool)

    def check(self, in_use: int = 0) -> None:
        assert (self.pool.counts()[0], self.pool.waiting) == (in_use, 0)
        with contextlib.ExitStack() as loans:
            for _ in range(self.pool.size - in_use):
                loans.enter_context(self.pool.borrow())
        self.pool.close()

    @pytest.mark.parametrize(("idle", "use"), USES.values(), ids=USES)
    def test_of_a_loan_loses_no_place(self, idle: int, use: Callable[[Pool[Connection]], None]) -> None:
        assert at_each_point(lambda: use(self.pool), lambda: self.begin(idle, size=2), self.check) > 10

    def test_of_a_wait_in_vain_loses_no_place(self) -> None:
        loan: list[AbstractContextManager[Connection]] = []

        def begin() -> None:
            self.begin(timeout=0.01)
            loan[:] = [self.pool.borrow()]
            loan[0].__enter__()

        def use() -> None:
            with contextlib.suppress(PoolTimeout):
                borrow_one(self.pool)

        def check() -> None:
            assert self.pool.counts() == (1, 0)
            loan[0].__exit__(None, None, None)
            self.check()

        assert at_each_point(use, begin, check) > 10

    def test_of_a_wait_that_is_granted_loses_no_place(self) -> None:
        with ThreadPoolExecutor(1) as thread:

            def begin() -> None:
                self.begin()
                self.lent, self.over = threading.Event(), threading.Event()
                self.holding = thread.submit(hold)
                self.lent.wait(10)

            def hold() -> None:
                with self.pool.borrow():
                    self.lent.set()
                    wait_until(lambda: bool(self.pool.waiting) or self.over.is_set())

            def check() -> None:
                self.over.set()
                self.holding.result()
                self.check()

            assert at_each_point(lambda: borrow_one(self.pool), begin, check) > 10

    @pytest.mark.parametrize("broken", [False, True])
    def test_of_a_return_still_serves_whoever_waits(self, broken: bool) -> None:
        with ThreadPoolExecutor(1) as thread:

            def begin() -> None:
                self.begin()
                self.loans = [self.pool.borrow()]
                self.loans[0].__enter__()
                self.waiting = thread.submit(borrow_one, self.pool)
                wait_for(self.pool, 1)

            def use() -> None:
                self.loans.pop().__exit__(None, ZeroDivisionError() if broken else None, None)

            def check() -> None:
                self.waiting.result(5)
                self.check()

            assert at_each_point(use, begin, check) >= 5
