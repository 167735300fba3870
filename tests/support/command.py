"""Run `upstox-db` in this process, or as a process where that is the point: a process costs a third of a second."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from upstox_db_examples import KeyRing, Secret
from upstox_db_examples.cli import main
from upstox_db_examples.token_file import write_token_file

USER = "AB1234"


class Ran(NamedTuple):
    """What a call of the command did."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ran]
Execute = Callable[..., subprocess.CompletedProcess[str]]


def call(*arguments: str, stdin: str = "", **environment: str) -> Ran:
    """Call the command in this process. An exception that it does not handle is raised here."""
    result = CliRunner().invoke(main, arguments, input=stdin, env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def avoid_the_end_of_the_day() -> None:
    """Wait if tokens die within two minutes. The command uses the real clock, and so do these tests."""
    now = datetime.now(UTC)
    left = (now.replace(hour=22, minute=0, second=0) - now).total_seconds()  # 03:30 in India
    if 0 < left < 120:
        time.sleep(left + 1)


def good(done: Ran | subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def in_json(done: Ran) -> Any:
    return json.loads(good(done))


def unsaved_file(token: str) -> str:
    """Write a file as `upstox-db login` leaves it, encrypted with this test's keys, and return its path."""
    return str(write_token_file(Secret(token), USER, KeyRing.default()))


def without_variables(patch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        patch.setenv(f"UPSTOX_{name}", "")
