"""`upstox-db`, run as a process, as cron runs it."""

from __future__ import annotations

import functools
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import click
import pytest

from upstox_db_examples import KeyRing, SQLiteUpstoxStorage
from upstox_db_examples.cli import main
from upstox_db_examples.local.upstox import Account, LocalUpstox

from .databases import MongoDatabase

USER = "AB1234"
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False) as server:  # by the real clock, as the command goes
        yield server


@pytest.fixture
def account(upstox: LocalUpstox) -> Account:
    return upstox.add_account(USER)


@pytest.fixture
def execute(tmp_path: Path, upstox: LocalUpstox, account: Account) -> Run:
    """Runs any command as one with this account, and with keys, does."""
    KeyRing.from_file(tmp_path / "keys")

    def execute_one(*command: str, **environment: str) -> Done:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
        mine = {**account.environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain, "UPSTOX_USER_ID": USER}
        mine |= {"UPSTOX_DB_KEY_FILE": str(tmp_path / "keys"), "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "error"}
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=clean | mine | environment,
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
        )

    return execute_one


@pytest.fixture
def run(execute: Run) -> Run:
    return functools.partial(execute, sys.executable, "-m", "upstox_db_examples")


def good(done: Done) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_token_prints_the_token_and_nothing_else(run: Run, upstox: LocalUpstox) -> None:
    first = good(run("token"))
    assert upstox.is_living(first.removesuffix("\n"))
    assert good(run("token", USER)) == first
    assert upstox.logins() == 1


def test_stderr_says_what_no_error_says_and_on_request_what_is_done(run: Run, tmp_path: Path) -> None:
    first = run("login", UPSTOX_DB_KEY_FILE=str(tmp_path / "new keys"))
    assert (first.returncode, first.stderr.count("\n")) == (0, 1)
    assert f"Made a new key in {tmp_path / 'new keys'}. Back it up" in first.stderr
    again = run("--verbose", "token", UPSTOX_DB_KEY_FILE=str(tmp_path / "new keys"), UPSTOX_DB_STORE="another.db")
    token = again.stdout.strip()
    assert f"upstox_db_examples.life_cycle: Logging {USER} in\n" in again.stderr
    assert "127.0.0.1 gave a token after" in again.stderr
    assert token.startswith("eyJ")
    assert token[:20] not in again.stderr


