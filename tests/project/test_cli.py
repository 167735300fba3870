"""`upstox-db`, run as a process in the way that cron runs it."""

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
from urllib.parse import urlsplit

import click
import psycopg2
import pytest

from upstox_db_examples import KeyRing, Secret, SQLiteUpstoxStorage
from upstox_db_examples.cli import main
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.token_file import write_token_file

from ..support.databases import MongoDatabase
from ..support.postgresql import bare
from ..support.project import ROOT

USER = "AB1234"
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False) as server:  # with the real clock, like the command
        yield server


@pytest.fixture
def execute(tmp_path: Path, upstox: LocalUpstox, account: Account) -> Run:
    """Return a function that runs any command with this account's environment and with keys."""
    KeyRing.from_file(tmp_path / "keys")

    def execute_one(*command: str, stdin: str = "", **environment: str) -> Done:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
        mine = {**account.environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain, "UPSTOX_USER_ID": USER}
        mine |= {"UPSTOX_DB_KEY_FILE": str(tmp_path / "keys"), "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "error"}
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=clean | mine | environment,
            input=stdin,
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
    assert f"upstox_db_examples.core.life_cycle: Logging {USER} in\n" in again.stderr
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
    assert good(run("cleanup")) == "Erased 0 dead tokens.\n"
    assert good(run("rotate-keys")).startswith("Re-encrypted 0 tokens. Keys in use: k")
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
            assert "typo.db does not exist. Check --store" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "keys"]


