"""Where threads or `select.poll` are missing: at a program's end, and under eventlet, which removes `select.poll`."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from upstox_db_examples import PostgreSQLUpstoxStorage, StoreUnavailable, TokenStorage

from ..support.databases import MongoDatabase
from ..support.processes import USER, Address
from ..support.project import ROOT, run

AT_THE_END = """
import atexit
from tests.support.processes import USER, Address, made_up_login
from upstox_db_examples import StorageError

address = {address!r}
store = address.open(login=made_up_login)
before = store.store_token(USER)["token"]

def at_the_end():
    try:
        token = store.store_token(USER)["token"]
        print("stored")
    except StorageError as error:
        token = before
        print("the thread cannot be started" if "cannot be started: the program is ending" in str(error) else error)
    try:
        with address.open(login=made_up_login) as another:
            print("read" if another.get_valid_token(USER)["token"] == token else "read another one")
    except StorageError as error:
        print("the threads cannot be started" if "pymongo cannot start a thread" in str(error) else error)

atexit.register(at_the_end)
"""

WITHOUT_POLL = """
import select
del select.poll
from tests.support.processes import USER, Address, made_up_login
from upstox_db_examples import StoreUnavailable

address = {address!r}
with address.open(login=made_up_login) as store, address.open(login_wait=0.2, login=made_up_login) as other:
    token = store.store_token(USER)["token"]
    assert other.get_valid_token(USER)["token"] == token
    with store.backend.lock(USER):
        try:
            other.store_token(USER)
        except StoreUnavailable as error:
            assert "Waited" in str(error), error
            print("stored, read, waited")
"""


def test_at_the_end_of_a_program_a_store_works_or_says_why_not(each_address: Address, tmp_path: Path) -> None:
    """Python 3.12.0 and 3.12.1 start no thread in a function that `atexit` calls. Later versions do."""
    done = run(AT_THE_END.format(address=each_address), tmp_path, PYTHONPATH=str(ROOT))
    stored, read = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert stored in ("stored", "the thread cannot be started")
    assert read in ("read", "the threads cannot be started")
    if "Mongo" not in each_address.kind:  # No other store needs a thread.
        assert (stored, read) == ("stored", "read")


def test_a_login_whose_lease_no_thread_can_renew_is_not_begun(
    mongo: MongoDatabase, opened: Callable[..., TokenStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    logins: list[object] = []
    store = opened(Address("upstox_db_examples:MongoUpstoxStorage", tuple(mongo)), login=logins.append)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreUnavailable, match="cannot be started"):
            store.store_token(USER)
    assert logins == []
    with store.backend.lock(USER):
        pass


def test_every_store_works_without_select_poll(each_address: Address, tmp_path: Path) -> None:
    done = run(WITHOUT_POLL.format(address=each_address), tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "stored, read, waited\n", "")


def test_an_answer_that_does_not_come_is_noticed_without_select_poll(
    postgres_url: str, opened: Callable[..., TokenStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(select, "poll")
    store = opened(Address("upstox_db_examples:PostgreSQLUpstoxStorage", (postgres_url,)), timeout=0.3)
    assert isinstance(store, PostgreSQLUpstoxStorage)
    with pytest.raises(StoreUnavailable, match="no answer"):
        store.backend.connections.run("SELECT pg_sleep(5)")
