"""Transfers that are killed, that others write into meanwhile, and that are large: nothing lost, nothing back again."""

from __future__ import annotations

import random
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    InvalidInput,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
    StorageError,
    StoreUnavailable,
    TokenStorage,
    export_tokens,
    import_tokens,
    migrate,
)
from upstox_db_examples.core.store import BATCH
from upstox_db_examples.core.token import AuditEntry, StoredToken

from . import processes
from .conftest import Clock
from .databases import MongoDatabase
from .processes import KEY, USER, Address, made_up_login
from .test_sqlite import limit_file_size
from .test_transfer import USERS, as_it_was, filled, to_be_compared, token_of, told

Open = Callable[..., TokenStorage]
MANY = 20_000  # audit entries of one user


# Killed, and done again


@pytest.mark.slow
def test_a_migration_can_be_killed_at_any_moment(each_address: Address, sqlite: Address, opened: Open) -> None:
    dice, in_its_midst = random.Random(1), 0
    if "Mongo" in each_address.kind:  # Each killed migration leaves a lease to wait for, so this one is short.
        each_address = each_address._replace(options={"lease": 0.1})
    source, target = opened(sqlite), opened(each_address)
    for number in range(21):
        # So that there is always something left to do: a token more for each, a token fewer, and someone new.
        for user in range(8 + number):
            source.store_token(f"CD{user:04}")
            source.get_valid_token(f"CD{user:04}")
        source.revoke_token(f"CD{number:04}")
        living, before = living_users(target), to_be_compared(target)
        process, connection = processes.start(processes.migrate_on, sqlite, each_address)
        assert connection.recv() == "ready"
        # Counted and not timed: a migration is as fast as the machine lets it be. Each user takes two writes.
        for _ in range(dice.randrange(2 * (8 + number))):
            assert connection.recv() == "writing"
        time.sleep(dice.uniform(0, 0.005))
        processes.kill(process)
        connection.close()
        in_its_midst += to_be_compared(target) not in (before, to_be_compared(source))
        assert living - living_users(target) <= {f"CD{number:04}"}, "who had a token has one, but for the revoked one"
    assert in_its_midst > 10, "they were hardly ever killed in the midst of writing"
    migrate(source, target, progress=False)
    assert to_be_compared(target) == to_be_compared(source)
    assert migrate(source, target, progress=False)[3:] == (0, 0)


def living_users(store: TokenStorage) -> set[str]:
    """Who has a token that lives. That nobody has two is looked at as well."""
    living = [token.user_id for user_id in store._users() for token in store._tokens_of(user_id) if token.ciphertext]
    assert len(living) == len(set(living))
    return set(living)


@pytest.mark.parametrize("left", ["records", "no audit"])
def test_a_migration_killed_between_two_writes_of_mongodb_is_completed(
    mongo: MongoDatabase, sqlite: Address, opened: Open, clock: Clock, left: str
) -> None:
    source = filled(opened(sqlite), clock)
    target = opened(Address("upstox_db_examples:MongoUpstoxStorage", tuple(mongo)))
    migrate(source, target, progress=False)
    with mongo.bare() as db:
        if left == "records":
            db.active_tokens.delete_many({})
        db.token_audit.delete_many({})
    assert migrate(source, target, progress=False).new_tokens == (2 if left == "records" else 0)
    assert to_be_compared(target) == to_be_compared(source)
    assert told(target) == told(source)


# Somebody writes meanwhile


def test_what_was_revoked_or_used_meanwhile_stays_so(each_address: Address, opened: Open, clock: Clock) -> None:
    target = opened(each_address)
    for user_id in USERS[:2]:
        target.store_token(user_id)
    read_before = {user_id: target._tokens_of(user_id) for user_id in USERS[:2]}
    target.revoke_token(USERS[0])
    target.get_valid_token(USERS[1])
    target.get_valid_token(USERS[1])
    for user_id, tokens in read_before.items():
        target._put_in(user_id, tokens, [])
    assert target.get_valid_token(USERS[0]) is None, "a revoked token came back"
    assert target.get_user_statistics(USERS[1])["total_usage"] == 2, "uses were lost"
    assert token_of(target, USERS[1])
    clock.advance(days=2)
    assert target.cleanup_expired_tokens() == 1, "the revoked one had its end before"


