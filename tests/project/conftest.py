"""Fixtures for the tests of the command: a local Upstox with the real clock, and an environment that points to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from upstox_db_examples import KeyRing
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.command import USER, Execute, Run, avoid_the_end_of_the_day, call


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False, limits=False) as server:  # with the real clock, like the command
        yield server


@pytest.fixture
def run(tmp_path: Path, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that calls the command in this process, in the test's folder, with this account and a key."""
    avoid_the_end_of_the_day()
    KeyRing.from_file(tmp_path / "keys")
    monkeypatch.chdir(tmp_path)
    for name, value in {**account.environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain, "UPSTOX_USER_ID": USER}.items():
        monkeypatch.setenv(name, value)
    return call


@pytest.fixture
def execute(run: Run) -> Execute:  # noqa: ARG001  # It sets the environment.
    """Return a function that runs any program with the same environment."""

    def execute_one(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**os.environ, "PYTHONWARNINGS": "error", **environment},
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
        )

    return execute_one
