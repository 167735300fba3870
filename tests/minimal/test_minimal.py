"""What the smallest version of each pattern promises."""

from __future__ import annotations

import ast
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg2
import pymongo
import pytest
import redis
from cryptography.exceptions import InvalidTag

from upstox_db_examples.local.upstox import LocalUpstox

from ..support import minimal, processes
from ..support.clocks import Clock, ist
from ..support.leaks import find
from ..support.minimal import MODULES, Smallest, obtain
from ..support.project import ROOT, run

FILES = {pattern: ROOT / "upstox_db_examples" / "minimal" / f"{pattern}.py" for pattern in MODULES}


def only(pattern: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("smallest", [pattern], indirect=True)


# On every pattern


def test_of_12_processes_at_once_one_logs_in(
    smallest: Smallest, upstox: LocalUpstox, environment: dict[str, str], clock: Clock
) -> None:
    clock.now = datetime.now(ist(1, 0).tzinfo)  # the real time, as in the other processes
    upstox.login_seconds = 0.5
    tokens = processes.run_all(12, minimal.obtain_at_once, smallest, environment, 60.0)
    assert upstox.logins() == 1
    assert len(set(tokens)) == 1
    assert upstox.is_living(tokens[0])


@pytest.mark.parametrize(
    "shape",
    [
        {"missing": ["poa"]},
        {
            "missing": ["user_id", "exchanges"],
            "null": ["poa", "ddpi"],
            "changed": {"products": "D"},
            "added": {"new": 1},
        },
    ],
    ids=["no poa", "other fields"],
)
def test_a_profile_field_that_is_missing_or_odd_costs_no_token(
    storage: Any, smallest: Smallest, upstox: LocalUpstox, shape: dict[str, Any]
) -> None:
    upstox.shape_answers(**shape)
    token = obtain(storage, smallest.account.user_id)
    assert upstox.is_living(token)
    assert storage.get_valid_token(smallest.account.user_id) == obtain(storage, smallest.account.user_id) == token
    assert upstox.logins() == 1


@contextlib.contextmanager
def in_zone(zone: str) -> Iterator[None]:
    """Put the machine into this time zone."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            yield
    finally:
        time.tzset()


def test_no_dead_token_is_handed_out_at_half_past_three_whatever_the_machines_zone(
    storage: Any, smallest: Smallest, upstox: LocalUpstox, clock: Clock
) -> None:
    user = smallest.account.user_id
    for day, zone in enumerate(("Asia/Kolkata", "America/New_York", "Pacific/Auckland"), start=6):
        with in_zone(zone):
            clock.set(day, 2, 30)
            for dies in (ist(day, 3, 30), ist(day + 1, 3, 30)):  # A token from 02:30 lives for an hour.
                token = obtain(storage, user)
                assert upstox.is_living(token)
                assert smallest.rows()[user][1] == dies.timestamp()
                clock.now = dies
                clock.advance(seconds=-1)
                assert (storage.get_valid_token(user), upstox.is_living(token)) == (token, True)
                clock.now = dies
                assert (storage.get_valid_token(user), upstox.is_living(token)) == (None, False)


def test_a_login_that_lasts_past_half_past_three_leaves_no_dead_token(
    storage: Any, smallest: Smallest, upstox: LocalUpstox, clock: Clock
) -> None:
    user = smallest.account.user_id
    clock.set(7, 3, 29, 59)
    upstox.on_step = lambda step, what: clock.set(7, 3, 30, 1) if (step, what) == (6, "answer") else None
    assert not upstox.is_living(obtain(storage, user)), "it died while it was on its way"
    assert storage.get_valid_token(user) is None


def test_the_database_holds_no_plaintext(storage: Any, smallest: Smallest) -> None:
    token = obtain(storage, smallest.account.user_id)
    assert storage.get_valid_token(smallest.account.user_id) == token  # In the hybrid, this makes a copy.
    assert bool(smallest.copies()) == (smallest.pattern == "hybrid")
    assert smallest.account.user_id.encode() in smallest.everything(), "the search looks in the right place"
    assert find(token, smallest.everything()) == set()


def test_a_wrong_key_is_an_error_and_no_login(
    storage: Any, smallest: Smallest, open_one: Callable[..., Any], upstox: LocalUpstox
) -> None:
    user = smallest.account.user_id
    token = obtain(storage, user)
    with pytest.raises(InvalidTag):
        open_one(key=bytes(32)).get_valid_token(user)
    with pytest.raises(InvalidTag):
        obtain(open_one(key=bytes(32)), user)
    assert storage.get_valid_token(user) == token
    assert upstox.logins() == 1


def test_a_row_that_was_changed_is_refused(
    storage: Any, smallest: Smallest, open_one: Callable[..., Any], upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = smallest.account.user_id
    other = upstox.add_account(f"{user}X")
    obtain(storage, user)
    sealed, expires_at = smallest.rows()[user]
    for name, value in other.environ().items():
        monkeypatch.setenv(name, value)
    obtain(open_one(account=other), other.user_id)
    changes: tuple[tuple[str, str, Any], ...] = (
        (user, "expires_at", expires_at + 24 * 3600),
        (user, "token", sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (other.user_id, "token", sealed),
    )
    for whose, column, value in changes:
        before = smallest.rows()[whose][0 if column == "token" else 1]
        smallest.change(whose, column, value)
        with pytest.raises(InvalidTag):
            storage.get_valid_token(whose)
        smallest.change(whose, column, before)
        assert storage.get_valid_token(whose)


def test_credentials_of_another_user_are_refused_before_a_token_is_made(
    storage: Any, smallest: Smallest, upstox: LocalUpstox
) -> None:
    if smallest.pattern == "pooled":
        storage.accounts["ZZ0001"] = smallest.account.credentials()
    with pytest.raises(ValueError, match=r"not those of ZZ0001\. No token was made"):
        obtain(storage, "ZZ0001")
    assert upstox.attempts() == upstox.logins() == 0
    assert smallest.rows() == {}


# The point of each pattern


@only("postgresql")
def test_a_read_and_its_audit_entry_are_one_statement(storage: Any, smallest: Smallest) -> None:
    user = smallest.account.user_id
    assert storage.get_valid_token(user) is None
    obtain(storage, user)
    storage.get_valid_token(user)
    with psycopg2.connect(smallest.where[0]) as db, db.cursor() as cursor:
        cursor.execute("SELECT action FROM minimal_audit WHERE user_id = %s ORDER BY performed_at", (user,))
        assert cursor.fetchall() == [("login",), ("read",)]
        cursor.execute("ALTER TABLE minimal_audit ADD CONSTRAINT never CHECK (false) NOT VALID")
    db.close()
    with pytest.raises(psycopg2.errors.CheckViolation):
        storage.get_valid_token(user)


@only("mongodb")
def test_mongodb_deletes_a_token_an_hour_after_its_death_and_a_read_does_not_wait_for_that(
    storage: Any, smallest: Smallest, clock: Clock
) -> None:
    obtain(storage, smallest.account.user_id)
    clock.set(7, 3, 30)
    assert storage.get_valid_token(smallest.account.user_id) is None
    assert smallest.rows()
    with pymongo.MongoClient[Any](smallest.where[0]) as client:
        indexes = client[smallest.where[1]].minimal_tokens.index_information()
    assert indexes["expires_at_1"]["expireAfterSeconds"] == 3600


@only("hybrid")
def test_redis_answers_and_if_it_is_down_postgresql_does(storage: Any, smallest: Smallest) -> None:
    user = smallest.account.user_id
    token = obtain(storage, user)
    assert storage.get_valid_token(user) == token  # This makes the copy.
    reachable, storage.url = storage.url, "postgresql://127.0.0.1:1/none"
    assert storage.get_valid_token(user) == token
    with redis.Redis.from_url(smallest.where[0]) as client:
        (name,) = smallest.copies()
        assert 0 < client.ttl(name) <= 60
    storage.url, there = reachable, storage.redis
    with redis.Redis.from_url("redis://127.0.0.1:1/0", socket_timeout=0.25, retry=None) as storage.redis:
        assert storage.get_valid_token(user) == token
    storage.redis = there


@only("hybrid")
def test_a_dead_copy_in_redis_hides_no_new_token(storage: Any, smallest: Smallest, clock: Clock) -> None:
    user = smallest.account.user_id
    obtain(storage, user)
    storage.get_valid_token(user)
    clock.set(7, 3, 30)
    before = smallest.copies()
    token = obtain(storage, user)
    assert smallest.copies() == before, "the copy of the dead token is still there"
    assert storage.get_valid_token(user) == token


@only("pooled")
def test_the_pool_lends_as_many_connections_as_it_has_and_none_with_half_a_transaction(storage: Any) -> None:
    with pytest.raises(ZeroDivisionError), storage.connection() as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO minimal_tokens VALUES ('half', x'00', 0)")
        raise ZeroDivisionError
    borrowed = [storage.connection() for _ in range(5)]
    connections = [each.__enter__() for each in borrowed]
    assert len({id(each) for each in connections}) == 5
    assert storage.pool.empty()
    assert not any(each.in_transaction for each in connections)
    assert connections[0].execute("SELECT count(*) FROM minimal_tokens").fetchone() == (0,)
    for each in borrowed:
        each.__exit__(None, None, None)


@only("pooled")
def test_in_a_batch_each_account_gets_its_own_token_and_one_error_stops_no_other(
    storage: Any, upstox: LocalUpstox
) -> None:
    accounts = {name: upstox.add_account(name) for name in ("AA1111", "BB2222", "CC3333")}
    storage.accounts = {name: account.credentials() for name, account in accounts.items()}
    storage.accounts["BB2222"]["pin_code"] = "000000"
    results = storage.store_token_batch(["AA1111", "BB2222", "CC3333", "DD4444"])
    assert upstox.is_living(results["AA1111"])
    assert upstox.is_living(results["CC3333"])
    assert isinstance(results["BB2222"], Exception)
    assert isinstance(results["DD4444"], KeyError)
    assert storage.store_token_batch(["AA1111", "CC3333"]) == {n: results[n] for n in ("AA1111", "CC3333")}
    assert upstox.logins() == 2


# The files


@pytest.mark.parametrize("pattern", FILES)
def test_each_file_is_short_and_stands_alone(pattern: str) -> None:
    text = FILES[pattern].read_text()
    assert len(text.splitlines()) <= 100
    drivers = {"postgresql": {"psycopg2"}, "mongodb": {"pymongo"}, "hybrid": {"psycopg2", "redis"}}
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports)
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert outside == {"cryptography", "upstox_totp"} | drivers.get(pattern, set())


def test_what_all_files_need_is_the_same_in_each() -> None:
    functions = {
        pattern: {node.name: ast.unparse(node) for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
        for pattern, file in FILES.items()
    }
    login = functions["pooled"]["log_in"]
    for ours, theirs in (
        (", credentials: dict[str, Any]", ""),
        ("**credentials", ""),
        ("these arguments of UpstoxTOTP", "the UPSTOX_* variables"),
    ):
        assert ours in login
        login = login.replace(ours, theirs)
    functions["pooled"]["log_in"] = login
    for name in ("next_0330", "log_in"):
        assert len({each[name] for each in functions.values()}) == 1, name


def test_the_package_imports_none_of_them(tmp_path: Path) -> None:
    code = "import sys, upstox_db_examples.cli\nprint([name for name in sys.modules if '.minimal' in name])"
    assert run(code, tmp_path).stdout == "[]\n"
