"""`upstox-db watch`: a line for each change, and a command that gets the new token on its standard input."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upstox_db_examples import KeyRing, SQLiteUpstoxStorage
from upstox_db_examples.cli import main

from ..support.processes import USER, made_up_login, wait_until
from ..support.project import ROOT

# Writes down what it got: its arguments, its standard input and its environment. It fails the first time.
RECORDER = """
import json, os, pathlib, sys
folder = pathlib.Path(__file__).parent
number = len(list(folder.glob("run-*")))
told = {"arguments": sys.argv[1:], "input": sys.stdin.read(), "environment": dict(os.environ)}
(folder / "writing").write_text(json.dumps(told))
(folder / "writing").rename(folder / f"run-{number}")
sys.exit(3 if number == 0 else 0)
"""

# Ends on Ctrl-C or SIGTERM, as a bot does that has to cancel its orders first.
BOT = """
import pathlib, signal, time
try:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    pathlib.Path("begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path("orders are cancelled").touch()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteUpstoxStorage]:
    with SQLiteUpstoxStorage(
        tmp_path / "upstox.db", keys=KeyRing.from_file(tmp_path / "keys"), login=made_up_login
    ) as it:
        yield it


def test_the_command_runs_for_each_new_token_and_gets_it_on_its_standard_input_only(
    store: SQLiteUpstoxStorage, tmp_path: Path
) -> None:
    (tmp_path / "recorder.py").write_text(RECORDER)
    command = shlex.join([sys.executable, str(tmp_path / "recorder.py"), "$HOME", "two words", ";", "true"])
    tokens = [store.store_token(USER)["token"]]

    def run(number: int) -> Any:
        file = tmp_path / f"run-{number}"
        wait_until(file.exists)
        return json.loads(file.read_text())

    for variable, first in ((None, 0), ("BOT_TOKEN", 2)):
        arguments = ["--store", str(tmp_path / "upstox.db"), "watch", USER.lower(), "--exec", command]
        with subprocess.Popen(
            [sys.executable, "-m", "upstox_db_examples", *arguments, *(["--env", variable] if variable else [])],
            cwd=tmp_path,
            env={**os.environ, "UPSTOX_DB_KEY_FILE": str(tmp_path / "keys"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as watching:
            try:
                assert watching.stdout is not None
                assert watching.stderr is not None
                told = watching.stdout.readline()
                for number in (first, first + 1):
                    tokens.append(store.store_token(USER)["token"])
                    found = run(number)
                    assert found["input"] == f"{tokens[-1]}\n"
                    assert found["arguments"] == ["$HOME", "two words", ";", "true"], "no shell reads them"
                    having = [name for name, value in found["environment"].items() if tokens[-1] in value]
                    assert having == ([variable] if variable else [])
                store.revoke_token(USER)
                told += "".join(watching.stdout.readline() for _ in range(3))
                watching.send_signal(signal.SIGINT)
                assert watching.wait(20) == 0
                errors = watching.stderr.read()
            finally:
                watching.kill()
        assert told.count(f"{USER}: eyJ0…(") == (3 if first == 0 else 2), "the last token was revoked before the second"
        assert told.count(f"{USER}: no working token\n") == (1 if first == 0 else 2)
        assert errors == (f"{sys.executable} ended with 3.\n" if first == 0 else "")
        assert not [token for token in tokens if token[8:24] in told + errors]
    assert sorted(file.name for file in tmp_path.glob("run-*")) == [f"run-{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("stop", "number", "code"),
    [(os.killpg, signal.SIGINT, 0), (os.kill, signal.SIGTERM, 143)],
    ids=["Ctrl-C in a terminal", "SIGTERM from a supervisor"],
)
def test_the_command_ends_by_itself(
    store: SQLiteUpstoxStorage, tmp_path: Path, stop: Callable[[int, int], None], number: int, code: int
) -> None:
    """And the user of the credentials need not have logged in yet."""
    (tmp_path / "bot.py").write_text(BOT)
    with subprocess.Popen(
        [sys.executable, "-m", "upstox_db_examples", "watch", "--exec", shlex.join([sys.executable, "bot.py"])],
        cwd=tmp_path,
        env={**os.environ, "UPSTOX_DB_KEY_FILE": "keys", "PYTHONPATH": str(ROOT), "UPSTOX_USER_ID": USER},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as watching:
        try:
            assert watching.stdout is not None
            assert watching.stdout.readline() == f"{USER}: no working token\n"
            store.store_token(USER)
            wait_until((tmp_path / "begun").exists)
            stop(watching.pid, number)
            assert watching.wait(20) == code
        finally:
            watching.kill()
    assert (tmp_path / "orders are cancelled").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["watch", USER, "--env", "TOKEN"], 2, "--env is for the command of --exec"),
        (["watch", USER, "--exec", "true", "--env", "A=B"], 2, "the name of an environment variable"),
        (["watch", USER, "--exec", "no-such-program now"], 2, "there is no program 'no-such-program'"),
        (["watch", USER, "--exec", "'"], 2, "No closing quotation"),
        (["watch", USER, "--exec", " "], 2, "there is no program ''"),
        (["watch"], 2, "Name a user. Its users: AB1234, CD5678."),
        (["watch", "no user"], 3, "InvalidInput"),
        (["--store", "typo.db", "watch", USER], 3, "does not exist"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(
    store: SQLiteUpstoxStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    told: str,
) -> None:
    for user_id in (USER, "CD5678"):
        store.store_token(user_id)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert told in done.stderr
