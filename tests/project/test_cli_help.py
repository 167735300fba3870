"""`upstox-db` explains itself, its examples run, and the global options may come anywhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import psycopg2
import pytest
from click.shell_completion import BashComplete

from upstox_db_examples import KeyRing
from upstox_db_examples.cli import COMMANDS, main
from upstox_db_examples.cli_common import GLOBAL
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.command import USER, Execute, Run, good, unsaved_file
from ..support.project import ROOT


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_a_wrong_command_ends_with_2_and_help_tells_the_codes(run: Run) -> None:
    for wrong in (["tokn"], ["status", "--limit", "1"], ["renew"], ["--stor", "x.db", "status"], ["copy", "oracle"]):
        assert run(*wrong).returncode == 2
    told = good(run("--help"))
    for expected in ("TOKEN=$(upstox-db token)", "UPSTOX_DB_STORE", "postgresql://", "45 8 * * 1-5", "_COMPLETE="):
        assert expected in told
    assert re.findall(r"^ +(\d)  \w", told.partition("Exit codes")[2], re.MULTILINE) == ["0", "1", "2", "3"]
    assert max(map(len, told.splitlines())) <= 80
    listed = told.partition("Commands:")[2].partition("STORE is one of")[0]
    assert re.findall(r"^  (\S+)", listed, re.MULTILINE) == list(COMMANDS)
    assert "..." not in listed, "the help cuts a line off"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_argument(run: Run, name: str) -> None:
    told = good(run(name, "--help"))
    text, _, options = told.partition("\n\n")[2].partition("\nOptions:\n")
    for each in command(name).params:
        if isinstance(each, click.Option):
            assert each.help, each.name
            assert " ".join(each.help.split()) in " ".join(options.split())
        else:
            assert re.search(rf"\b{str(each.name).upper().removesuffix('S')}\b", text), each.name
    assert "--json" in options.partition("\nGlobal options:\n")[2]
    assert "\n  Examples\n    " in options
    assert max(map(len, told.splitlines())) <= 80


def test_global_options_may_come_before_or_after_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTOX_DB_STORE", "nowhere/other.db")
    token = good(run("token", USER, "--store", "mine.db"))
    assert good(run("--store", "mine.db", "token", USER)) == token
    assert good(run("--store", "nowhere/x.db", "token", "--store", "mine.db")) == token, "the last one counts"
    before = good(run("--json", "--utc", "--store", "mine.db", "audit"))
    assert before == good(run("audit", "--store", "mine.db", "--utc", "--json"))
    assert run("token", "--accounts", "nothing.toml", "--store", "mine.db").returncode == 3
    names = {name for each in GLOBAL for name in each.opts}
    assert [(name, each.name) for name in COMMANDS for each in command(name).params if names & {*each.opts}] == []


def test_the_tab_key_completes_commands_and_options() -> None:
    def completed(arguments: list[str], incomplete: str) -> list[str]:
        found = BashComplete(main, {}, "upstox-db", "_UPSTOX_DB_COMPLETE").get_completions(arguments, incomplete)
        return [each.value for each in found]

    assert completed([], "re") == ["renew", "restore"]
    assert completed(["token"], "--no") == ["--no-login"]
    assert completed(["token", USER], "--st") == ["--store"]
    assert set(completed(["copy"], "p")) == {"pooled", "postgresql"}


def test_the_shell_finds_the_completion_that_the_help_names() -> None:
    program = Path(sys.executable).parent / "upstox-db"
    environment = {**os.environ, "_UPSTOX_DB_COMPLETE": "bash_source"}
    done = subprocess.run([program], env=environment, text=True, capture_output=True, check=False)
    # Bash older than 4.4 is refused with a message, and what is printed is used all the same.
    assert "_UPSTOX_DB_COMPLETE=bash_complete" in done.stdout


def test_a_command_imports_no_other_and_a_warm_token_no_sdk(execute: Execute, run: Run) -> None:
    good(run("login"))
    code = (
        "import sys; from upstox_db_examples.cli import main; main(['token', '--masked'], standalone_mode=False)\n"
        "mine = [name for name in sys.modules if name.startswith('upstox_db_examples.cli')]\n"
        "heavy = ('upstox_totp', 'pydantic', 'curl_cffi', 'asyncio', 'psycopg2', 'pymongo', 'redis', 'tqdm')\n"
        "print(sorted(mine), [name for name in heavy if name in sys.modules])"
    )
    told = good(execute(sys.executable, "-c", code)).splitlines()[1]
    names = ("cli", "cli_common", "cli_logins", "cli_output")
    assert told == f"{[f'upstox_db_examples.{name}' for name in names]} []"


@pytest.fixture
def runtime_role(postgres_url: str) -> Iterator[str]:
    """Return the role that the examples use. It belongs to the whole server, so create it only if it is missing."""
    role = "upstox_app"
    with closing(psycopg2.connect(postgres_url)) as conn, conn.cursor() as cursor:
        conn.autocommit = True
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,))
        if made := cursor.fetchone() is None:
            cursor.execute(f"CREATE ROLE {role}")
        yield role
        cursor.execute(f"DROP OWNED BY {role}")
        if made:
            cursor.execute(f"DROP ROLE {role}")


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def run_example(line: str, run: Run, execute: Execute, **environment: str) -> str:
    """Run this line. Only one that needs a shell gets one, because each process takes its time."""
    if re.search(r"[$|;<>~]", line):
        return good(execute("sh", "-c", line, PATH=PATH, **environment))
    words = shlex.split(line)
    start = words.index("upstox-db")
    return good(run(*words[start + 1 :], **dict(word.split("=", 1) for word in words[:start]), **environment))


@pytest.mark.usefixtures("runtime_role")
def test_every_example_runs_as_it_stands_but_for_the_url(
    run: Run, execute: Execute, account: Account, tmp_path: Path, postgres_url: str, upstox: LocalUpstox
) -> None:
    lines = [f'{name.removeprefix("UPSTOX_").lower()} = "{value}"' for name, value in account.environ().items()]
    (tmp_path / "accounts.toml").touch(mode=0o600)
    (tmp_path / "accounts.toml").write_text("\n".join([f"[{USER}]", *lines]))
    config = tmp_path / ".config/upstox_db_examples"
    config.mkdir(parents=True)
    for name in COMMANDS:
        examples = str(command(name).epilog).partition("Examples\n")[2].splitlines()
        assert examples, name
        for example in examples:
            line = example.replace("postgresql://user:password@host/name", postgres_url)
            assert f" {name}" in line
            environment = {"HOME": str(tmp_path)}
            if name == "renew":
                environment["TOKEN"] = good(run("token")).strip()
                upstox.kill_token(USER)
            elif name == "save":
                file = Path(unsaved_file(upstox.notify(USER)["access_token"]))
                file.rename(config / line.rpartition("/")[2])
            elif "--runtime-role" in line:
                environment["UPSTOX_DB_STORE"] = postgres_url
            elif name == "watch":  # It runs until somebody ends it.
                line = f"{line.replace('systemctl restart bot', 'true')} > told &"
                line += "until [ -s told ]; do sleep 0.1; done; rm told; kill $!; wait $! 2> ended; [ $? = 143 ]"
            if "--no-login" in line or name == "status":
                good(run("login"))  # The login may have been ended by an example of logout.
            run_example(line, run, execute, **environment)
    assert "created" in good(run("--store", postgres_url, "audit", USER))


def test_the_readmes_commands_run(
    run: Run, execute: Execute, account: Account, tmp_path: Path, upstox: LocalUpstox
) -> None:
    good(run("init"))  # This test's folder and environment are those of `run`.
    readme = (ROOT / "README.md").read_text()
    (script,) = [block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "upstox-db token" in block]
    done = execute("sh", "-ec", script.replace("status;", 'status; echo "$TOKEN";'), PATH=PATH)
    good(done)
    (token,) = re.findall(r"^eyJ\S+$", done.stdout, re.MULTILINE)
    assert upstox.is_living(token)
    (make_key,) = re.findall(r"^python -c .*$", readme, re.MULTILINE)
    assert len(KeyRing.from_text(good(execute("sh", "-c", make_key, PATH=PATH)), "the README").key_ids) == 1
    settings = {**account.environ(), "UPSTOX_DB_STORE": str(tmp_path / "upstox.db"), "PATH": PATH}
    (tmp_path / "upstox.env").write_text("".join(f"export {name}='{value}'\n" for name, value in settings.items()))
    crontab = re.findall(r"^\d+ \d+ \S+ \S+ \S+ +(\. .*)$", readme, re.MULTILINE)
    assert len(crontab) == 3
    for line in crontab:
        good(execute("sh", "-c", line, HOME=str(tmp_path), PATH=os.environ["PATH"]))
    assert (tmp_path / "upstox.export").exists()
    assert upstox.logins() == 1
