"""`python -m upstox_db_examples.local`: the command in another terminal, without an account."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from upstox_db_examples.local.__main__ import main

from ..support.command import avoid_the_end_of_the_day, call, good


@pytest.mark.parametrize(("pattern", "ending"), [("sqlite", signal.SIGINT), ("hybrid", signal.SIGTERM)])
@pytest.mark.usefixtures("own_servers")
def test_its_export_lines_let_the_command_run_until_it_ends(
    pattern: str, ending: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    avoid_the_end_of_the_day()
    command = [sys.executable, "-u", "-m", "upstox_db_examples.local", pattern]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stderr.readline() == "The local Upstox is running. Ctrl-C ends it.\n"
        for _ in range(11):
            export, line = shlex.split(process.stdout.readline())
            assert export == "export"
            monkeypatch.setenv(*line.split("=", 1))
        folder = Path(os.environ["UPSTOX_DB_KEY_FILE"]).parent
        done = call("token")
        assert (done.returncode, done.stdout[:3]) == (0, "eyJ")
        assert good(call("token")) == done.stdout
        assert "AB1234  works" in good(call("status"))
        good(call("login"))
        process.send_signal(ending)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    assert not folder.exists()
    assert call("login").returncode != 0
    if pattern == "hybrid":
        redis = urlsplit(os.environ["UPSTOX_DB_STORE"].split()[0])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", redis.port or 0), timeout=5)


def test_a_user_id_that_cannot_be_is_refused_before_anything_starts() -> None:
    for user in ("", "no user", "ü"):
        done = CliRunner().invoke(main, ["--user", user])
        assert (done.exit_code, done.stdout) == (2, "")
        assert "--user: A user id must be" in done.stderr
