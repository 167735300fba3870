"""Clocks that a test can move, and the dates that the tests use."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from upstox_db_examples import Pace, TokenStorage
from upstox_db_examples.core.token import IST

# This is far in the future, so that a database that looks at its own clock does not take these tokens for expired.
YEAR = 2099
TUESDAY_EVENING = datetime(YEAR, 1, 6, 20, 0, tzinfo=IST)


def ist(day: int, hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(YEAR, 1, day, hour, minute, second, tzinfo=IST)


class Clock:
    """A clock that shows the time that the test has set."""

    def __init__(self, now: datetime = TUESDAY_EVENING) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def set(self, day: int, hour: int, minute: int = 0, second: int = 0) -> None:
        """Set a time in January, in India. The 6th is a Tuesday."""
        self.now = datetime(YEAR, 1, day, hour, minute, second, tzinfo=IST)

    def advance(self, **parts: float) -> None:
        self.now += timedelta(**parts)


class FakeTime:
    """A clock on which time passes only when the code sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def pace(self, limits: Iterable[tuple[int, float]] = ()) -> Pace:
        """Return a pace that runs on this clock. Without limits it never waits."""
        return Pace(limits, clock=self.clock, sleep=self.sleep)


AT_ONCE = FakeTime().pace()


class Passing:
    """Moves the database time that the stores read with their notes ahead by this many seconds."""

    def __init__(self, *stores: TokenStorage) -> None:
        self.seconds = 0.0
        for store in stores:
            store.backend.read_notes = self._later(store.backend.read_notes)  # type: ignore[method-assign]

    def _later(self, told: Any) -> Any:
        def notes(names: list[str]) -> tuple[float, dict[str, str]]:
            now, there = told(names)
            return now + self.seconds, there

        return notes
