"""Measure how long calls take, in turns of a set length, one side after another, round after round."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Call = Callable[[str], str | None]  # a user's id -> the token
AsyncCall = Callable[[str], Awaitable[str | None]]
OPERATIONS = ("read", "cold read", "store")


@dataclass
class Times:
    """The times of calls, in microseconds, and the errors that some calls raised instead.

    `done` counts the calls within the turn. A call that went on after the end counts only in part.
    """

    micros: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    done: float = 0.0

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

    def turn(self, operation: str, crowd: int, seconds: float) -> Times:
        call, before = self._calls[operation], self._forget if operation == "cold read" else None
        assert call
        each = [Times() for _ in range(crowd)]
        if crowd == 1:
            _calls_until(time.perf_counter() + seconds, call, self.users, each[0], before)
            return each[0]
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
        total = Times()
        for times in each:
            total.add(times)
        return total


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

    def turn(self, operation: str, crowd: int, seconds: float) -> Times:
        call, total = self._calls[operation], Times()
        end = time.perf_counter() + seconds

        async def work(mine: Sequence[str]) -> None:
            for user in itertools.cycle(mine):
                if (begin := time.perf_counter()) >= end:
                    break
                try:
                    token = await call(user)
                except Exception as error:
                    total.errors[type(error).__name__] += 1
                else:
                    total.call_ended(begin, end, token)

        async def all_of_them() -> None:
            await asyncio.gather(*(work(self.users[number::crowd]) for number in range(crowd)))

        self._loop.run_until_complete(all_of_them())
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
    In a crowd the time of a single call says little, because with SQLite's writers most calls are quick and a few sleep
    for a second.
    """

    cost: float
    median: float
    p99: float
    calls: int
    failed: int


def compare[Key](
    sides: Mapping[Key, Side], operation: str, crowd: int, rounds: int, seconds: float
) -> dict[Key, Result]:
    """Return each side's result. The first side changes each round, so that no side always follows the same one."""
    able = [(key, side) for key, side in sides.items() if side.can(operation)]
    turns: dict[Key, list[Times]] = {key: [] for key, _ in able}
    for _, side in able:
        side.turn(operation, crowd, seconds / 5)  # not counted: this opens connections and fills caches
    for number in range(rounds):
        first = number % len(able)
        for key, side in able[first:] + able[:first]:
            turns[key].append(side.turn(operation, crowd, seconds))
    return {key: _result(sides[key].name, each, crowd, seconds) for key, each in turns.items()}


def _result(name: str, turns: Sequence[Times], crowd: int, seconds: float) -> Result:
    total = Times()
    for times in turns:
        total.add(times)
    costs = [seconds * 1e6 / times.done for times in turns if times.done]
    if len(costs) < len(turns):
        raise RuntimeError(f"{name}: no call of {crowd} at once succeeded in a turn: {dict(total.errors)}")
    cost = total.median if crowd == 1 else statistics.median(costs)
    return Result(cost, total.median, total.p99, len(total.micros), total.errors.total())
