"""What the pool promises, on SQLite files. `test_pooled.py` and `test_postgresql.py` have the stores that use it."""

from __future__ import annotations

import contextlib
import dis
import itertools
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from upstox_db_examples.core import pool as pool_module
from upstox_db_examples.core.pool import Pool, PoolClosed, PoolTimeout

from ..support.processes import wait_until

Connection = sqlite3.Connection
CROWD = 32


class Opener:
    """Opens connections to a SQLite file and counts those that are open."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.opened = self.open_now = self.most = 0
        self.fails = False

    def open(self) -> Connection:
        if self.fails:
            raise sqlite3.OperationalError("unable to open database file")
        with self._lock:
            self.opened += 1
            self.open_now += 1
            self.most = max(self.most, self.open_now)
        return sqlite3.connect(self._path, check_same_thread=False)

    def close(self, conn: Connection) -> None:
        with self._lock:
            self.open_now -= 1
        conn.close()

    def pool(self, size: int = 1, *, timeout: float = 10, **options: Any) -> Pool[Connection]:
        return Pool(self.open, self.close, size=size, timeout=timeout, **options)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path / "some.db")


def is_open(conn: Connection) -> bool:
    try:
        return bool(conn.execute("SELECT 1").fetchone())
    except sqlite3.ProgrammingError:
        return False


def wait_for(pool: Pool[Connection], waiting: int) -> None:
    wait_until(lambda: len(pool._waiting) == waiting)


@contextmanager
def all_lent(pool: Pool[Connection]) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(pool.size):
            stack.enter_context(pool.borrow())
        yield


# How many


def test_nothing_is_opened_before_it_is_needed_and_the_last_used_is_lent_first(opener: Opener) -> None:
    pool = opener.pool(3)
    assert (pool.counts(), opener.opened) == ((0, 0), 0)
    with pool.borrow() as first:
        assert pool.counts() == (1, 0)
        with pool.borrow() as second:
            assert second is not first
    assert pool.counts() == (0, 2)
    with pool.borrow() as again:
        assert again is first
    assert opener.opened == 2
    pool.close()


def test_a_crowd_never_has_more_open_than_agreed_whatever_happens_to_them(opener: Opener) -> None:
    chance = random.Random(5)
    pool = opener.pool(3, healthy=lambda _: chance.random() > 0.1)

    def use(number: int) -> None:
        with contextlib.suppress(ZeroDivisionError), pool.borrow() as conn:
            assert is_open(conn)
            if number % 10 == 0:
                raise ZeroDivisionError

    with ThreadPoolExecutor(CROWD) as threads:
        list(threads.map(use, range(2000)))
    assert opener.most == 3
    assert opener.opened > 200, "many were replaced"
    assert pool.counts() == (0, opener.open_now)
    pool.close()
    assert opener.open_now == 0


# Waiting


@pytest.mark.parametrize("size", [1, 3])
def test_one_more_than_there_are_gets_the_error_in_time(opener: Opener, size: int) -> None:
    pool = opener.pool(size, timeout=0.4)
    with all_lent(pool):
        begin = time.monotonic()
        with pytest.raises(PoolTimeout, match=rf"All {size} were in use for 0.4 s"), pool.borrow():
            pass
        assert 0.4 <= time.monotonic() - begin < 0.6
        assert (pool.counts(), pool._waiting) == ((size, 0), {})
    with pool.borrow() as conn:
        assert is_open(conn)
    pool.close()


def test_those_who_wait_are_served_in_the_order_in_which_they_came(opener: Opener) -> None:
    pool, served = opener.pool(), list[int]()

    def use(number: int) -> None:
        with pool.borrow():
            served.append(number)

    with ThreadPoolExecutor(CROWD) as threads, pool.borrow():
        for number in range(CROWD):
            threads.submit(use, number)
            wait_for(pool, number + 1)
    assert served == list(range(CROWD))
    pool.close()


class BargingPool:
    """A pool as one writes it in a hurry: whoever comes first after a return has it, whoever has waited."""

    def __init__(self, opener: Opener, size: int) -> None:
        self.size, self._idle = size, [opener.open() for _ in range(size)]
        self._changed, self._waiting = threading.Condition(), 0

    @contextmanager
    def borrow(self) -> Iterator[Connection]:
        with self._changed:
            self._waiting += 1
            while not self._idle:
                self._changed.wait(10)
            self._waiting -= 1
            conn = self._idle.pop()
        yield conn
        with self._changed:
            self._idle.append(conn)
            self._changed.notify()

    def close(self) -> None:
        for conn in self._idle:
            conn.close()


def turns(pool: Any, total: int, waiting: Callable[[], int]) -> list[int]:
    """How often each thread of a crowd had its turn: all wait before the first one is served."""
    counts, ticket = [0] * CROWD, itertools.count()

    def use(number: int) -> None:
        while next(ticket) < total:
            with pool.borrow() as conn:
                assert is_open(conn)
                counts[number] += 1

    with ThreadPoolExecutor(CROWD) as threads:
        with ExitStack() as lent:
            for _ in range(pool.size):
                lent.enter_context(pool.borrow())
            working = [threads.submit(use, number) for number in range(CROWD)]
            wait_until(lambda: waiting() == CROWD)
        for each in working:
            each.result()
    pool.close()
    assert sum(counts) == total
    return counts


@pytest.mark.parametrize("size", [1, 5])
def test_in_a_crowd_nobody_has_twice_as_many_turns_as_another(opener: Opener, size: int) -> None:
    pool = opener.pool(size)
    counts = turns(pool, 100 * CROWD, lambda: len(pool._waiting))
    assert max(counts) <= 2 * min(counts), counts


def test_a_pool_that_lets_others_in_between_fails_that_test(opener: Opener) -> None:
    pool = BargingPool(opener, 1)
    counts = turns(pool, 100 * CROWD, lambda: pool._waiting)
    assert max(counts) > 2 * min(counts)


# What comes back


def test_a_connection_that_saw_an_error_is_closed_and_replaced(opener: Opener) -> None:
    pool = opener.pool()
    with pytest.raises(ZeroDivisionError), pool.borrow() as broken:
        raise ZeroDivisionError
    assert not is_open(broken)
    assert pool.counts() == (0, 0)
    with pool.borrow() as sound:
        assert is_open(sound)
    pool.close()


def test_an_idle_connection_is_lent_before_another_is_opened_in_place_of_a_broken_one(opener: Opener) -> None:
    pool = opener.pool(2)
    with contextlib.suppress(ZeroDivisionError), pool.borrow():
        with pool.borrow() as sound:
            pass
        raise ZeroDivisionError
    with pool.borrow() as conn:
        assert conn is sound
    pool.close()


def test_an_idle_connection_that_cannot_be_used_any_more_is_closed_and_replaced(opener: Opener) -> None:
    dead: list[Connection] = []
    pool = opener.pool(healthy=lambda conn: conn not in dead)
    with pool.borrow() as first:
        dead.append(first)
    with pool.borrow() as second:
        assert second is not first
    assert not is_open(first)
    assert opener.most == 1
    pool.close()


def test_an_open_that_fails_gives_its_place_to_the_next(opener: Opener) -> None:
    pool = opener.pool()
    with ThreadPoolExecutor(2) as threads:
        # The connection of the first one breaks, so the second one has to open another, and the third one after it.
        with contextlib.suppress(ZeroDivisionError), pool.borrow():
            second = threads.submit(pool.borrow().__enter__)
            wait_for(pool, 1)
            loan = pool.borrow()
            third = threads.submit(loan.__enter__)
            wait_for(pool, 2)
            opener.fails = True
            raise ZeroDivisionError
        for failed in (second, third):
            assert isinstance(failed.exception(5), sqlite3.OperationalError)
    assert pool.counts() == (0, 0)
    opener.fails = False
    with pool.borrow() as conn:
        assert is_open(conn)
    pool.close()


# The end


def test_close_closes_the_idle_ones_now_and_the_others_when_they_come_back(opener: Opener) -> None:
    pool = opener.pool(2)
    with pool.borrow() as lent:
        with pool.borrow() as idle:
            pass
        pool.close()
        assert (is_open(idle), is_open(lent)) == (False, True)
        with pytest.raises(PoolClosed), pool.borrow():
            pass
    assert not is_open(lent)
    with pytest.raises(PoolClosed), pool.borrow():
        pass
    pool.close()
    assert opener.open_now == 0


def test_those_who_wait_when_it_is_closed_get_an_error_at_once(opener: Opener) -> None:
    pool = opener.pool(timeout=60)
    with ThreadPoolExecutor(3) as threads, pool.borrow():
        waiting = [threads.submit(pool.borrow().__enter__) for _ in range(3)]
        wait_for(pool, 3)
        pool.close()
        assert [type(each.exception(5)) for each in waiting] == [PoolClosed] * 3
    assert opener.open_now == 0


def test_a_pool_that_nobody_uses_any_more_closes_its_connections(opener: Opener) -> None:
    pool = opener.pool()
    with pool.borrow() as conn:
        pass
    del pool
    assert not is_open(conn)


# Interrupts


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
        assert (pool.counts(), pool._waiting) == ((1, 0), {})
    with pool.borrow() as conn:
        assert is_open(conn)
    pool.close()


class InterruptAt:
    """Ctrl-C at the n-th point in the pool's code at which CPython would run a signal's handler.

    These are the start of a function, the end of a call, and a jump back.
    """

    def __init__(self, point: int) -> None:
        self._left, self.raised = point, False
        self._after_a_call: FrameType | None = None

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != pool_module.__file__ or frame.f_code.co_name == "__del__":
            return None  # Python itself swallows what is raised in a `__del__`.
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
    pool._healthy = lambda _: False
    borrow_one(pool)


USES = {
    "one that has to be opened": (0, borrow_one),
    "an idle one": (1, borrow_one),
    "a dead one": (1, borrow_a_dead_one),
    "one that breaks": (1, borrow_and_fail),
}


def at_each_point(use: Callable[[], None], begin: Callable[[], None], check: Callable[[], None]) -> int:
    """Do it again and again, interrupted a point later each time. Returns how many points there were."""
    for point in itertools.count(1):
        begin()
        interrupt = InterruptAt(point)
        # (What the exception refers to is gone after this statement, and so is the loan.)
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
        held, waiting = self.pool.counts()[0], self.pool._waiting
        assert (held, len(self.pool._free), waiting) == (in_use, self.pool.size - in_use, {})
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
                    wait_until(lambda: self.pool._waiting or self.over.is_set())

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


# Forks

IN_A_CHILD = """
import os, signal, sqlite3, sys, threading
from upstox_db_examples.core.pool import Pool

