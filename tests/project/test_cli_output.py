"""`upstox-db` where standard output is closed, full, cut off, or in an encoding that lacks a character."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upstox_db_examples.local.upstox import LocalUpstox

USER = "AB1234"
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
    "migrate": (["migrate", "other.db"], True),
    "token": (["token"], False),
    "token --masked": (["token", "--masked"], False),
    "status": (["status"], False),
    "history": (["history", USER], False),
    "audit": (["audit", USER], False),
}


# These differ by what becomes of a text, so a few commands show it.
FEW = ("login", "token", "status", "audit")


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_what_was_done_does_not_look_like_a_failure(tmp_path: Path, output: str) -> None:
    program = str(Path(sys.executable).parent / "upstox-db")
    with LocalUpstox(totp_once=False, limits=False) as upstox:
        mine = {**upstox.add_account(USER).environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain, "UPSTOX_USER_ID": USER}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
        mine |= {"UPSTOX_DB_KEY_FILE": str(tmp_path / "keys"), "no_proxy": "127.0.0.1", "PYTHONIOENCODING": ""}
        if output == "latin-1":
            mine["PYTHONIOENCODING"] = "latin-1"

        def run(*arguments: str, shell: str = '"$@"') -> subprocess.CompletedProcess[str]:
            command = ["bash", "-c", shell, "bash", program, *arguments]
            return subprocess.run(command, cwd=tmp_path, env=clean | mine, text=True, capture_output=True, check=False)

        assert run("login").returncode == 0
        tried = COMMANDS if output in ("closed", "full") else FEW
        for name, (arguments, done) in ((name, COMMANDS[name]) for name in tried):
            before = upstox.logins()
            ran = run(*arguments, shell=OUTPUTS[output])
            right = 0 if done or output == "latin-1" else 3
            if output == "cut off" and ran.returncode == 0:
                right = 0  # The reader may end only after the command has printed.
            assert ran.returncode == right, f"{name}: {ran.stderr}"
            assert "Traceback" not in ran.stderr, name
            assert "Exception ignored" not in ran.stderr, name
            assert upstox.logins() - before == (1 if name == "login" else 0), name


@pytest.mark.parametrize("output", ["closed", "full"])
def test_a_token_that_nobody_can_be_shown_is_kept(tmp_path: Path, output: str) -> None:
    """Nothing is done for a closed output. With a full one the login is spent, and the next call needs none."""
    program = str(Path(sys.executable).parent / "upstox-db")
    with LocalUpstox(totp_once=False, limits=False) as upstox:
        mine = {**upstox.add_account(USER).environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
        mine |= {"UPSTOX_DB_KEY_FILE": str(tmp_path / "keys"), "no_proxy": "127.0.0.1"}
        command = ["bash", "-c", OUTPUTS[output], "bash", program, "token"]
        for _ in range(2):
            done = subprocess.run(command, cwd=tmp_path, env=clean | mine, capture_output=True, text=True, check=False)
            assert done.returncode == 3, done.stderr
            assert "eyJ" not in done.stderr
        assert upstox.logins() == (1 if output == "full" else 0)