def test_three_migrations_at_once_bring_nothing_over_twice(
    each_address: Address, sqlite: Address, opened: Open
) -> None:
    source, target = opened(sqlite), opened(each_address)
    for user_id in USERS * 2:
        source.store_token(user_id)
        source.get_valid_token(user_id)
    started = [processes.start(processes.migrate_on, sqlite, each_address) for _ in range(3)]
    for process, connection in started:
        assert "done" in iter(connection.recv, None)
        process.join()
        connection.close()
    assert to_be_compared(target) == to_be_compared(source)


def test_a_login_at_the_source_meanwhile_is_noticed_and_brought_over_by_the_next_migration(
    each_address: Address, tmp_path: Path, opened: Open, clock: Clock
) -> None:
    class InUse(SQLiteUpstoxStorage):
        busy = True

        def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
            if self.busy and user_id == USERS[1]:
                self.busy = False
                self.store_token(user_id)
            return super()._entries_of(user_id, after, limit)

    target = opened(each_address)
    with InUse(tmp_path / "in_use.db", keys=KEY, login=made_up_login, clock=clock, audit_reads=True) as source:
        filled(source, clock)
        with pytest.raises(StorageError, match=f"differ for {USERS[1]}: somebody wrote meanwhile. Run it again"):
            migrate(source, target, progress=False)
        migrate(source, target, progress=False)
        assert to_be_compared(target) == to_be_compared(source)


def test_a_migration_waits_for_a_login_at_the_target_and_does_not_touch_its_token(
    each_address: Address, sqlite: Address, opened: Open, clock: Clock
) -> None:
    source, target = filled(opened(sqlite), clock), opened(each_address)
    migrate(source, target, progress=False)
    source.store_token(USERS[0])
    source.revoke_token(USERS[0])
    clock.advance(minutes=7)
    with ThreadPoolExecutor() as pool:
        migrations = []

        def slow_login(user_id: str | None) -> AccessTokenData:
            migrations.append(pool.submit(migrate, source, target, progress=False))
            assert not wait(migrations, timeout=1).done, "it did not wait"
            return made_up_login(user_id)

        token = opened(each_address, login=slow_login).store_token(USERS[0])["token"]
        with pytest.raises(InvalidInput, match=f"{USERS[0]} has another history there"):
            migrations[0].result()
    assert token_of(target, USERS[0]) == token


def test_a_target_that_was_read_hands_out_the_newer_token_at_once(
    each_address: Address, sqlite: Address, opened: Open, clock: Clock
) -> None:
    source, target = filled(opened(sqlite), clock), opened(each_address)
    migrate(source, target, progress=False)
    for user_id in (USERS[0], USERS[1]):
        assert token_of(target, user_id) == token_of(source, user_id)
    newer = source.store_token(USERS[0])["token"]
    source.revoke_token(USERS[1])
    migrate(source, target, progress=False)
    assert token_of(target, USERS[0]) == newer
    assert target.get_valid_token(USERS[1]) is None


def test_the_trail_is_in_the_order_of_time_also_where_the_older_half_came_later(
    each_address: Address, sqlite: Address, opened: Open, clock: Clock
) -> None:
    source, target = opened(sqlite), opened(each_address)
    source.store_token(USER)
    migrate(source, target, progress=False)
    clock.advance(minutes=1)
    source.get_valid_token(USER)
    clock.advance(minutes=1)
    target.get_valid_token(USER)
    clock.advance(minutes=1)
    migrate(source, target, progress=False)
    moments = [entry["performed_at"] for entry in target.get_audit_trail(USER)]
    assert moments == sorted(moments, reverse=True)
    assert len(set(moments)) == 3


# The comparison


