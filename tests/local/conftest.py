"""Fixtures that several tests in local/ share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.upstox_logins import ByHand, for_the_sdk


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder in which this test's servers make their temporary folders. Other tests use other folders."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # If we run as root, the server runs as nobody and needs access.
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False) as server:
        yield for_the_sdk(server)


@pytest.fixture
def by_hand(upstox: LocalUpstox, account: Account) -> ByHand:
    return ByHand(upstox, account)
