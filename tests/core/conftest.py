"""Fixtures that several tests in core/ share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from upstox_db_examples import SdkLogin
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.pools import Opener


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(tmp_path / "some.db")
    yield opener
    opener.close_all()


@pytest.fixture
def login(upstox: LocalUpstox, account: Account) -> SdkLogin:
    return SdkLogin(account.credentials(), base_domain=upstox.base_domain)