closed = []
def close(conn):
    closed.append(conn)
    conn.close()

pool = Pool(lambda: sqlite3.connect("some.db", check_same_thread=False), close, size=2, timeout=5)

def in_a_child(do):
    if (child := os.fork()) == 0:
        signal.alarm(10)  # A child that hangs must not outlive the test.
        try:
            do()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run_forking(code: str, folder: Path) -> None:
    script = IN_A_CHILD + code
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", script]
    environment = {"PYTHONPATH": str(Path(pool_module.__file__).parent.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_that_is_forked_while_a_thread_has_the_lock_does_not_hang(tmp_path: Path) -> None:
    code = """
with pool.borrow() as of_the_parent:
    pass
locked, done = threading.Event(), threading.Event()
def hold():
    with pool._lock:
        locked.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
locked.wait()

def child():
    assert pool.counts() == (0, 0)
    with pool.borrow() as conn, pool.borrow() as another:
        assert of_the_parent not in (conn, another)
    pool.close()
    assert of_the_parent not in closed and len(closed) == 2
    of_the_parent.execute("SELECT 1")

in_a_child(child)
done.set()
thread.join()
with pool.borrow() as conn:
    assert conn is of_the_parent
"""
    run_forking(code, tmp_path)


def test_a_child_that_is_forked_while_others_borrow_and_wait_has_the_whole_pool(tmp_path: Path) -> None:
    code = """
done = threading.Event()
def hold():
    with pool.borrow():
        done.wait()
threads = [threading.Thread(target=hold) for _ in range(4)]
for thread in threads:
    thread.start()
while len(pool._waiting) < 2:
    pass

def child():
    with pool.borrow(), pool.borrow():
        assert pool.counts() == (2, 0)

in_a_child(child)
assert pool.counts() == (2, 0)
done.set()
for thread in threads:
    thread.join()
assert pool.counts() == (0, 2)
"""
    run_forking(code, tmp_path)


def test_a_child_that_leaves_its_parents_loan_neither_closes_nor_keeps_it(tmp_path: Path) -> None:
    code = """
loan = pool.borrow()
conn = loan.__enter__()

def child():
    loan.__exit__(None, ZeroDivisionError(), None)
    assert closed == [] and pool.counts() == (0, 0)
    conn.execute("SELECT 1")

in_a_child(child)
assert pool.counts() == (1, 0)
loan.__exit__(None, None, None)
assert pool.counts() == (0, 1)
"""
    run_forking(code, tmp_path)
