"""Fixtures for every test: a local Upstox, a clock that the test can move, and none of the machine's own settings."""

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
    """Restore the log level: the command changes it, and some tests run the command in their own process."""
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
    # The TOTP code follows real time and is accepted once in 30 s. These tests log in more often than that.
    with LocalUpstox(clock=clock, totp_once=False) as server:
        yield server


@pytest.fixture
def account(upstox: LocalUpstox) -> Account:
    return upstox.add_account("AB1234")


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing(KeyRing.new_key())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first, so that no process is left running one alone at the end."""
    slow = Counter(_scope(item) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[_scope(item)])


def _scope(item: pytest.Item) -> str:
    return item.nodeid.rpartition("::")[0]
