"""Measure how long calls take: call by call for one caller, in turns of a set length for a crowd."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Call = Callable[[str], str | None]  # a user's id -> the token
AsyncCall = Callable[[str], Awaitable[str | None]]
OPERATIONS = ("read", "cold read", "store")
INFINITY = float("inf")
TRIES = 10


@dataclass
class Times:
    """The times of calls, in microseconds, and the errors that some calls raised instead.

    `done` counts the calls within the turn. A call that went on after the end counts only in part. `callers` counts the
    calls of each caller.
    """

    micros: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    done: float = 0.0
    callers: list[int] = field(default_factory=list)

    def call_ended(self, begin: float, turn_ends: float, token: str | None) -> None:
        now = time.perf_counter()
        self.micros.append((now - begin) * 1e6)
        self.done += 1 if now < turn_ends else (turn_ends - begin) / (now - begin)
        if not token:
            self.errors["nothing found"] += 1

    def add(self, other: Times) -> None:
        self.micros += other.micros
        self.errors += other.errors
        self.done += other.done
        self.callers.append(len(other.micros))

    @property
    def median(self) -> float:
        return statistics.median(self.micros)

    @property
    def p99(self) -> float:
        return sorted(self.micros)[int(len(self.micros) * 0.99)]


class Side(Protocol):
    """One of the compared sides. It supports some of the `OPERATIONS`, for these users."""

    name: str
    users: Sequence[str]

    def can(self, operation: str) -> bool: ...

    def once(self, operation: str, user: str) -> str | None: ...

    def timed(self, operation: str, user: str, times: Times) -> None: ...

    def turn(self, operation: str, crowd: int, seconds: float) -> Times: ...


class Threaded:
    """A side whose calls block. Each caller in a crowd is a thread.

    Args:
        forget: deletes the cache's copy of a user's token. With it the side can measure a cold read, right after that.

    Attributes:
        storage: the measured storage, if its steps are reported as well.
    """

    storage: Any = None

    def __init__(
        self,
        name: str,
        users: Sequence[str],
        store: Call,
        read: Call | None,
        forget: Callable[[str], object] | None = None,
    ) -> None:
        self.name, self.users = name, users
        self._forget = forget
        self._calls = {"store": store, "read": read, "cold read": read if forget else None}

    def can(self, operation: str) -> bool:
        return self._calls[operation] is not None

    def once(self, operation: str, user: str) -> str | None:
        call = self._calls[operation]
        assert call
        return call(user)

    def timed(self, operation: str, user: str, times: Times) -> None:
        call = self._calls[operation]
        assert call
        if self._forget and operation == "cold read":
            self._forget(user)  # This does not count.
        begin = time.perf_counter()
        try:
            token = call(user)
        # A call may get an error instead of a token. It is counted and reported.
        except Exception as error:
            times.errors[type(error).__name__] += 1
        else:
            times.call_ended(begin, INFINITY, token)

    def turn(self, operation: str, crowd: int, seconds: float) -> Times:
        call, before = self._calls[operation], self._forget if operation == "cold read" else None
        assert call
        each = [Times() for _ in range(crowd)]
        ends: list[float] = []
        # All threads share one end, so a thread that starts late has less time instead of extra time.
        ready = threading.Barrier(crowd, action=lambda: ends.append(time.perf_counter() + seconds))

        def work(number: int) -> None:
            ready.wait()
            _calls_until(ends[0], call, self.users[number::crowd], each[number], before)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(crowd)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return _sum_of(each)


class Asynchronous:
    """A side whose calls are awaited. Each caller in a crowd is a task of one event loop."""

    def __init__(
        self, name: str, users: Sequence[str], loop: asyncio.AbstractEventLoop, store: AsyncCall, read: AsyncCall
    ) -> None:
        self.name, self.users = name, users
        self._loop = loop
        self._calls = {"store": store, "read": read}

    def can(self, operation: str) -> bool:
        return operation in self._calls

    def once(self, operation: str, user: str) -> str | None:
        async def call() -> str | None:
            return await self._calls[operation](user)

        return self._loop.run_until_complete(call())

    def timed(self, operation: str, user: str, times: Times) -> None:
        # The time is taken inside the loop, because starting the loop is not part of the call.
        self._loop.run_until_complete(self._timed(operation, user, times, INFINITY))

    def turn(self, operation: str, crowd: int, seconds: float) -> Times:
        each = [Times() for _ in range(crowd)]
        end = time.perf_counter() + seconds

        async def work(mine: Sequence[str], times: Times) -> None:
            for user in itertools.cycle(mine):
                if time.perf_counter() >= end:
                    break
                await self._timed(operation, user, times, end)

        async def all_of_them() -> None:
            await asyncio.gather(*(work(self.users[number::crowd], times) for number, times in enumerate(each)))

        self._loop.run_until_complete(all_of_them())
        return _sum_of(each)

    async def _timed(self, operation: str, user: str, times: Times, end: float) -> None:
        begin = time.perf_counter()
        try:
            token = await self._calls[operation](user)
        except Exception as error:
            times.errors[type(error).__name__] += 1
        else:
            times.call_ended(begin, end, token)


def _sum_of(each: Sequence[Times]) -> Times:
    total = Times()
    for times in each:
        total.add(times)
    return total


def _calls_until(
    end: float, call: Call, users: Sequence[str], times: Times, before: Callable[[str], object] | None
) -> None:
    for user in itertools.cycle(users):
        if before:
            before(user)  # This does not count towards the call's time, but it does count towards a crowd's turn.
        if (begin := time.perf_counter()) >= end:
            break
        try:
            token = call(user)
        # A crowd may get errors instead of tokens. They are counted and reported.
        except Exception as error:
            times.errors[type(error).__name__] += 1
        else:
            times.call_ended(begin, end, token)


@dataclass
class Result:
    """One side's answer to one question.

    `cost` is the number that is compared, in microseconds. For one caller it is the median of the calls. For a crowd it
    is the median over the rounds of a turn's time divided by its calls, that is, what a call cost all callers together.

    `fewest` and `most` are the calls of the slowest and the fastest caller in a turn, as medians over the rounds. They
    show whether a crowd is served fairly.
    """

    cost: float
    median: float
    p99: float
    calls: int
    failed: int
    fewest: float
    most: float


def compare[Key](
    sides: Mapping[Key, Side], operation: str, crowd: int, rounds: int, seconds: float
) -> dict[Key, Result]:
    """Return each side's result.

    One caller changes the side after each call, so that all sides see the same minutes of a noisy machine. In a crowd
    each side has its turn. The first side changes each time, so that no side always follows the same one.
    """
    able = [(key, side) for key, side in sides.items() if side.can(operation)]
    turns: dict[Key, list[Times]] = {key: [] for key, _ in able}
    for number in range(rounds + 1):
        first = number % len(able)
        order = able[first:] + able[:first]
        if crowd == 1:
            results = _call_by_call(order, operation, seconds if number else seconds / 5)
        else:
            results = {key: _turn(side, operation, crowd, seconds if number else seconds / 5) for key, side in order}
        if number:  # The first round opens connections and fills caches. It does not count.
            for key, times in results.items():
                turns[key].append(times)
    return {key: _result(sides[key].name, each, crowd, seconds) for key, each in turns.items()}


def _turn(side: Side, operation: str, crowd: int, seconds: float) -> Times:
    times = Times()
    for _ in range(TRIES):  # On a busy machine, a short turn can be over before the first call begins.
        times = side.turn(operation, crowd, seconds)
        if times.done:
            return times
    raise RuntimeError(f"{side.name}: no {operation} of {crowd} at once succeeded in a turn: {dict(times.errors)}")


def _call_by_call[Key](able: Sequence[tuple[Key, Side]], operation: str, seconds: float) -> dict[Key, Times]:
    """Call the sides in turn. Each counted call follows one that does not count, by the same side for the same user.

    Otherwise the processor's caches would hold another side's code and data, and short calls would seem several times
    as long as they are in a program.
    """
    results, uncounted = {key: Times() for key, _ in able}, Times()
    end, order = time.perf_counter() + seconds * len(able), deque(able)
    for number in itertools.count():
        for key, side in order:
            user = side.users[number % len(side.users)]
            side.timed(operation, user, uncounted)
            side.timed(operation, user, results[key])
        order.rotate(-1)
        if time.perf_counter() >= end:
            return results
    raise AssertionError


def _result(name: str, turns: Sequence[Times], crowd: int, seconds: float) -> Result:
    total = _sum_of(turns)
    if any(not times.micros for times in turns):
        raise RuntimeError(f"{name}: no call of {crowd} at once succeeded in a turn: {dict(total.errors)}")
    cost = total.median if crowd == 1 else statistics.median(seconds * 1e6 / times.done for times in turns)
    fewest, most = (
        statistics.median(pick(times.callers or [len(times.micros)]) for times in turns) for pick in (min, max)
    )
    return Result(cost, total.median, total.p99, len(total.micros), total.errors.total(), fewest, most)