@pytest.mark.parametrize("fault", ["a field", "an entry", "a token", "a ciphertext", "a use"])
def test_a_target_that_keeps_something_else_is_found_out(
    sqlite: Address, opened: Open, tmp_path: Path, clock: Clock, fault: str
) -> None:
    class Faulty(SQLiteUpstoxStorage):
        def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
            if fault == "a field":
                tokens = [replace(token, email="somebody@else.example") for token in tokens]
            elif fault == "a token":
                tokens = tokens[1:]
            elif fault == "a ciphertext":
                tokens = [replace(token, ciphertext="") for token in tokens]
            elif fault == "a use":
                tokens = [replace(token, usage_count=0) for token in tokens]
            super()._put_in(user_id, tokens, entries[1:] if fault == "an entry" else entries)

    source = filled(opened(sqlite), clock)
    options: dict[str, Any] = {"keys": KEY, "clock": clock}
    with Faulty(tmp_path / "faulty.db", **options) as target, pytest.raises(StorageError, match="two stores differ"):
        migrate(source, target, progress=False)


# Many


def test_round_through_all_five_stores(
    postgres_url: str,
    another_postgres_url: str,
    mongo: MongoDatabase,
    redis_server: str,
    redis_prefix: str,
    tmp_path: Path,
    sqlite: Address,
    opened: Open,
    clock: Clock,
) -> None:
    stations = [
        Address("upstox_db_examples:MongoUpstoxStorage", tuple(mongo)),
        Address("upstox_db_examples:HybridUpstoxStorage", (redis_server, postgres_url), {"redis_prefix": redis_prefix}),
        Address("upstox_db_examples:PooledUpstoxStorage", (str(tmp_path / "pooled.db"),)),
        Address("upstox_db_examples:PostgreSQLUpstoxStorage", (another_postgres_url,)),
        Address("upstox_db_examples:SQLiteUpstoxStorage", (str(tmp_path / "last.db"),)),
    ]
    first = source = filled(opened(sqlite), clock)
    for address in stations:
        target = opened(address)
        migrate(source, target, progress=False)
        assert to_be_compared(target) == to_be_compared(first)
        source = target
    assert told(source) == told(first)


def test_however_many_entries_a_user_has_they_go_over_some_hundreds_at_a_time(
    sqlite: Address, opened: Open, tmp_path: Path, postgres_url: str
) -> None:
    class Watched(PostgreSQLUpstoxStorage):
        most = 0

        def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
            self.most = max(self.most, len(entries))
            super()._put_in(user_id, tokens, entries)

    source = opened(sqlite)
    source.store_token(USER)
    assert isinstance(source, SQLiteUpstoxStorage)
    with source.get_connection() as conn:
        conn.execute("BEGIN")
        insert = (
            "INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata) "
            "VALUES (1, ?, 'used', 'x', ?, '{}')"
        )
        conn.executemany(insert, [(USER, 1_700_000_000 + number // 700) for number in range(MANY)])
        conn.execute("COMMIT")
    with Watched(postgres_url, keys=KEY, clock=source._clock) as target:
        counts = migrate(source, target, progress=False)
        assert counts.audit_entries == counts.new_audit_entries == MANY + 2
        assert target.most == BATCH
        assert migrate(source, target, progress=False).new_audit_entries == 0
        export_tokens(target, tmp_path / "export", progress=False)
    lines = (tmp_path / "export").read_text().splitlines()
    assert len(lines) == 1 + 1 + 1 + -(-(MANY + 2) // BATCH), "the first line, the token, the last line; and entries"
    third = opened(sqlite._replace(arguments=(str(tmp_path / "third.db"),)))
    assert import_tokens(third, tmp_path / "export", progress=False).new_audit_entries == MANY + 2


# SQLite's own backup


def test_a_backup_opens_as_any_other_database(sqlite: Address, opened: Open, clock: Clock, tmp_path: Path) -> None:
    store = filled(opened(sqlite), clock)
    assert isinstance(store, SQLiteUpstoxStorage)
    store.backup(tmp_path / "copy.db")
    copy = opened(sqlite._replace(arguments=(str(tmp_path / "copy.db"),)))
    assert as_it_was(copy) == as_it_was(store)
    assert isinstance(copy, SQLiteUpstoxStorage)
    with copy.get_connection() as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone()[0] == "wal", "else a writer locks the readers out"


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
                newest = restored._newest(processes.USER)  # in doubt, if a login was under way at that moment
                assert newest is not None
                assert restored._decrypt(newest)
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
