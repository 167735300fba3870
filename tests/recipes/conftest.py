"""Fixtures for the recipes: a local Upstox with the real clock, and programs in their own processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recipes.playground import Playground, playground
from upstox_db_examples import TokenStorage, open_store


@pytest.fixture
def here() -> Iterator[Playground]:
    with playground() as started:
        yield started


@pytest.fixture
def store(here: Playground) -> Iterator[TokenStorage]:
    with open_store(f"sqlite:///{here.folder}/upstox.db") as opened:
        yield opened
