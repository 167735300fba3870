"""`upstox-db` token, login, renew, save and logout."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from upstox_db_examples import KeyRing, SQLiteUpstoxStorage
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.command import USER, Execute, Ran, Run, good, in_json, unsaved_file, without_variables


def test_token_prints_the_token_and_nothing_else(run: Run, upstox: LocalUpstox) -> None:
    first = good(run("token"))
    assert upstox.is_living(first.removesuffix("\n"))
    for user in (USER, USER.lower()):
        assert good(run("token", user)) == good(run("token", user, "--no-login")) == first
    assert in_json(run("token", "--json"))["token"] == first.strip()
    assert first.strip() not in good(run("token", "--json", "--masked"))
    assert upstox.logins() == 1


def test_stderr_says_what_no_error_says_and_on_request_what_is_done(execute: Execute, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "upstox_db_examples")
    first = execute(*command, "login", UPSTOX_DB_KEY_FILE=str(tmp_path / "new keys"))
    assert (first.returncode, first.stderr.count("\n")) == (0, 1)
    assert f"Made a new key in {tmp_path / 'new keys'}. Back it up" in first.stderr
    for arguments in (["--verbose", "token"], ["token", "-v"]):
        again = execute(*command, *arguments, UPSTOX_DB_STORE=f"{'-'.join(arguments)}.db")
        token = again.stdout.strip()
        assert f"upstox_db_examples.core.life_cycle: Logging {USER} in\n" in again.stderr
        assert "127.0.0.1 gave a token after" in again.stderr
        assert token.startswith("eyJ")
        assert token[:20] not in again.stderr


def test_nothing_else_shows_the_token(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    masked = good(run("login"))
    assert masked.startswith("AB1234: eyJ0…(")
    assert good(run("login", "--keep")).partition(" (")[0] == masked.partition(" (")[0]
    token = good(run("token")).strip()
    told = masked
    for arguments in (
        ["login", "--keep"],
        ["token", "--masked"],
        ["token", "--masked", "--no-login"],
        ["status"],
        ["users"],
        ["history", USER],
        ["audit", USER, "--limit", "3"],
        ["doctor"],
        ["cleanup"],
        ["rotate-keys"],
        ["backup", "all.export"],
        ["restore", "all.export"],
        ["migrate", "sqlite:///moved.db"],
        ["init"],
    ):
        told += good(run(*arguments)) + json.dumps(in_json(run(*arguments, "--json")))
    assert good(run("--store", "moved.db", "token")).strip() == token
    assert upstox.logins() == 1
    assert token[8:24] not in told
    assert (tmp_path / "all.export").stat().st_mode & 0o777 == 0o600


def test_without_a_login_a_missing_token_can_be_tried_again_and_a_wrong_name_cannot(
    run: Run, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("token", "--no-login").returncode == 3, "there is no store yet"
    good(run("init"))
    for named in ([], [USER], [USER.lower()]):
        assert run("token", *named, "--no-login").returncode == 1, "their first login is still to come"
    assert run("token", "ZZ9999", "--no-login").returncode == 3
    token = good(run("token"))
    assert good(run("token", "--no-login")) == token
    without_variables(monkeypatch, "USER_ID")
    assert good(run("token", "--no-login")) == token, "the credentials tell whose"
    without_variables(monkeypatch, "PIN_CODE")
    nameless = run("token", "--no-login")
    assert (nameless.returncode, nameless.stdout) == (3, "")
    assert "Name the user, or set UPSTOX_USER_ID" in nameless.stderr
    assert nameless.stderr.endswith("Its users: AB1234.\n")
    assert good(run("token", USER, "--no-login")) == token, "a named user needs no credentials"
    good(run("logout", USER))
    missing = run("token", USER, "--no-login")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("NoLivingToken: AB1234 has no token that is known to work. Log in ")
    unknown = run("token", "ZZ9999", "--no-login")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert unknown.stderr == "InvalidInput: This store does not know ZZ9999. Its users: AB1234.\n"
    assert upstox.logins() == 1


def test_what_has_to_be_put_right_first_ends_with_3(run: Run, account: Account, tmp_path: Path) -> None:
    SQLiteUpstoxStorage(tmp_path / "upstox.db").close()
    for arguments, environment in (
        (["token"], {"UPSTOX_PIN_CODE": "000000"}),
        (["token"], {"UPSTOX_TOTP_SECRET": ""}),
        (["token", "not a user"], {}),
        (["--store", "oracle://scott:tiger@host/db", "status"], {}),
        (["status", "--store", "oracle://scott:tiger@host/db"], {}),
        (["--store", "nowhere/upstox.db", "token"], {}),
        (["--accounts", "nothing.toml", "token"], {}),
        (["backup", "a" * 300], {}),
        *(([name], {"UPSTOX_DB_KEY_FILE": "a" * 300}) for name in ("token", "status", "rotate-keys")),
    ):
        done = run(*arguments, **environment)
        assert (done.returncode, done.stdout) == (3, ""), done
        assert len(done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr
        for secret in (account.pin, account.totp_secret, account.client_secret, "tiger"):
            assert secret not in done.stderr


def test_what_may_be_tried_again_ends_with_1(run: Run) -> None:
    nobody = "postgresql://user:hunter2hunter2@127.0.0.1:1/db"
    for arguments in (["token"], ["status"]):
        done = run("--store", nobody, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("StoreUnavailable: PostgreSQL at 127.0.0.1:1/db cannot be reached")
        assert "hunter2" not in done.stderr


def test_what_cannot_be_read_ends_with_3_and_stays(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    token = good(run("token"))
    done = run("token", UPSTOX_DB_KEY_FILE=str(tmp_path / "other-keys"))
    assert (done.returncode, done.stdout) == (3, "")
    assert re.match("KeyUnavailable: There is no key file .*other-keys", done.stderr)
    assert good(run("token")) == token
    assert upstox.logins() == 1


def run_on_a_store_that_breaks(run: Run, store: Path, upstox: LocalUpstox, *command: str) -> Ran:
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


@pytest.mark.parametrize("as_json", [False, True])
def test_a_token_that_could_not_be_stored_is_printed_all_the_same(
    run: Run, tmp_path: Path, upstox: LocalUpstox, as_json: bool
) -> None:
    done = run_on_a_store_that_breaks(run, tmp_path / "upstox.db", upstox, "token", *(["--json"] * as_json))
    assert upstox.is_living(json.loads(done.stdout)["token"] if as_json else done.stdout.removesuffix("\n"))
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
    saved = in_json(run("save", str(file), "--json"))
    assert (saved["user_id"], saved["token"][:6]) == (USER, "eyJ0…(")
    assert not file.exists()
    assert upstox.is_living(good(run("token")).strip())
    assert upstox.logins() == 1


def test_save_is_done_even_if_the_file_cannot_be_removed(run: Run, upstox: LocalUpstox) -> None:
    token = upstox.notify(USER)["access_token"]
    with Path(unsaved_file(token)).open() as file:
        name = f"/dev/fd/{file.fileno()}"  # The system lets nobody remove this name, not even root.
        done = run("save", name)
    assert (done.returncode, done.stdout[:6]) == (0, USER)
    assert re.fullmatch(rf"Done, but {name} cannot be removed: [^.]+\. Delete it yourself\.\n", done.stderr)
    assert good(run("token")).strip() == token


def test_save_takes_no_other_file_and_no_dead_token(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    (tmp_path / "other").write_text("eyJ" + "a" * 30)
    for name, words in (("other", "is not a file that 'upstox-db login' wrote"), ("none", "cannot be read")):
        done = run("save", name)
        assert (done.returncode, done.stdout) == (3, "")
        assert words in done.stderr
        assert "eyJ" not in done.stderr
    file = Path(unsaved_file(upstox.notify(USER)["access_token"]))
    upstox.kill_token(USER)
    done = run("save", "--verify", str(file))
    assert (done.returncode, done.stdout, file.exists()) == (3, "", True)
    assert done.stderr == f"InvalidInput: Upstox does not accept this as a working token of {USER}.\n"


def test_renew_gives_another_token_than_the_refused_one(run: Run, upstox: LocalUpstox) -> None:
    refused = good(run("token"))
    upstox.kill_token(USER)
    assert good(run("token")) == refused, "nobody has told the store yet"
    renewed = good(run("renew", USER, stdin=refused))
    assert upstox.is_living(renewed.removesuffix("\n"))
    assert good(run("renew", USER.lower(), stdin=refused)) == renewed == good(run("token"))
    assert in_json(run("renew", USER, "--json", stdin=refused))["token"] == renewed.strip()
    assert upstox.logins() == 2
    again = run("renew", USER, stdin=renewed)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("LoginLimited: The token of AB1234 was renewed less than 600 s ago")
    assert again.stderr.endswith("'upstox-db login' and store_token() log in anyway.\n")
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
    unknown = run("logout", "AB1324")
    assert (unknown.returncode, unknown.stdout) == (3, ""), "somebody whose token has leaked must see a mistyped name"
    assert upstox.is_living(token)
    assert good(run("logout", USER.lower())) == "AB1234: logged out at Upstox.\n"
    assert not upstox.is_living(token)
    with SQLiteUpstoxStorage(tmp_path / "upstox.db", keys=KeyRing.from_file(tmp_path / "keys")) as storage:
        assert storage.get_valid_token(USER) is None
    assert good(run("logout", USER)) == "AB1234: no token was stored, or it had already ended.\n"
    assert in_json(run("logout", USER, "--json")) == {"user_id": USER, "ended": False}


def test_the_one_call_login_needs_three_credentials(
    run: Run, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_variables(monkeypatch, "USERNAME", "PASSWORD", "CLIENT_SECRET", "REDIRECT_URI")
    assert run("login").returncode == 3
    token = good(run("--one-call", "token")).strip()
    assert upstox.is_living(token)
    assert good(run("token", UPSTOX_DB_ONE_CALL="1")).strip() == good(run("token", "--one-call")).strip() == token
    assert upstox.logins() == 1
