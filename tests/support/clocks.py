"""Clocks that a test moves, and the moments that the tests speak of."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from upstox_db_examples import Pace, TokenStorage
from upstox_db_examples.core.token import IST

# Far ahead: a database that looks at its own clock must not think that these tokens are dead.
YEAR = 2099
TUESDAY_EVENING = datetime(YEAR, 1, 6, 20, 0, tzinfo=IST)


def ist(day: int, hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(YEAR, 1, day, hour, minute, second, tzinfo=IST)


class Clock:
    """The present, as the test says."""

    def __init__(self, now: datetime = TUESDAY_EVENING) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def set(self, day: int, hour: int, minute: int = 0, second: int = 0) -> None:
        """A moment in January, in India; the 6th is a Tuesday."""
        self.now = datetime(YEAR, 1, day, hour, minute, second, tzinfo=IST)

    def advance(self, **parts: float) -> None:
        self.now += timedelta(**parts)


class FakeTime:
    """Seconds that pass only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def pace(self, limits: Iterable[tuple[int, float]] = ()) -> Pace:
        """Turns at this time: without limits, at once."""
        return Pace(limits, clock=self.clock, sleep=self.sleep)


AT_ONCE = FakeTime().pace()


class Passing:
    """Lets a store's notes believe that so many seconds have passed in the database."""

    def __init__(self, *stores: TokenStorage) -> None:
        self.seconds = 0.0
        for store in stores:
            store.backend.read_notes = self._later(store.backend.read_notes)  # type: ignore[method-assign]

    def _later(self, told: Any) -> Any:
        def notes(names: list[str]) -> tuple[float, dict[str, str]]:
            now, there = told(names)
            return now + self.seconds, there

        return notes
