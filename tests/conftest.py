"""What every test has: a local Upstox, a clock that can be moved, and nothing of the machine's own settings."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from upstox_db_examples import KeyRing
from upstox_db_examples.local.upstox import Account, LocalUpstox

from .support.clocks import Clock

pytest_plugins = ["tests.support.databases"]


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
