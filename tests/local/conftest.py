"""Fixtures that several tests of local/ share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.upstox_logins import ByHand, for_the_sdk


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's servers make their temporary folders; other tests on this machine make theirs elsewhere."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # The server is nobody where we are root, and has to get in.
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False) as server:
        yield for_the_sdk(server)


@pytest.fixture
def by_hand(upstox: LocalUpstox, account: Account) -> ByHand:
    return ByHand(upstox, account)
