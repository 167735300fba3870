"""What every test has: a local Upstox, a clock that can be moved, and nothing of the machine's own settings."""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from upstox_db_examples import KeyRing, Pace
from upstox_db_examples.core.token import IST
from upstox_db_examples.local.upstox import Account, LocalUpstox

pytest_plugins = ["tests.support.databases"]

# Far ahead, for a database that looks at its own clock must not take these tokens for dead ones.
YEAR = 2099
TUESDAY_EVENING = datetime(YEAR, 1, 6, 20, 0, tzinfo=IST)


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


def shown_with_locals(error: BaseException) -> str:
    """The error, its causes and contexts with all local variables, as `pytest --showlocals` would print them.

    The frames of the tests are left out: they hold the secret that is looked for.
    """
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    chain: list[traceback.TracebackException] = [shown]
    for link in chain:
        link.stack[:] = [frame for frame in link.stack if f"{os.sep}tests{os.sep}" not in frame.filename]
        chain += [nested for nested in (link.__cause__, link.__context__) if nested]
    return "".join(shown.format()) + repr(error.args)


@pytest.fixture(autouse=True)
def _nothing_of_another_test() -> Iterator[None]:
    """The command sets the level of the package's logger, and some tests run the command in their own process."""
    logger = logging.getLogger("upstox_db_examples")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("UPSTOX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("UPSTOX_DB_KEY_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def upstox(clock: Clock) -> Iterator[LocalUpstox]:
    # The TOTP code follows the real time and serves once in 30 s, and these tests log in more often than that.
    with LocalUpstox(clock=clock, totp_once=False) as server:
        yield server


@pytest.fixture
def account(upstox: LocalUpstox) -> Account:
    return upstox.add_account("AB1234")


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing(KeyRing.new_key())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first: of several processes none is left alone with it at the end."""
    slow = Counter(_scope(item) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[_scope(item)])


def _scope(item: pytest.Item) -> str:
    return item.nodeid.rpartition("::")[0]
