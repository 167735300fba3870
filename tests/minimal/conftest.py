"""The smallest version of each pattern, on a database of its own, with an account that no other test uses."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support import minimal
from ..support.clocks import Clock
from ..support.minimal import MODULES, Smallest, closed_at_the_end

Environment = dict[str, str]


@pytest.fixture
def account(upstox: LocalUpstox) -> Account:
    return upstox.add_account(f"U{uuid.uuid4().hex[:10].upper()}")  # Tests that run at the same time share a Redis.


@pytest.fixture(params=MODULES)
def smallest(request: pytest.FixtureRequest, account: Account, tmp_path: Path) -> Smallest:
    def given(fixture: str) -> Any:
        return request.getfixturevalue(fixture)

    match request.param:
        case "postgresql":
            where: tuple[str, ...] = (given("postgres_url"),)
        case "mongodb":
            where = tuple(given("mongo"))
        case "hybrid":
            where = (given("redis_server"), given("postgres_url"))
        case _:
            where = (str(tmp_path / "upstox.db"),)
    return Smallest(request.param, where, account)


@pytest.fixture
def environment(upstox: LocalUpstox, account: Account) -> Environment:
    return {**account.environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain, "no_proxy": "127.0.0.1"}


@pytest.fixture(autouse=True)
def _moved(monkeypatch: pytest.MonkeyPatch, environment: Environment, clock: Clock) -> None:
    """Let the smallest versions log in to the local Upstox, by the clock of the test and without the SDK's pauses."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(minimal.PAUSES, minimal.NO_PAUSES)
    for module in MODULES.values():
        monkeypatch.setattr(module, "datetime", minimal.at(clock))


@pytest.fixture
def open_one(smallest: Smallest) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the storage. What it opens is closed at the end."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closed_at_the_end(smallest.open(**options)))


@pytest.fixture
def storage(open_one: Callable[..., Any]) -> Any:
    return open_one()
