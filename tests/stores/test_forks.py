"""Children that are forked from a busy program, on every store."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import ConfigurationError, MongoUpstoxStorage, PooledUpstoxStorage, SQLiteUpstoxStorage
from upstox_db_examples.core.files import files_open_here, identity_of

from ..support import forks, processes
from ..support.databases import MongoDatabase
from ..support.processes import KEY, USER, Address, made_up_login


def outcome(job: Any, *arguments: Any, seconds: float) -> Any:
    process, connection = processes.start(job, *arguments)
    try:
        assert connection.poll(seconds), "it hangs"
        return connection.recv()
    finally:
        processes.kill(process)


def test_no_child_of_a_busy_program_hangs_or_sees_anything_wrong(each_address: Address) -> None:
    assert outcome(forks.fork_under_busy_threads, each_address, 10, seconds=120) == ({"right": 10}, {}, [])


@pytest.mark.slow
def test_many_children_of_a_busy_program_do_not_hang_either(each_address: Address) -> None:
    # A file is what a fork hurts most. A server sees one more client, and each child costs more.
    count = 200 if "SQLite" in each_address.kind else 60
    assert outcome(forks.fork_under_busy_threads, each_address, count, seconds=600) == ({"right": count}, {}, [])


def test_a_child_that_is_forked_in_a_login_leaves_the_login_to_its_parent(each_address: Address) -> None:
    assert outcome(forks.fork_in_a_login, each_address, seconds=60) == ([0], [True], True)


def test_a_child_has_a_client_of_mongodb_of_its_own(mongo: MongoDatabase) -> None:
    with MongoUpstoxStorage(*mongo, keys=KEY, login=made_up_login) as store:
        store.store_token(USER)

        def child() -> bool:
            warnings.simplefilter("error")  # pymongo warns of a client that was opened before the fork.
            return store.get_valid_token(USER) is not None

        assert forks.in_a_child(child) == "right"


@pytest.mark.parametrize("kind", [SQLiteUpstoxStorage, PooledUpstoxStorage])
class TestSQLite:
    def test_what_a_child_stores_stays_when_the_parent_closes(self, kind: Any, tmp_path: Path) -> None:
        store = kind(tmp_path / "upstox.db", keys=KEY, login=made_up_login)
        store.store_token(USER)
        opened, closed = threading.Event(), os.pipe()
        reading, writing = os.pipe()

        def child() -> bool:
            assert store.get_valid_token(USER)
            os.write(writing, b"open")
            os.read(closed[0], 1)
            store.store_token("CD5678")
            os.write(writing, b"done")
            return store.get_valid_token("CD5678") is not None

        def close_meanwhile() -> None:
            assert os.read(reading, 4) == b"open"
            store.close()
            os.write(closed[1], b"x")
            opened.set()

        closing = threading.Thread(target=close_meanwhile)
        closing.start()
        assert forks.in_a_child(child) == "right"
        closing.join()
        with kind(tmp_path / "upstox.db", keys=KEY) as again:
            assert again.get_valid_token("CD5678")

    def test_a_child_never_uses_a_database_that_was_open_at_the_fork(self, kind: Any, tmp_path: Path) -> None:
        store = kind(tmp_path / "upstox.db", keys=KEY, login=made_up_login)
        store.store_token(USER)

        def child() -> bool:
            with pytest.raises(ConfigurationError, match="was open when this process was forked"):
                store.get_valid_token(USER)
            with pytest.raises(ConfigurationError, match="was open when this process was forked"):
                kind(tmp_path / "upstox.db", keys=KEY)
            return True

        with store.get_connection() as conn:
            conn.execute("BEGIN IMMEDIATE")
            assert forks.in_a_child(child) == "right"
            conn.execute("COMMIT")
        assert store.get_valid_token(USER)
        assert forks.in_a_child(lambda: store.get_valid_token(USER) is not None) == "right"


def test_a_child_keeps_no_lock_of_its_parent(tmp_path: Path) -> None:
    store = SQLiteUpstoxStorage(tmp_path / "upstox.db", keys=KEY, login=made_up_login)
    with store.backend.lock(USER):
        lock = identity_of(tmp_path / "upstox.db-locks" / f"{USER}.lock")
        assert lock in files_open_here()
        assert forks.in_a_child(lambda: lock not in files_open_here()) == "right", "it would outlive the parent there"
