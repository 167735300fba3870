"""`upstox-db` status, users, history and audit: what the morning's question gets for an answer."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from upstox_db_examples import SQLiteUpstoxStorage
from upstox_db_examples.core.token import IST
from upstox_db_examples.local.answers import Failure
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.command import USER, Run, good, in_json, without_variables
from ..support.databases import MongoDatabase


def change(sql: str, file: str = "upstox.db") -> None:
    with closing(sqlite3.connect(file)) as conn, conn:
        conn.execute(sql)


def test_a_working_token_is_shown_with_its_end_in_india_and_how_long_it_lives(run: Run, tmp_path: Path) -> None:
    assert run("status").returncode == 3, "there is no store"
    good(run("init"))
    empty = run("status")
    assert (empty.returncode, empty.stdout) == (1, "No users yet.\n\nsqlite: healthy\n"), "the first login is due"
    assert run("history").stderr == "InvalidInput: This store has no users yet.\n"
    good(run("login"))
    before = (tmp_path / "upstox.db").read_bytes(), sorted(tmp_path.iterdir())
    for arguments in (["status"], ["status", USER], ["status", USER.lower()]):
        heading, row, _, health = good(run(*arguments)).splitlines()
        assert heading.split("  ")[0] == "user"
        now = datetime.now(IST)
        dies = now.replace(hour=3, minute=30, second=0) + timedelta(days=now.time() >= datetime(1, 1, 1, 3, 30).time())
        assert re.fullmatch(rf"AB1234  works  {dies:%Y-%m-%d} 03:30:00 IST  (\d+ h )?\d+ (min|s) +20\S+ \S+ IST", row)
        assert health == "sqlite: healthy"
    assert "22:00:00 UTC" in good(run("status", "--utc"))
    told = in_json(run("status", "--json"))
    assert told["sqlite"] == "healthy"
    assert datetime.fromisoformat(told["timestamp"]).tzinfo
    (row,) = told["users"]
    assert row.items() >= {"user_id": USER, "token": "works", "problem": None, "exit_code": 0}.items()
    left = (datetime.fromisoformat(row["expires_at"]) - datetime.now(UTC)).total_seconds()
    assert abs(row["seconds_left"] - left) < 60
    assert ((tmp_path / "upstox.db").read_bytes(), sorted(tmp_path.iterdir())) == before, "it only looks"


def test_the_exit_code_tells_a_script_whether_a_login_helps(run: Run, upstox: LocalUpstox) -> None:
    good(run("login"))
    change("UPDATE upstox_tokens SET expires_at = 1000")
    good(run("cleanup"))
    due = run("status")
    assert (due.returncode, due.stderr) == (1, "")
    assert re.search(r"AB1234 +none +20", due.stdout)
    assert run("token", UPSTOX_PIN_CODE="000000").returncode == 3
    refused = run("status", UPSTOX_PIN_CODE="000000")
    assert (refused.returncode, refused.stderr) == (3, "")
    assert re.search(r"^AB1234: Upstox refused the login at 20\S+ \S+ IST \(1017106\)\. Fix the ", refused.stdout, re.M)
    assert "Then run: upstox-db login AB1234" in refused.stdout
    assert "000000" not in refused.stdout
    assert run("status").returncode == 1, "the credentials have changed since, so the next login is tried"
    upstox.fail(Failure.RATE_LIMIT)
    assert run("token").returncode == 1
    limited = run("status")
    assert limited.returncode == 1
    assert re.search(
        r"^Upstox set a limit at 20\S+ \S+ IST \(UDAPI10005\)\. No login for \d+ s\.$", limited.stdout, re.M
    )
    change("DELETE FROM upstox_login_notes")
    good(run("login"))
    good(run("status"))


def test_a_refusal_is_shown_before_the_user_is_known(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without_variables(monkeypatch, "USER_ID")
    assert run("token", UPSTOX_PIN_CODE="000000").returncode == 3
    told = run("status", UPSTOX_PIN_CODE="000000")
    assert told.returncode == 3
    assert re.match(r"No users yet\.\n\nUpstox refused the login at .* Then run: upstox-db login\n", told.stdout)


def test_a_token_in_doubt_or_under_a_key_that_is_not_here_does_not_count_as_working(
    run: Run, upstox: LocalUpstox, tmp_path: Path
) -> None:
    good(run("token"))
    assert run("login", UPSTOX_PIN_CODE="000000").returncode == 3  # It leaves a note that needs a key as well.
    other = run("status", UPSTOX_DB_KEY_FILE=str(tmp_path / "no key here"))
    assert other.returncode == 3
    assert "AB1234  unreadable" in other.stdout
    assert not (tmp_path / "no key here").exists(), "a key that is made now reads nothing"
    upstox.fail(Failure.LOST, step=6)
    assert run("login").returncode == 1
    doubted = run("status")
    assert doubted.returncode == 1
    assert "AB1234  in doubt" in doubted.stdout
    assert "To ask Upstox, run: upstox-db token\n" in doubted.stdout
    without = run("token", "--no-login")
    assert (without.returncode, without.stdout) == (1, "")
    assert "may have replaced it" in without.stderr


@pytest.fixture
def of_two(run: Run) -> Iterator[None]:
    """Make a store in which two users have tokens."""
    good(run("login"))
    login = {"access_token": "eyJ" + "a" * 60, "user_id": "CD5678"}
    with SQLiteUpstoxStorage("upstox.db", login=lambda _: login) as store:
        store.store_token("CD5678")
        yield


@pytest.mark.usefixtures("of_two")
def test_of_several_users_all_are_shown_or_those_that_are_named(run: Run) -> None:
    assert good(run("users")) == "AB1234\nCD5678\n"
    assert in_json(run("users", "--json")) == ["AB1234", "CD5678"]
    change("UPDATE upstox_tokens SET expires_at = 1000 WHERE user_id = 'CD5678'")
    both = run("status")
    assert both.returncode == 1
    assert re.findall("^(?:AB|CD).*?  (works|none)", both.stdout, re.M) == ["works", "none"]
    assert "CD5678" not in good(run("status", USER))
    assert run("status", "cd5678").returncode == 1
    unknown = run("status", "ZZ9999")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert unknown.stderr == "InvalidInput: This store does not know ZZ9999. Its users: AB1234, CD5678.\n"


@pytest.mark.usefixtures("of_two")
def test_a_user_has_to_be_named_only_where_there_are_several(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("history", "audit"):
        assert good(run(command)) == good(run(command, USER)), "UPSTOX_USER_ID tells which"
        other = good(run(command, "CD5678", "--json"))
        assert good(run(command, "cd5678", "--json")) == other != good(run(command, USER, "--json"))
    without_variables(monkeypatch, "USER_ID")
    for command in ("history", "audit"):
        several = run(command)
        assert (several.returncode, several.stdout) == (2, "")
        assert "Name a user. Its users: AB1234, CD5678." in several.stderr
        unknown = run(command, "zz9999", "--json")
        assert (unknown.returncode, unknown.stdout) == (3, "")
        assert "does not know zz9999" in unknown.stderr
    change("DELETE FROM upstox_token_audit WHERE user_id = 'CD5678'")
    change("DELETE FROM upstox_tokens WHERE user_id = 'CD5678'")
    for command in ("history", "audit"):
        assert good(run(command)) == good(run(command, USER))


def test_times_are_those_of_india_unless_asked_otherwise(run: Run) -> None:
    good(run("login"))
    for command, column in (("history", "created_at"), ("audit", "performed_at")):
        (first, *_) = in_json(run(command, "--json", "--utc"))
        then = datetime.fromisoformat(first[column])
        assert then.utcoffset() == timedelta(0)
        assert f"{then.astimezone(IST):%Y-%m-%d %H:%M:%S} IST  " in good(run(command))
        assert f"{then:%Y-%m-%d %H:%M:%S} UTC  " in good(run("--utc", command))


def test_a_limit_is_a_positive_number(run: Run) -> None:
    good(run("login"))
    for number in ("0", "x", "-1", str(2**31)):
        for command in ("history", "audit"):
            done = run(command, "--limit", number)
            assert (done.returncode, done.stdout) == (2, "")
            assert "Invalid value for '--limit'" in done.stderr
    assert len(in_json(run("audit", "--limit", "1", "--json"))) == 1


@pytest.mark.parametrize("kind", ["postgresql", "mongodb", "hybrid"])
def test_every_store_has_an_address(run: Run, upstox: LocalUpstox, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "mongodb":
        database: MongoDatabase = request.getfixturevalue("mongo")
        where = f"{database.url}#{database.name}"
    else:
        where = str(request.getfixturevalue("postgres_url"))
    if kind == "hybrid":
        where = f"{request.getfixturevalue('redis_server')} {where}"
    environment = {"UPSTOX_DB_STORE": where}
    token = good(run("token", **environment))
    assert good(run("token", **environment)) == token
    assert upstox.logins() == 1
    uses = in_json(run("history", "--json", **environment))[0]["usage_count"]
    told = good(run("status", **environment))
    assert "healthy" in told
    assert re.search("^AB1234  works  ", told, re.M)
    assert ("\nwaiting uses: " in told) == (kind == "hybrid")
    assert in_json(run("history", "--json", **environment))[0]["usage_count"] == uses, "a look is no use"
    assert good(run("users", **environment)) == "AB1234\n"
    assert USER in json.dumps(in_json(run("audit", "--json", **environment)))