def test_nothing_else_shows_the_token(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    masked = good(run("login"))
    assert good(run("login", "--keep")) == masked
    assert masked.startswith("AB1234: eyJ0…(")
    token = good(run("token")).strip()
    told = masked + good(run("token", "--masked"))
    told += good(run("status")) + good(run("status", "--json"))
    told += good(run("history", USER)) + good(run("audit", USER, "--limit", "3"))
    history = json.loads(good(run("history", USER, "--json")))
    assert [row["is_active"] for row in history] == [True]
    assert good(run("cleanup")) == "Erased: 0 dead tokens.\n"
    assert good(run("rotate-keys")).startswith("Encrypted again: 0 tokens. In use: k")
    assert good(run("backup", "all.export")) == "1 user, 1 token, 2 audit entries.\n"
    assert (tmp_path / "all.export").stat().st_mode & 0o777 == 0o600
    assert good(run("--store", "restored.db", "restore", "all.export")) == "1 user, 1 token, 2 audit entries.\n"
    assert good(run("migrate", "sqlite:///moved.db")) == "1 user, 1 token, 2 audit entries.\n"
    assert good(run("--store", "moved.db", "token")).strip() == token
    assert upstox.logins() == 1
    assert "sqlite: healthy" in told
    assert "created" in told
    assert token[8:24] not in told


@pytest.mark.parametrize("kind", ["postgresql", "mongodb", "hybrid"])
def test_every_store_has_an_address(run: Run, upstox: LocalUpstox, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "mongodb":
        database: MongoDatabase = request.getfixturevalue("mongo")
        where = f"{database.url}#{database.name}"
    else:
        where = str(request.getfixturevalue("postgres_url"))
    environment = {"UPSTOX_DB_STORE": where}
    if kind == "hybrid":
        environment["UPSTOX_DB_STORE"] = f"{request.getfixturevalue('redis_server')} {where}"
    token = good(run("token", **environment))
    assert good(run("token", **environment)) == token
    assert upstox.logins() == 1
    assert "healthy" in good(run("status", **environment))
    assert USER in good(run("audit", USER, "--json", **environment))


def test_what_has_to_be_put_right_first_ends_with_3(run: Run, account: Account, tmp_path: Path) -> None:
    SQLiteUpstoxStorage(tmp_path / "upstox.db").close()
    for arguments, environment in (
        (["token"], {"UPSTOX_PIN_CODE": "000000"}),
        (["token"], {"UPSTOX_TOTP_SECRET": ""}),
        (["token", "not a user"], {}),
        (["--store", "oracle://scott:tiger@host/db", "status"], {}),
        (["--store", "nowhere/upstox.db", "token"], {}),
        (["--accounts", "nothing.toml", "token"], {}),
    ):
        done = run(*arguments, **environment)
        assert (done.returncode, done.stdout) == (3, ""), done
        assert len(done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr
        for secret in (account.pin, account.totp_secret, account.client_secret, "tiger"):
            assert secret not in done.stderr


def test_a_mistyped_store_is_refused_and_not_made(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ["status"],
        ["history", USER],
        ["audit", USER],
        ["cleanup"],
        ["rotate-keys"],
        ["backup", "all.export"],
        ["migrate", "sqlite:///target.db"],
    ):
        for address in ("typo.db", "sqlite:///nowhere/typo.db"):
            done = run("--store", address, *arguments)
            assert (done.returncode, done.stdout) == (3, ""), done
            assert "typo.db cannot be opened: No such file or directory. Check --store" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "keys"]


def test_a_backup_is_not_replaced_by_one_without_tokens(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    good(run("backup", "good.export"))
    kept = (tmp_path / "good.export").read_bytes()
    SQLiteUpstoxStorage(tmp_path / "new.db").close()
    # A failed login is a user and an audit entry, and yet nothing that one would want back.
    assert run("--store", "failed.db", "token", UPSTOX_PIN_CODE="000000").returncode == 3
    for store in ("new.db", "failed.db"):
        done = run("--store", store, "backup", "good.export")
        assert (done.returncode, done.stdout) == (3, "")
        assert "good.export is there already" in done.stderr
        assert (tmp_path / "good.export").read_bytes() == kept
        good(run("--store", store, "backup", f"{store}.export"))
    good(run("backup", "good.export"))
    assert (tmp_path / "good.export").read_bytes() != kept


def test_what_may_be_tried_again_ends_with_1(run: Run) -> None:
    nobody = "postgresql://user:hunter2hunter2@127.0.0.1:1/db"
    for arguments in (["token"], ["status"]):
        done = run("--store", nobody, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("StoreUnavailable: PostgreSQL at 127.0.0.1:1/db cannot be reached")
        assert "hunter2" not in done.stderr


def test_what_cannot_be_read_ends_with_3_and_stays(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    (tmp_path / "damaged").write_text("nothing")
    done = run("restore", "damaged")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("BackupDamaged: ")
    token = good(run("token"))
    done = run("token", UPSTOX_DB_KEY_FILE=str(tmp_path / "other-keys"))
    assert (done.returncode, done.stdout) == (3, "")
    assert re.match("Made a new key in .*other-keys.*\nKeyUnavailable: ", done.stderr)
    assert good(run("token")) == token
    assert upstox.logins() == 1


def test_a_token_that_could_not_be_stored_is_printed_all_the_same(
    run: Run, tmp_path: Path, upstox: LocalUpstox
) -> None:
    SQLiteUpstoxStorage(tmp_path / "upstox.db").close()
    upstox.login_seconds = 1

    def break_the_store() -> None:
        while not upstox.logins():  # It is made, and its answer waits.
            time.sleep(0.01)
        with closing(sqlite3.connect(tmp_path / "upstox.db")) as conn:
            conn.execute("DROP TABLE upstox_tokens")

    with ThreadPoolExecutor(1) as thread:
        broken = thread.submit(break_the_store)
        done = run("token")
        broken.result()
    assert upstox.is_living(done.stdout.removesuffix("\n"))
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert done.stderr.startswith("Not stored, so the next call logs in again: ")


def test_a_wrong_command_ends_with_2_and_help_has_examples(run: Run) -> None:
    assert run("tokn").returncode == 2
    assert run("history").returncode == 2
    told = good(run("--help"))
    for expected in ("TOKEN=$(upstox-db token)", "UPSTOX_DB_STORE", "postgresql://", "45 8 * * 1-5"):
        assert expected in told
    assert "..." not in told.partition("Commands:")[2].partition("STORE is one of")[0], "a line that was cut off"


@pytest.mark.parametrize("name", list(main.commands))
def test_help_explains_every_option_and_argument(run: Run, name: str) -> None:
    told = good(run(name, "--help"))
    text, _, options = told.partition("\n\n")[2].partition("\nOptions:\n")
    for each in main.commands[name].params:
        if isinstance(each, click.Option):
            assert each.help, each.name
            assert " ".join(each.help.split()) in " ".join(options.split())
        else:
            assert re.search(rf"\b{str(each.name).upper()}\b", text), each.name
    assert "\n  Examples\n    " in options
    assert max(map(len, told.splitlines())) <= 80


def test_every_example_runs_as_it_stands_but_for_the_url(
    execute: Run, account: Account, tmp_path: Path, postgres_url: str
) -> None:
    lines = [f'{name.removeprefix("UPSTOX_").lower()} = "{value}"' for name, value in account.environ().items()]
    (tmp_path / "accounts.toml").touch(mode=0o600)
    (tmp_path / "accounts.toml").write_text("\n".join([f"[{USER}]", *lines]))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, command in main.commands.items():
        examples = str(command.epilog).partition("Examples\n")[2].splitlines()
        assert examples, name
        for example in examples:
            line = example.replace("postgresql://user:password@host/name", postgres_url)
            assert f" {name}" in line
            good(execute("sh", "-c", line, PATH=path))
    assert "created" in good(execute("upstox-db", "--store", postgres_url, "audit", USER, PATH=path))


def test_the_readmes_commands_run(execute: Run, account: Account, tmp_path: Path, upstox: LocalUpstox) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (script,) = [block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "upstox-db token" in block]
    done = execute("sh", "-ec", script.replace("status;", 'status; echo "$TOKEN";'), PATH=path)
    good(done)
    (token,) = re.findall(r"^eyJ\S+$", done.stdout, re.MULTILINE)
    assert upstox.is_living(token)
    (make_key,) = re.findall(r"^python -c .*$", readme, re.MULTILINE)
    assert len(KeyRing.from_text(good(execute("sh", "-c", make_key, PATH=path)), "the README").key_ids) == 1
    settings = {**account.environ(), "UPSTOX_DB_STORE": str(tmp_path / "upstox.db"), "PATH": path}
    (tmp_path / "upstox.env").write_text("".join(f"export {name}='{value}'\n" for name, value in settings.items()))
    crontab = re.findall(r"^\d+ \d+ \S+ \S+ \S+ +(\. .*)$", readme, re.MULTILINE)
    assert len(crontab) == 3
    for line in crontab:
        good(execute("sh", "-c", line, HOME=str(tmp_path), PATH=os.environ["PATH"]))
    assert (tmp_path / "upstox.export").exists()
    assert upstox.logins() == 1


def test_what_is_old_can_be_cleaned_up_and_one_is_not_told_as_many(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    with closing(sqlite3.connect(tmp_path / "upstox.db")) as conn, conn:
        conn.execute("UPDATE upstox_tokens SET expires_at = 0")
        conn.execute("UPDATE upstox_token_audit SET performed_at = 0 WHERE action = 'login'")
    assert good(run("cleanup")) == "Erased: 1 dead token.\n"
    assert "login" in good(run("audit", USER)), "a trail is not cut without a word"
    assert good(run("cleanup", "--audit-days", "365")) == "Erased: 0 dead tokens.\nDeleted: 1 audit entry.\n"
    left = [entry["action"] for entry in json.loads(good(run("audit", USER, "--json")))]
    assert left == ["expired", "created"]
    assert run("cleanup", "--audit-days", "-1").returncode == 2
