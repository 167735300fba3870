"""What the pool promises, tested on SQLite files. The stores that use it are tested in stores/."""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from upstox_db_examples.core.pool import Pool, PoolClosed, PoolTimeout

from ..support.pools import Connection, Opener, is_open, wait_for
from ..support.processes import wait_until

CROWD = 32


@contextmanager
def all_lent(pool: Pool[Connection]) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(pool.size):
            stack.enter_context(pool.borrow())
        yield


# How many connections


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
    assert opener.opened > 200, "many connections must have been replaced"
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
        assert (pool.counts(), pool.waiting) == ((size, 0), 0)
    with pool.borrow() as conn:
        assert is_open(conn)
    pool.close()


def test_waiting_threads_are_served_in_the_order_in_which_they_came(opener: Opener) -> None:
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
    """A pool as somebody in a hurry would write it: a newcomer can get a connection before threads that wait."""

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
    """Count the turns of each thread in a crowd. All threads wait before the first one is served."""
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
    # So many turns, because a busy machine can take a processor from a thread for a tenth of a second.
    counts = turns(pool, 1000 * CROWD, lambda: pool.waiting)
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
        # The first connection breaks, so the second thread has to open a new one, and the third thread after it.
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


# Closing


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


def test_threads_that_wait_when_it_is_closed_get_an_error_at_once(opener: Opener) -> None:
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
