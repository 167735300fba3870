"""The locks between the threads of a process: one holder at a time, and nothing is kept of a lock that nobody uses."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from upstox_db_examples import StoreUnavailable
from upstox_db_examples.core.locks import LocalLocks


@pytest.fixture
def _threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_threads_change_often")
def test_a_crowd_that_comes_and_goes_holds_a_lock_one_at_a_time() -> None:
    locks, inside, together = LocalLocks(), [0, 0], 0

    def come_and_go(thread: int) -> None:
        nonlocal together
        for number in range(2000):
            which = (thread + number) % 2
            with locks.hold(f"USER{which}", 30):
                inside[which] += 1
                time.sleep(0)
                together += inside[which] > 1
                inside[which] -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(come_and_go, range(8)))
    assert (inside, together) == ([0, 0], 0)


def test_who_waits_too_long_gets_an_error_and_the_lock_stays_usable() -> None:
    locks = LocalLocks()
    with ThreadPoolExecutor(1) as thread, locks.hold("AB1234", 0):
        with pytest.raises(StoreUnavailable):
            thread.submit(lambda: locks.hold("AB1234", 0).__enter__()).result()
        with locks.hold("CD5678", 0):
            pass
    with locks.hold("AB1234", 0):
        pass


def test_nothing_is_kept_of_locks_that_nobody_uses() -> None:
    locks = LocalLocks()
    tracemalloc.start()
    try:
        for number in range(5000):
            with locks.hold(f"AB{number:06}", 0):
                pass
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 50_000
