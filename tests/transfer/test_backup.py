"""SQLite's own backup is whole or refused, even while others write."""

from __future__ import annotations

import random
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from upstox_db_examples import (
    ConfigurationError,
    InvalidInput,
    SQLiteUpstoxStorage,
    StoreUnavailable,
    TokenStorage,
    export_tokens,
)

from ..support import processes
from ..support.clocks import Clock
from ..support.files import limit_file_size
from ..support.processes import KEY, USER, Address, made_up_login
from ..support.transfers import USERS, as_it_was, filled, token_of

Open = Callable[..., TokenStorage]


def test_a_backup_opens_as_any_other_database(sqlite: Address, opened: Open, clock: Clock, tmp_path: Path) -> None:
    store = filled(opened(sqlite), clock)
    assert isinstance(store, SQLiteUpstoxStorage)
    store.backup(tmp_path / "copy.db")
    copy = opened(sqlite._replace(arguments=(str(tmp_path / "copy.db"),)))
    assert as_it_was(copy) == as_it_was(store)
    assert isinstance(copy, SQLiteUpstoxStorage)
    with copy.get_connection() as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone()[0] == "wal", "otherwise a writer locks the readers out"


def test_a_backup_never_takes_the_place_of_a_database_in_use(
    sqlite: Address, opened: Open, clock: Clock, tmp_path: Path
) -> None:
    store = filled(opened(sqlite), clock)
    assert isinstance(store, SQLiteUpstoxStorage)
    in_use = opened(sqlite._replace(arguments=(str(tmp_path / "in_use.db"),)))
    token = in_use.store_token(USER)["token"]
    (tmp_path / "link.db").symlink_to(store.db_path)
    for path in (store.db_path, tmp_path / "link.db", tmp_path / "in_use.db"):
        with pytest.raises(InvalidInput, match="is a database in use"):
            store.backup(path)
    assert token_of(in_use, USER) == token
    assert token_of(store, USERS[0])


def test_a_backup_that_is_cut_off_is_refused(sqlite: Address, opened: Open, clock: Clock, tmp_path: Path) -> None:
    store = filled(opened(sqlite), clock)
    assert isinstance(store, SQLiteUpstoxStorage)
    store.backup(tmp_path / "copy.db")
    whole, dice = (tmp_path / "copy.db").read_bytes(), random.Random(1)
    anywhere = [dice.randrange(1, len(whole)) for _ in range(20)]
    in_the_last_page = [len(whole) - missing for missing in (1, 100, 4095, 4096)]
    for size in [1, *anywhere, *in_the_last_page]:
        cut = tmp_path / f"cut-{size}.db"
        cut.write_bytes(whole[:size])
        with pytest.raises(ConfigurationError, match=r"is damaged|is not a SQLite database"):
            SQLiteUpstoxStorage(cut, keys=KEY)


def test_a_full_disk_leaves_what_was_there_before(sqlite: Address, opened: Open, clock: Clock, tmp_path: Path) -> None:
    store = filled(opened(sqlite), clock)
    assert isinstance(store, SQLiteUpstoxStorage)
    for number in range(60):
        store.store_token(f"EF{number:04}")
    folder = tmp_path / "backups"
    folder.mkdir()
    store.backup(folder / "copy.db")
    export_tokens(store, folder / "export", progress=False)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    limit_file_size(40_000)  # more than the memory that SQLite's readers share
    try:
        with pytest.raises(StoreUnavailable, match=r"copy.db is on a disk that failed or is full"):
            store.backup(folder / "copy.db")
        with pytest.raises(StoreUnavailable, match=r"export cannot be written: File too large"):
            export_tokens(store, folder / "export", progress=False)
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_damaged_database_is_not_copied(sqlite: Address, opened: Open, clock: Clock, tmp_path: Path) -> None:
    store = filled(opened(sqlite), clock)
    assert isinstance(store, SQLiteUpstoxStorage)
    store.close()
    content = bytearray(store.db_path.read_bytes())
    for place in range(4096 * 3, len(content), 4096):
        content[place : place + 64] = bytes(64)
    store.db_path.write_bytes(content)
    with SQLiteUpstoxStorage(store.db_path, keys=KEY) as damaged, pytest.raises(ConfigurationError, match="is damaged"):
        damaged.backup(tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.slow
def test_a_backup_under_four_writers_holds_every_token_acknowledged_before(tmp_path: Path) -> None:
    path, lost_by_copying = tmp_path / "busy.db", 0
    address = Address("upstox_db_examples:SQLiteUpstoxStorage", (str(path),))
    with ExitStack() as stack:
        store = stack.enter_context(address.open(login=made_up_login))
        writers = [processes.start(processes.store_on_and_on, address) for _ in range(4)]
        for process, connection in writers:
            stack.callback(connection.close)
            stack.callback(processes.kill, process)
            assert connection.recv() == "ready"
        acknowledged: set[int] = set()
        for number in range(10):
            time.sleep(0.1)
            for _, connection in writers:
                while connection.poll():
                    acknowledged.add(connection.recv())
            shutil.copy(path, tmp_path / "naive.db")
            lost_by_copying += bool(acknowledged - ids(tmp_path / "naive.db"))
            copy = tmp_path / f"copy-{number}.db"
            store.backup(copy)
            assert acknowledged <= ids(copy)
            with address._replace(arguments=(str(copy),)).open() as restored:
                newest = restored.backend.find_newest(processes.USER)  # in doubt if a login was running at that moment
                assert newest is not None
                assert restored.cipher.decrypt(newest)
    assert len(acknowledged) > 50
    assert lost_by_copying, "a copy of the file alone should lack what is only in the log"
    assert list(tmp_path.glob(".*")) == []


def ids(path: Path) -> set[int]:
    conn = sqlite3.connect(path)
    try:
        return {row[0] for row in conn.execute("SELECT id FROM upstox_tokens")}
    except sqlite3.DatabaseError:
        return set()
    finally:
        conn.close()
