"""Transfers that are killed, that others write into, or that are large: nothing is lost, and nothing old returns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    InvalidInput,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
    StorageError,
    TokenStorage,
    export_tokens,
    import_tokens,
    migrate,
)
from upstox_db_examples.core.token import AuditEntry, StoredToken
from upstox_db_examples.postgresql.backend import PostgreSQLBackend
from upstox_db_examples.sqlite.backend import SQLiteBackend
from upstox_db_examples.transfer.transfer import ENTRIES_AT_ONCE

from ..support import processes
from ..support.clocks import Clock
from ..support.databases import MongoDatabase
from ..support.processes import KEY, USER, Address, made_up_login
from ..support.transfers import USERS, filled, to_be_compared, token_of, told

Open = Callable[..., TokenStorage]
MANY = 20_000  # audit entries of one user


# Kill and repeat


@pytest.mark.slow
def test_a_migration_can_be_killed_at_any_moment(each_address: Address, sqlite: Address, opened: Open) -> None:
    dice, in_its_midst = random.Random(1), 0
    # Each killed migration leaves a lease that the next one waits for, so make the lease short.
    if "Mongo" in each_address.kind:
        each_address = each_address._replace(options={"lease": 0.1})
    source, target = opened(sqlite), opened(each_address)
    for number in range(11):
        # Make sure that something is left to do: one more token for each user, one revoked, and one new user.
        for user in range(8 + number):
            source.store_token(f"CD{user:04}")
            source.get_valid_token(f"CD{user:04}")
        source.revoke_token(f"CD{number:04}")
        living, before = living_users(target), to_be_compared(target)
        process, connection = processes.start(processes.migrate_on, sqlite, each_address)
        assert connection.recv() == "ready"
        # Count writes, not seconds: a migration's speed depends on the machine. Each user takes two writes.
        for _ in range(dice.randrange(2 * (8 + number))):
            assert connection.recv() == "writing"
        time.sleep(dice.uniform(0, 0.005))
        processes.kill(process)
        connection.close()
        in_its_midst += to_be_compared(target) not in (before, to_be_compared(source))
        assert living - living_users(target) <= {f"CD{number:04}"}, "only the revoked user may be without a token"
    assert in_its_midst > 4, "few migrations were killed in the middle of writing"
    migrate(source, target, progress=False)
    assert to_be_compared(target) == to_be_compared(source)
    assert migrate(source, target, progress=False)[3:] == (0, 0)


def living_users(store: TokenStorage) -> set[str]:
    """Return the users that have an active token, and check that none has two."""
    living = [
        token.user_id
        for user_id in store.backend.list_users()
        for token in store.backend.read_tokens(user_id)
        if token.ciphertext
    ]
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


# Concurrent writes


def test_what_was_revoked_or_used_meanwhile_stays_so(each_address: Address, opened: Open, clock: Clock) -> None:
    target = opened(each_address)
    for user_id in USERS[:2]:
        target.store_token(user_id)
    read_before = {user_id: target.backend.read_tokens(user_id) for user_id in USERS[:2]}
    target.revoke_token(USERS[0])
    target.get_valid_token(USERS[1])
    target.get_valid_token(USERS[1])
    for user_id, tokens in read_before.items():
        target.backend.merge(user_id, tokens, [])
    assert target.get_valid_token(USERS[0]) is None, "a revoked token came back"
    assert target.get_user_statistics(USERS[1])["total_usage"] == 2, "uses were lost"
    assert token_of(target, USERS[1])
    clock.advance(days=2)
    assert target.cleanup_expired_tokens() == 1, "the revoked token had ended before"


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
    class InUseBackend(SQLiteBackend):
        busy = True

        def read_entries(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
            if self.busy and user_id == USERS[1]:
                self.busy = False
                source.store_token(user_id)
            return super().read_entries(user_id, after, limit)

    class InUse(SQLiteUpstoxStorage):
        backend_class = InUseBackend

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
            assert not wait(migrations, timeout=1).done, "the migration did not wait for the login"
            return made_up_login(user_id)

        token = opened(each_address, login=slow_login).store_token(USERS[0])["token"]
        with pytest.raises(InvalidInput, match=f"different histories of {USERS[0]}"):
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
    class FaultyBackend(SQLiteBackend):
        def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
            if fault == "a field":
                tokens = [replace(token, email="somebody@else.example") for token in tokens]
            elif fault == "a token":
                tokens = tokens[1:]
            elif fault == "a ciphertext":
                tokens = [replace(token, ciphertext="") for token in tokens]
            elif fault == "a use":
                tokens = [replace(token, usage_count=0) for token in tokens]
            super().merge(user_id, tokens, entries[1:] if fault == "an entry" else entries)

    class Faulty(SQLiteUpstoxStorage):
        backend_class = FaultyBackend

    source = filled(opened(sqlite), clock)
    options: dict[str, Any] = {"keys": KEY, "clock": clock}
    with Faulty(tmp_path / "faulty.db", **options) as target, pytest.raises(StorageError, match="two stores differ"):
        migrate(source, target, progress=False)


# Large transfers


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
    class WatchedBackend(PostgreSQLBackend):
        most = 0

        def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
            self.most = max(self.most, len(entries))
            super().merge(user_id, tokens, entries)

    class Watched(PostgreSQLUpstoxStorage):
        backend_class = WatchedBackend

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
    with Watched(postgres_url, keys=KEY, clock=source.backend.context.now) as target:
        counts = migrate(source, target, progress=False)
        assert counts.audit_entries == counts.new_audit_entries == MANY + 2
        assert isinstance(target.backend, WatchedBackend)
        assert target.backend.most == ENTRIES_AT_ONCE
        assert migrate(source, target, progress=False).new_audit_entries == 0
        export_tokens(target, tmp_path / "export", progress=False)
    lines = (tmp_path / "export").read_text().splitlines()
    assert len(lines) == 1 + 1 + 1 + -(-(MANY + 2) // ENTRIES_AT_ONCE), "there must be three lines besides the entries"
    third = opened(sqlite._replace(arguments=(str(tmp_path / "third.db"),)))
    assert import_tokens(third, tmp_path / "export", progress=False).new_audit_entries == MANY + 2
