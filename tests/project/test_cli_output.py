"""`upstox-db` where standard output is closed, full, cut off, or in an encoding that lacks a character."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from upstox_db_examples.cli import main
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.command import USER, Run, good

# A shell that runs the command with this standard output. In each, stderr stays readable.
OUTPUTS = {
    "closed": '"$@" >&-',
    "full": '"$@" >/dev/full',
    "cut off": '("$@"; echo $? >code) | true; exit $(cat code)',
    "latin-1": '"$@" | cat; exit ${PIPESTATUS[0]}',
    "no terminal at all": '"$@" >&- <&-',
}
# What each command does is done with every output. Those that print a result end with 3 where nobody gets it.
COMMANDS = {
    "login": (["login"], True),
    "login --keep": (["login", "--keep"], True),
    "init": (["init"], True),
    "cleanup": (["cleanup", "--audit-days", "100"], True),
    "rotate-keys": (["rotate-keys"], True),
    "backup": (["backup", "export"], True),
    "restore": (["restore", "export"], True),
    "migrate": (["migrate", "other.db"], True),
    "token": (["token"], False),
    "token --masked": (["token", "--masked"], False),
    "status": (["status"], False),
    "users": (["users"], False),
    "history": (["history", USER], False),
    "audit": (["audit", USER], False),
    "doctor": (["doctor"], False),
}


@contextlib.contextmanager
def standard_output(what: str) -> Iterator[None]:
    """Give this process a standard output that is closed or full."""
    if what == "closed":
        with contextlib.redirect_stdout(None):
            yield
        return
    with Path("/dev/full").open("w", buffering=1) as full, contextlib.redirect_stdout(full):
        yield


@pytest.mark.parametrize("output", ["closed", "full"])
@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_done_does_not_look_like_a_failure(
    run: Run, upstox: LocalUpstox, output: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(run("login"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for name, (arguments, done) in COMMANDS.items():
        before, errors = upstox.logins(), io.StringIO()
        with standard_output(output), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            main([*arguments, *(["--json"] * as_json)])
        assert ended.value.code == (0 if done else 3), f"{name}: {errors.getvalue()}"
        assert "tandard output" in errors.getvalue(), name
        assert "eyJ" not in errors.getvalue(), name
        assert upstox.logins() - before == (1 if name == "login" else 0), name


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_process_of_its_own_does_not_look_like_a_failure_either(tmp_path: Path, output: str) -> None:
    """Nothing is done for a closed output. With a full one the login is spent, and the next call needs none."""
    program = str(Path(sys.executable).parent / "upstox-db")
    with LocalUpstox(totp_once=False, limits=False) as upstox:
        mine = {**upstox.add_account(USER).environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain, "UPSTOX_USER_ID": USER}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
        mine |= {"UPSTOX_DB_KEY_FILE": str(tmp_path / "keys"), "no_proxy": "127.0.0.1", "PYTHONIOENCODING": ""}
        if output == "latin-1":
            mine["PYTHONIOENCODING"] = "latin-1"

        def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = ["bash", "-c", OUTPUTS[output], "bash", program, *arguments]
            return subprocess.run(command, cwd=tmp_path, env=clean | mine, text=True, capture_output=True, check=False)

        # The first token costs a login, unless the output is closed.
        for name, logins in (("token", 0 if ">&-" in OUTPUTS[output] else 1), ("login", 1), ("token", 0)):
            before, done = upstox.logins(), ran(name)
            right = 0 if name == "login" or output == "latin-1" else 3
            if output == "cut off" and done.returncode == 0:
                right = 0  # The reader may end only after the command has printed.
            assert done.returncode == right, f"{name}: {done.stderr}"
            if output == "latin-1" and name == "login":
                assert (done.stdout[:18], done.stderr) == ("AB1234: eyJ0\\u2026", "")
            for text in ("Traceback", "Exception ignored", "eyJ"):
                assert text not in done.stderr, name
            assert upstox.logins() - before == logins, name