def test_a_backup_is_not_replaced_by_one_without_tokens(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    good(run("backup", "good.export"))
    kept = (tmp_path / "good.export").read_bytes()
    SQLiteUpstoxStorage(tmp_path / "new.db").close()
    # A failed login leaves a user and an audit entry, but nothing that anybody would want to restore.
    assert run("--store", "failed.db", "token", UPSTOX_PIN_CODE="000000").returncode == 3
    for store in ("new.db", "failed.db"):
        done = run("--store", store, "backup", "good.export")
        assert (done.returncode, done.stdout) == (3, "")
        assert "good.export already exists" in done.stderr
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


def run_on_a_store_that_breaks(run: Run, store: Path, upstox: LocalUpstox, *command: str) -> Done:
    """Run the command, and rename the store's table once the token is made. `rename_table` brings it back."""
    SQLiteUpstoxStorage(store).close()
    upstox.login_seconds = 1

    def break_the_store() -> None:
        while not upstox.logins():  # Upstox has made the token then, and its answer is still waiting.
            time.sleep(0.01)
        rename_table(store, "upstox_tokens", "away")

    with ThreadPoolExecutor(1) as thread:
        broken = thread.submit(break_the_store)
        done = run(*command)
        broken.result()
    return done


def rename_table(store: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(store)) as conn:
        conn.execute(f"ALTER TABLE {old} RENAME TO {new}")


def test_a_token_that_could_not_be_stored_is_printed_all_the_same(
    run: Run, tmp_path: Path, upstox: LocalUpstox
) -> None:
    done = run_on_a_store_that_breaks(run, tmp_path / "upstox.db", upstox, "token")
    assert upstox.is_living(done.stdout.removesuffix("\n"))
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert done.stderr.startswith("The token was not stored, so the next call will log in again: ")


@pytest.mark.parametrize("command", [["login"], ["login", "--keep"], ["token", "--masked"]], ids=" ".join)
def test_a_token_that_login_could_not_store_is_in_an_encrypted_file_and_can_be_saved(
    run: Run, tmp_path: Path, upstox: LocalUpstox, command: list[str]
) -> None:
    failed = run_on_a_store_that_breaks(run, tmp_path / "upstox.db", upstox, *command)
    assert (failed.returncode, failed.stdout) == (1, "")
    (file,) = tmp_path.glob("unsaved-AB1234-*.token")
    assert file.stat().st_mode & 0o777 == 0o600
    assert failed.stderr.endswith(f"Once that is fixed, run: upstox-db save {file}\n")
    for text in (failed.stderr, file.read_text()):
        assert "eyJ" not in text
    other_keys = run("save", str(file), UPSTOX_DB_KEY_FILE=str(tmp_path / "other keys"))
    assert (other_keys.returncode, other_keys.stdout, file.exists()) == (3, "", True)
    assert run("save", str(file)).returncode == 3, "the store is still broken"
    assert file.exists()
    rename_table(tmp_path / "upstox.db", "away", "upstox_tokens")
    saved = good(run("save", str(file)))
    assert saved.startswith("AB1234: eyJ0…(")
    assert not file.exists()
    assert upstox.is_living(good(run("token")).strip())
    assert upstox.logins() == 1


def test_save_takes_no_other_file_and_no_dead_token(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    (tmp_path / "other").write_text("eyJ" + "a" * 30)
    for name, words in (("other", "is not a file that 'upstox-db login' wrote"), ("none", "cannot be read")):
        done = run("save", name)
        assert (done.returncode, done.stdout) == (3, "")
        assert words in done.stderr
        assert "eyJ" not in done.stderr
    file = unsaved_file(tmp_path, upstox.notify(USER)["access_token"])
    upstox.kill_token(USER)
    done = run("save", "--verify", str(file))
    assert (done.returncode, done.stdout, file.exists()) == (3, "", True)
    assert done.stderr == f"InvalidInput: Upstox does not accept this as a working token of {USER}.\n"


def unsaved_file(folder: Path, token: str) -> Path:
    """Write a file as `upstox-db login` leaves it, encrypted with the keys in this folder, and return its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPSTOX_DB_KEY_FILE", str(folder / "keys"))
        return write_token_file(Secret(token), USER, KeyRing.from_file(folder / "keys"))


def test_without_credentials_no_database_and_no_key_is_left(execute: Run, tmp_path: Path) -> None:
    (tmp_path / "keys").unlink()
    program = (sys.executable, "-m", "upstox_db_examples")
    for arguments in (["token"], ["token", USER], ["login"], ["login", "--keep"], ["--one-call", "token"]):
        done = execute(*program, *arguments, UPSTOX_PIN_CODE="", UPSTOX_TOTP_SECRET="")
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("LoginRefused: ")
        assert list(tmp_path.iterdir()) == []


def test_without_credentials_no_table_is_left_on_a_server(
    run: Run, execute: Run, postgres_url: str, mongo: MongoDatabase, redis_server: str
) -> None:
    nothing = {"UPSTOX_PIN_CODE": "", "UPSTOX_TOTP_SECRET": ""}
    program = (sys.executable, "-m", "upstox_db_examples")
    for store in (postgres_url, f"{mongo.url}#{mongo.name}", f"{redis_server} {postgres_url}"):
        for arguments in (["token"], ["token", USER], ["login"], ["login", "--keep", USER]):
            done = execute(*program, *arguments, UPSTOX_DB_STORE=store, **nothing)
            assert (done.returncode, done.stdout) == (3, "")
            assert done.stderr.startswith("LoginRefused: ")
    assert bare(postgres_url, "SELECT to_regclass('upstox_tokens') AS there") == [{"there": None}]
    with mongo.bare() as db:
        assert db.list_collection_names() == []
    token = good(run("token", UPSTOX_DB_STORE=postgres_url))
    assert good(run("token", USER, UPSTOX_DB_STORE=postgres_url, **nothing)) == token, "a stored one needs none"


def test_renew_gives_another_token_than_the_refused_one(run: Run, upstox: LocalUpstox) -> None:
    refused = good(run("token"))
    upstox.kill_token(USER)
    assert good(run("token")) == refused, "nobody has told the store yet"
    renewed = good(run("renew", USER, stdin=refused))
    assert upstox.is_living(renewed.removesuffix("\n"))
    assert good(run("renew", USER, stdin=refused)) == renewed == good(run("token"))
    assert upstox.logins() == 2
    again = run("renew", USER, stdin=renewed)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("LoginLimited: The token of AB1234 was renewed less than 600 s ago")
    nothing = run("renew", USER)
    assert (nothing.returncode, nothing.stdout) == (3, "")
    assert "on standard input" in nothing.stderr
    assert upstox.logins() == 2


def test_a_refusal_holds_for_all_runs_until_a_person_logs_in(run: Run, upstox: LocalUpstox) -> None:
    for _ in range(3):
        done = run("token", UPSTOX_PIN_CODE="000000")
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("LoginRefused: ")
    assert run("login", "--keep", UPSTOX_PIN_CODE="000000").returncode == 3
    assert upstox.attempts(USER) == 1
    assert run("login", UPSTOX_PIN_CODE="000000").returncode == 3
    assert upstox.attempts(USER) == 2, "a person asked for this login"
    assert upstox.is_living(good(run("token")).removesuffix("\n")), "the refusal does not cover other credentials"


def test_logout_ends_the_token_at_upstox_and_here(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    token = good(run("token")).strip()
    assert good(run("logout", USER)) == "AB1234: logged out at Upstox.\n"
    assert not upstox.is_living(token)
    with SQLiteUpstoxStorage(tmp_path / "upstox.db", keys=KeyRing.from_file(tmp_path / "keys")) as storage:
        assert storage.get_valid_token(USER) is None
    assert good(run("logout", USER)) == "AB1234: no token was stored, or it had already ended.\n"


def test_the_one_call_login_needs_three_credentials(run: Run, upstox: LocalUpstox) -> None:
    others = dict.fromkeys(("USERNAME", "PASSWORD", "CLIENT_SECRET", "REDIRECT_URI"), "")
    environment = {f"UPSTOX_{name}": value for name, value in others.items()}
    assert run("login", **environment).returncode == 3
    token = good(run("--one-call", "token", **environment)).strip()
    assert upstox.is_living(token)
    assert good(run("token", UPSTOX_DB_ONE_CALL="1", **environment)).strip() == token
    assert upstox.logins() == 1


def test_init_makes_the_tables_and_can_be_repeated(run: Run, postgres_url: str) -> None:
    for store, shown in (("new.db", "SQLiteUpstoxStorage"), (postgres_url, "PostgreSQLUpstoxStorage")):
        for _ in range(2):
            told = good(run("--store", store, "init"))
            assert shown in told
            assert told.endswith(" is up to date.\n")
    assert "healthy" in good(run("--store", "new.db", "status"))
    done = run("--store", "new.db", "init", "--runtime-role", "trader")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("InvalidInput: SQLite has no roles")
    done = run("--store", postgres_url, "init", "--runtime-role", "nobody_of_that_name")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith(" does not know that role. Create it first.\n")
    assert f":{urlsplit(postgres_url).password}@" not in told + done.stderr


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


def test_a_wrong_command_ends_with_2_and_help_has_examples(run: Run) -> None:
    assert run("tokn").returncode == 2
    assert run("history").returncode == 2
    told = good(run("--help"))
    for expected in ("TOKEN=$(upstox-db token)", "UPSTOX_DB_STORE", "postgresql://", "45 8 * * 1-5"):
        assert expected in told
    assert "..." not in told.partition("Commands:")[2].partition("STORE is one of")[0], "the help cuts a line off"


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


@pytest.mark.usefixtures("runtime_role")
def test_every_example_runs_as_it_stands_but_for_the_url(
    execute: Run, account: Account, tmp_path: Path, postgres_url: str, upstox: LocalUpstox
) -> None:
    lines = [f'{name.removeprefix("UPSTOX_").lower()} = "{value}"' for name, value in account.environ().items()]
    (tmp_path / "accounts.toml").touch(mode=0o600)
    (tmp_path / "accounts.toml").write_text("\n".join([f"[{USER}]", *lines]))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    config = tmp_path / ".config/upstox_db_examples"
    config.mkdir(parents=True)
    for name, command in main.commands.items():
        examples = str(command.epilog).partition("Examples\n")[2].splitlines()
        assert examples, name
        for example in examples:
            line = example.replace("postgresql://user:password@host/name", postgres_url)
            assert f" {name}" in line
            environment = {"PATH": path, "HOME": str(tmp_path)}
            if name == "renew":
                environment["TOKEN"] = good(execute("upstox-db", "token", PATH=path)).strip()
                upstox.kill_token(USER)
            elif name == "save":
                unsaved_file(tmp_path, upstox.notify(USER)["access_token"]).rename(config / line.rpartition("/")[2])
            elif "--runtime-role" in line:
                environment["UPSTOX_DB_STORE"] = postgres_url
            elif name == "watch":  # It runs until somebody ends it.
                line = f"{line.replace('systemctl restart bot', 'true')} > told &"
                line += "until [ -s told ]; do sleep 0.1; done; rm told; kill $!; wait $! 2> ended; [ $? = 143 ]"
            good(execute("sh", "-c", line, **environment))
    assert "created" in good(execute("upstox-db", "--store", postgres_url, "audit", USER, PATH=path))


def test_the_readmes_commands_run(execute: Run, account: Account, tmp_path: Path, upstox: LocalUpstox) -> None:
    readme = (ROOT / "README.md").read_text()
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


def test_old_tokens_can_be_cleaned_up_and_are_counted_correctly(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    with closing(sqlite3.connect(tmp_path / "upstox.db")) as conn, conn:
        conn.execute("UPDATE upstox_tokens SET expires_at = 0")
        conn.execute("UPDATE upstox_token_audit SET performed_at = 0 WHERE action = 'login'")
    assert good(run("cleanup")) == "Erased 1 dead token.\n"
    assert "login" in good(run("audit", USER)), "a cleanup must not cut the audit trail unless asked"
    assert good(run("cleanup", "--audit-days", "365")) == "Erased 0 dead tokens.\nDeleted 1 audit entry.\n"
    left = [entry["action"] for entry in json.loads(good(run("audit", USER, "--json")))]
    assert left == ["expired", "created"]
    assert run("cleanup", "--audit-days", "-1").returncode == 2
