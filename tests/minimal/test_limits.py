"""What the smallest versions do not survive, case by case. The README beside them tells each case in a table."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pymongo.errors
import pytest
from cryptography.exceptions import InvalidTag
from upstox_totp import UpstoxError

from upstox_db_examples import SQLiteUpstoxStorage
from upstox_db_examples.local.upstox import Failure, LocalUpstox

from ..support import minimal, processes
from ..support.clocks import Clock
from ..support.leaks import shown_with_locals
from ..support.minimal import Smallest, obtain
from ..support.project import ROOT

README = ROOT / "upstox_db_examples" / "minimal" / "README.md"
REFUSED = (sqlite3.Error, psycopg2.Error, pymongo.errors.PyMongoError)


def only(*patterns: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("smallest", patterns, indirect=True)


def once(upstox: LocalUpstox, action: Callable[[], object]) -> None:
    """Do this in the middle of the next login, when its token was made and the answer was not sent yet."""
    waiting = [action]

    def on_step(step: int, what: str) -> None:
        if (step, what) == (6, "answer") and waiting:
            waiting.pop()()

    upstox.on_step = on_step


@pytest.fixture
def real_time(upstox: LocalUpstox, smallest: Smallest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smallest.module, "datetime", datetime)
    upstox.clock = lambda: datetime.now(UTC)


@pytest.mark.usefixtures("real_time")
def test_a_login_that_is_killed_costs_its_token(
    smallest: Smallest, storage: Any, upstox: LocalUpstox, environment: dict[str, str]
) -> None:
    upstox.login_seconds = 60
    killed, connection = processes.start(minimal.obtain_at_once, smallest, environment, 2.0)
    assert connection.recv() == "ready"
    connection.send("go")
    processes.wait_until(lambda: upstox.logins() == 1)
    processes.kill(killed)
    upstox.login_seconds = 0
    if smallest.pattern == "mongodb":
        assert storage.leases.find_one({"_id": smallest.account.user_id}), "the lease outlives its holder"
    token = obtain(storage, smallest.account.user_id)
    assert upstox.is_living(token)
    assert upstox.logins() == 2


def test_a_token_that_upstox_refuses_is_handed_out_until_half_past_three(
    smallest: Smallest, storage: Any, upstox: LocalUpstox
) -> None:
    user = smallest.account.user_id
    token = obtain(storage, user)
    upstox.kill_token(user)
    assert storage.get_valid_token(user) == obtain(storage, user) == token
    assert not upstox.is_living(token)


def test_a_token_that_cannot_be_stored_is_lost(smallest: Smallest, storage: Any, upstox: LocalUpstox) -> None:
    smallest.refuse_writes()
    with pytest.raises(REFUSED) as caught:
        obtain(storage, smallest.account.user_id)
    assert upstox.logins() == 1
    assert smallest.rows() == {}
    assert "eyJ" not in f"{caught.value} {vars(caught.value)}"


@only("sqlite")
def test_a_traceback_with_local_variables_shows_the_token(smallest: Smallest, storage: Any) -> None:
    smallest.refuse_writes()
    with pytest.raises(sqlite3.Error) as caught:
        obtain(storage, smallest.account.user_id)
    assert "eyJ" in shown_with_locals(caught.value)


def test_a_wrong_pin_is_tried_until_the_account_is_locked(
    smallest: Smallest, open_one: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    user = smallest.account.user_id
    mistaken = replace(smallest.account, pin="000000")
    monkeypatch.setenv("UPSTOX_PIN_CODE", mistaken.pin)
    storage = open_one(account=mistaken)
    for _ in range(5):
        with pytest.raises(UpstoxError, match=r"PIN|locked"):
            obtain(storage, user)
    monkeypatch.setenv("UPSTOX_PIN_CODE", smallest.account.pin)
    with pytest.raises(UpstoxError, match="locked"):
        obtain(open_one(), user)


def test_after_a_change_of_the_key_there_is_no_token_until_half_past_three(
    smallest: Smallest, open_one: Callable[..., Any], upstox: LocalUpstox, clock: Clock
) -> None:
    user = smallest.account.user_id
    obtain(open_one(), user)
    changed = open_one(key=bytes(32))
    with pytest.raises(InvalidTag):
        obtain(changed, user)
    clock.set(7, 3, 30)
    assert upstox.is_living(obtain(changed, user))


def test_a_slow_clock_hands_out_a_dead_token(
    smallest: Smallest, storage: Any, upstox: LocalUpstox, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = smallest.account.user_id
    monkeypatch.setattr(smallest.module, "datetime", minimal.at(lambda: clock.now - timedelta(seconds=30)))
    token = obtain(storage, user)
    clock.set(7, 3, 30, 10)
    assert storage.get_valid_token(user) == token
    assert not upstox.is_living(token)


def test_an_answer_in_another_form_costs_its_token(smallest: Smallest, storage: Any, upstox: LocalUpstox) -> None:
    upstox.fail(Failure.ENVELOPE)
    with pytest.raises(KeyError, match="access_token"):
        obtain(storage, smallest.account.user_id)
    assert upstox.logins() == 1
    assert smallest.rows() == {}


@only("sqlite", "pooled")
def test_a_login_holds_up_the_logins_of_all_other_users(smallest: Smallest, storage: Any, upstox: LocalUpstox) -> None:
    def another() -> None:
        with closing(sqlite3.connect(smallest.where[0], timeout=0)) as db:
            db.execute("SELECT * FROM minimal_tokens")
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                errors.append(str(error))

    errors: list[str] = []
    once(upstox, another)
    obtain(storage, smallest.account.user_id)
    assert errors == ["database is locked"]


def test_the_full_pattern_logs_two_users_in_at_once(tmp_path: Path) -> None:
    def login(user_id: str | None) -> dict[str, str]:
        if user_id == "AA1111":
            tokens.append(storage.get_or_create_token("BB2222")["user_id"])
        return processes.response(str(user_id), f"eyJ0eXAi{user_id}" * 4)

    tokens: list[str] = []
    with SQLiteUpstoxStorage(tmp_path / "full.db", login=login) as storage:
        tokens.append(storage.get_or_create_token("AA1111")["user_id"])
    assert tokens == ["BB2222", "AA1111"]


@only("postgresql", "hybrid")
def test_a_connection_that_is_lost_lets_two_log_in(
    smallest: Smallest, storage: Any, open_one: Callable[..., Any], upstox: LocalUpstox
) -> None:
    def lose() -> None:
        with closing(psycopg2.connect(smallest.where[-1])) as db, db.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        others.append(obtain(open_one(), smallest.account.user_id))

    others: list[str] = []
    once(upstox, lose)
    with pytest.raises(psycopg2.Error):
        obtain(storage, smallest.account.user_id)
    assert upstox.logins() == 2
    assert upstox.is_living(others[0])
    assert storage.get_valid_token(smallest.account.user_id) == others[0]


@only("mongodb")
@pytest.mark.usefixtures("real_time")
def test_a_login_that_outlives_its_lease_stores_a_dead_token(
    smallest: Smallest,
    storage: Any,
    open_one: Callable[..., Any],
    upstox: LocalUpstox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smallest.module, "LEASE", timedelta(seconds=0.3))
    others: list[str] = []
    once(upstox, lambda: others.append(obtain(open_one(), smallest.account.user_id)))
    token = obtain(storage, smallest.account.user_id)
    assert upstox.is_living(others[0])
    assert storage.get_valid_token(smallest.account.user_id) == token
    assert not upstox.is_living(token)


@only("pooled")
def test_a_forked_child_uses_its_parents_connections(smallest: Smallest) -> None:
    process, connection = processes.start(minimal.fork_and_borrow, smallest)
    assert connection.recv() is True
    process.join()


@only("hybrid")
def test_redis_hands_out_a_token_that_was_deleted(smallest: Smallest, storage: Any) -> None:
    user = smallest.account.user_id
    token = obtain(storage, user)
    storage.get_valid_token(user)
    with contextlib.closing(psycopg2.connect(smallest.where[1])) as db, db, db.cursor() as cursor:
        cursor.execute("DELETE FROM minimal_tokens")
    assert storage.get_valid_token(user) == token
    smallest.forget_copies(user)  # as Redis does after a minute
    assert storage.get_valid_token(user) is None


@only("hybrid")
def test_without_postgresql_there_is_no_token_after_a_minute(smallest: Smallest, storage: Any) -> None:
    user = smallest.account.user_id
    token = obtain(storage, user)
    storage.get_valid_token(user)
    storage.url = "postgresql://127.0.0.1:1/none"
    assert storage.get_valid_token(user) == token
    smallest.forget_copies(user)  # as Redis does after a minute
    with pytest.raises(psycopg2.OperationalError):
        storage.get_valid_token(user)


def test_the_readme_tells_each_case() -> None:
    this = Path(__file__)
    tests = re.findall(r"(?m)^def (test_\w+)", this.read_text())
    rows = [line for line in README.read_text().splitlines() if line.startswith("|")][2:]
    links = [re.findall(r'\]\(\.\./\.\./([^ )]+) "(\w+)"\)', row) for row in rows]
    assert {file for (file, _), *_ in links} == {str(this.relative_to(ROOT))}, (
        "the first link shows the smallest version"
    )
    assert [row for row, found in zip(rows, links, strict=True) if len(found) < 2] == [], "the others show the full one"
    named = {name for each in links for file, name in each if file == str(this.relative_to(ROOT))}
    assert named == {*tests} - {"test_the_readme_tells_each_case"}
