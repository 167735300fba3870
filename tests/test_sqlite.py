"""SQLite: the contract, and what is SQLite's own."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    InvalidInput,
    KeyRing,
    SQLiteUpstoxStorage,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
    TokenStorage,
    export_tokens,
    sqlite,
)
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.sqlite import connections as sqlite_connections
from upstox_db_examples.sqlite.connections import connected

from . import leaks, processes, reliability
from .conftest import Clock
from .contract import OpenStore, StoreContract, living
from .processes import USER, Address, token_data
from .reliability import Counts, ReliabilityContract


def others_can_read(file: Path) -> bool:
    if os.geteuid() != 0:  # Only root can become somebody else. For all others what counts is what they grant.
        return file.is_file() and bool(file.stat().st_mode & 0o077)
    command = ["cat", str(file)]
    done = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
    return done.returncode == 0


def token_data_of(user_id: str | None) -> AccessTokenData:
    return token_data(user_id or USER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "upstox.db"


class SQLiteContract(StoreContract):
    """The contract on a SQLite file, also for the pooled store."""

    counted = {"audit_reads": True}

    @pytest.fixture(autouse=True)
    def _file(self, path: Path) -> None:
        self.file = path

    def raw_rows(self) -> list[dict[str, Any]]:
        with bare(self.file) as conn:
            return [dict(row) for row in conn.execute("SELECT * FROM upstox_tokens ORDER BY id")]

    def write_raw(self, token_id: Any, **values: Any) -> None:
        with bare(self.file) as conn:
            for column, value in values.items():
                raw = int(value.timestamp()) if isinstance(value, datetime) else value
                conn.execute(f"UPDATE upstox_tokens SET {column} = ? WHERE id = ?", (raw, token_id))


class TestSQLite(SQLiteContract):
    def connect(self, **options: Any) -> TokenStorage:
        return SQLiteUpstoxStorage(self.file, **options)

    @pytest.fixture
    def store(self, open_store: OpenStore) -> SQLiteUpstoxStorage:
        store = open_store()
        assert isinstance(store, SQLiteUpstoxStorage)
        return store

    # The file

    def test_only_its_owner_can_read_the_files(self, store: SQLiteUpstoxStorage, path: Path) -> None:
        store.store_token()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert modes == {"upstox.db": 0o600, "upstox.db-wal": 0o600, "upstox.db-shm": 0o600, "upstox.db-locks": 0o700}

    def test_no_file_holds_the_token_or_any_credential(
        self, open_store: OpenStore, path: Path, account: Account, upstox: LocalUpstox
    ) -> None:
        store = open_store(audit_reads=True)
        tokens = [store.store_token()["token"], store.store_token()["token"], living(store)["token"]]
        upstox.fail("rate_limit")
        with contextlib.suppress(StorageError):
            store.store_token()
        store.revoke_token(USER)
        control = store.get_token_history(USER)[0]["email"]
        assert leaks.files_with(control, path.parent), "the search finds what is there"
        for secret in (*tokens, account.pin, account.totp_secret, account.client_secret):
            assert leaks.files_with(secret, path.parent) == []
        store.close()
        assert all(leaks.files_with(secret, path.parent) == [] for secret in tokens)

    def test_nobody_else_can_read_them(self, keys: KeyRing) -> None:
        # In a folder that others can enter, unlike pytest's.
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            (folder / "control").write_text("others can read this")
            (folder / "control").chmod(0o644)
            with SQLiteUpstoxStorage(folder / "upstox.db", login=token_data_of, keys=keys) as store:
                store.store_token(USER)
                store.backup(folder / "copy.db")
                export_tokens(store, folder / "export", progress=False)
                readable = {str(file.relative_to(folder)) for file in folder.rglob("*") if others_can_read(file)}
        assert readable == {"control"}

    def test_a_file_that_others_can_read_is_used_with_a_warning(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        SQLiteUpstoxStorage(path).close()
        SQLiteUpstoxStorage(path).close()
        assert "Others can" not in caplog.text
        path.chmod(0o640)
        SQLiteUpstoxStorage(path).close()
        assert f"Others can access {path}" in caplog.text
        assert path.stat().st_mode & 0o777 == 0o640, "whoever made it so may have a reason"

    def test_of_two_names_of_one_file_only_one_logs_in(
        self, open_store: OpenStore, path: Path, upstox: LocalUpstox
    ) -> None:
        stores = [open_store()]
        self.file = path.parent / "link.db"
        self.file.symlink_to(path)
        stores.append(open_store())
        upstox.login_seconds = 0.3
        with ThreadPoolExecutor(2) as threads:
            tokens = set(threads.map(lambda store: store.get_or_create_token(USER)["token"], stores))
        assert (len(tokens), upstox.logins()) == (1, 1)

    def test_links_that_lead_in_a_circle_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.db").symlink_to(tmp_path / "b.db")
        (tmp_path / "b.db").symlink_to(tmp_path / "a.db")
        with pytest.raises(ConfigurationError, match=r"a\.db cannot be (created|opened)"):
            SQLiteUpstoxStorage(tmp_path / "a.db")

    def test_a_commit_reaches_the_disk_before_it_is_acknowledged(self, store: SQLiteUpstoxStorage) -> None:
        with store.get_connection() as conn:
            assert conn.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            assert conn.execute("PRAGMA synchronous").fetchone()[0] == 2, "FULL"
            assert conn.execute("PRAGMA foreign_keys").fetchone()[0] == 1

    def test_the_database_itself_refuses_a_second_active_token(self, store: SQLiteUpstoxStorage, path: Path) -> None:
        store.store_token()
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, metadata"
        copied = f"SELECT 99, 'x', {columns} FROM upstox_tokens"
        with bare(path) as conn, pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            conn.execute(f"INSERT INTO upstox_tokens (generation, access_token, {columns}) {copied}")

    @pytest.mark.parametrize(
        ("statement", "values"),
        [
            (sqlite.FIND, 2),
            (sqlite.USE, 3),
            (sqlite.ERASE, 1),
            (sqlite.EXPIRE, 2),
            (sqlite.HISTORY, 3),
            (sqlite.STATISTICS, 2),
            (sqlite.AUDIT, 2),
            (sqlite.NEWEST, 1),
            (sqlite.IN_DOUBT, 1),
            (sqlite.OF_ACCOUNT, 1),
            (sqlite.CLEAR_DOUBT, 2),
            (sqlite.LOGINS_SINCE, 2),
            (sqlite.OTHER_KEYS, 3),
            (sqlite.TOKENS_OF, 1),
            (sqlite.ENTRIES_OF, 4),
        ],
    )
    def test_each_query_uses_an_index(self, store: SQLiteUpstoxStorage, statement: str, values: int) -> None:
        with store.get_connection() as conn:
            plan = [row["detail"] for row in conn.execute(f"EXPLAIN QUERY PLAN {statement}", (1,) * values)]
        steps = [step for step in plan if step.startswith(("SEARCH", "SCAN"))]
        assert steps, plan
        assert all(step.startswith("SEARCH") or "USING COVERING INDEX" in step for step in steps), plan
        assert not [step for step in plan if "TEMP B-TREE" in step], plan

    # The schema

    def test_an_older_schema_is_taken_forward_and_a_later_one_is_refused(self, store: SQLiteUpstoxStorage) -> None:
        class Later(SQLiteUpstoxStorage):
            _steps = (*SQLiteUpstoxStorage._steps, "ALTER TABLE upstox_tokens ADD COLUMN colour TEXT;")

        token = store.store_token()["token"]
        with Later(store.db_path, keys=store._ring, clock=store._clock) as later:
            assert living(later)["token"] == token
            with later.get_connection() as conn:
                assert conn.execute("SELECT colour FROM upstox_tokens").fetchone()["colour"] is None
        with pytest.raises(ConfigurationError, match="schema version 3"):
            SQLiteUpstoxStorage(store.db_path)

    def test_a_step_that_fails_leaves_the_schema_as_it_was(self, store: SQLiteUpstoxStorage) -> None:
        class Broken(SQLiteUpstoxStorage):
            _steps = (*SQLiteUpstoxStorage._steps, "ALTER TABLE upstox_tokens ADD COLUMN colour TEXT; SELECT nonsense;")

        with pytest.raises(StorageError):
            Broken(store.db_path)
        with bare(store.db_path) as conn:
            assert conn.execute("PRAGMA user_version").fetchone()[0] == len(SQLiteUpstoxStorage._steps)
            assert "colour" not in [row["name"] for row in conn.execute("PRAGMA table_info(upstox_tokens)")]
        assert store.store_token()

    @pytest.mark.parametrize("nth", range(1, 7))
    def test_a_store_that_another_process_makes_meanwhile_is_opened(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
    ) -> None:
        """Just before each statement of this one, in turn."""
        statements: list[str] = []
        overtaken: list[str] = []

        def overtake(statement: str) -> None:
            if statement.startswith("--"):  # a part of the statement before
                return
            statements.append(statement)
            if len(statements) == nth:
                try:
                    SQLiteUpstoxStorage(path, login_wait=0.05).close()
                    overtaken.append("made")
                except StoreUnavailable as error:
                    overtaken.append(str(error))

        def watched(path: Path) -> sqlite3.Connection:
            conn = connected(path)
            if not statements:
                conn.set_trace_callback(overtake)
            return conn

        monkeypatch.setattr(sqlite_connections, "connected", watched)
        with SQLiteUpstoxStorage(path) as store:
            assert store.get_valid_token(USER) is None
        # From the third on this one has the lock, and makes the tables.
        waited = "Waited 0.05 s for another program to make the tables. Try again, or raise login_wait."
        assert overtaken == ["made" if nth < 3 else waited]

    def test_a_file_of_another_program_is_refused_and_left_alone(self, path: Path) -> None:
        with bare(path) as conn:
            conn.execute("CREATE TABLE upstox_tokens (id INTEGER PRIMARY KEY, access_token TEXT NOT NULL)")
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match="made by another program"):
            SQLiteUpstoxStorage(path)
        assert path.read_bytes() == before

    # Paths

    @pytest.mark.parametrize("name", ["", ":memory:", "file:x.db?mode=memory", "a\0b", b"bytes.db"])
    def test_a_path_that_is_none_is_refused(self, name: Any) -> None:
        with pytest.raises(InvalidInput, match="path of a file"):
            SQLiteUpstoxStorage(name)

    def test_a_folder_a_missing_folder_and_an_endless_name_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="is a folder"):
            SQLiteUpstoxStorage(tmp_path)
        for missing in (tmp_path / "no" / "upstox.db", tmp_path / ("x" * 10_240)):
            with pytest.raises(ConfigurationError, match="cannot be created"):
                SQLiteUpstoxStorage(missing)

    def test_a_file_that_is_no_database_is_refused_and_left_alone(self, path: Path) -> None:
        path.write_bytes(b"not a database at all, but a letter. " * 100)
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match="is not a SQLite database"):
            SQLiteUpstoxStorage(path)
        assert path.read_bytes() == before

    def test_a_read_only_file_is_a_clear_error_and_costs_no_login(self, upstox: LocalUpstox) -> None:
        with tempfile.TemporaryDirectory() as name, as_an_ordinary_user(Path(name)):
            folder = Path(name)
            SQLiteUpstoxStorage(folder / "upstox.db").close()
            (folder / "upstox.db").chmod(0o400)
            folder.chmod(0o500)
            with pytest.raises(ConfigurationError, match="Check the mode and owner"):
                SQLiteUpstoxStorage(folder / "upstox.db").store_token()
            with pytest.raises(ConfigurationError, match="cannot be created"):
                SQLiteUpstoxStorage(folder / "other.db")
            folder.chmod(0o700)
        assert upstox.attempts() == 0

    # A full disk, another writer

    def test_a_full_database_costs_no_login_and_loses_nothing(
        self, store: SQLiteUpstoxStorage, upstox: LocalUpstox
    ) -> None:
        token = store.store_token()["token"]
        with full(store):
            for size in (1000, 100, 0):  # until there is no room for anything
                with pytest.raises(StoreUnavailable, match="disk is full"):
                    while True:
                        store._record(USER, "filler", store._now(), {"filler": "x" * size})
            with pytest.raises(StoreUnavailable, match="disk is full"):
                store.store_token()
            assert upstox.attempts() == 1, "no second login was begun"
            assert living(store)["token"] == token
        assert store.store_token()["token"] != token

    def test_a_disk_that_is_nearly_full_takes_the_token_or_refuses_before_the_login(self, tmp_path: Path) -> None:
        outcomes = set()
        for spare in range(0, 120_000, 4096):
            logins: list[str] = []

            def login(user_id: str | None, logins: list[str] = logins) -> AccessTokenData:
                logins.append("login")
                return token_data(user_id or USER)

            path = tmp_path / f"{spare}.db"
            with SQLiteUpstoxStorage(path, login=login, keys=processes.KEY) as store:
                store.store_token(USER)
                limit_file_size(path.with_name(f"{path.name}-wal").stat().st_size + spare - 60_000)
                try:
                    store.store_token(USER)
                except StoreUnavailable:
                    outcomes.add("refused")
                    assert logins == ["login"], f"a login was spent with {spare} bytes to spare"
                else:
                    outcomes.add("stored")
                finally:
                    limit_file_size(resource.RLIM_INFINITY)
        assert outcomes == {"refused", "stored"}

    def test_a_token_that_cannot_be_stored_is_in_the_error(self, open_store: OpenStore) -> None:
        def login_while_the_disk_fails(user_id: str | None) -> AccessTokenData:
            limit_file_size(1024)
            return token_data(user_id or USER)

        store = open_store(login=login_while_the_disk_fails)
        try:
            with pytest.raises(TokenNotStored, match="disk that failed or is full") as caught:
                store.store_token(USER)
        finally:
            limit_file_size(resource.RLIM_INFINITY)
        assert caught.value.token.reveal() == token_data(USER).access_token
        assert "eyJ0eXAieyJ0" not in f"{caught.value} {caught.value!r}"
        assert self.raw_rows() == []

    def test_another_writer_is_waited_for_and_then_named(
        self, path: Path, open_store: OpenStore, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_connections, "BUSY_SECONDS", 0.2)
        store = open_store()
        token = store.store_token()["token"]
        with bare(path) as other:
            other.execute("BEGIN IMMEDIATE")
            assert living(store)["token"] == token, "reading goes on"
            with pytest.raises(StoreUnavailable, match="locked by another writer"):
                store.store_token()
            other.execute("ROLLBACK")
        assert upstox.logins() == 1
        assert store.store_token()

    # Connections

    def test_threads_share_a_few_connections_and_none_stays_open(self, store: SQLiteUpstoxStorage) -> None:
        store.store_token()
        for _ in range(5):
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda _: store.get_valid_token(USER), range(80)))
        assert 1 <= len(store._connections._idle) <= 9
        store.close()
        assert not store._connections._idle

    def test_an_open_transaction_is_rolled_back_when_a_connection_comes_back(self, store: SQLiteUpstoxStorage) -> None:
        with store.get_connection() as conn:
            conn.execute("BEGIN")
            conn.execute("DELETE FROM upstox_token_audit")
        with store.get_connection() as conn:
            assert not conn.in_transaction
        with pytest.raises(ZeroDivisionError), store.get_connection() as conn:
            conn.execute("BEGIN IMMEDIATE")
            raise ZeroDivisionError
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            conn.execute("SELECT 1")
        assert store.store_token()


class TestSQLiteUnderCrowdsAndKills(ReliabilityContract):
    @pytest.fixture
    def address(self, path: Path) -> Address:
        return Address("upstox_db_examples:SQLiteUpstoxStorage", (str(path),))

    @pytest.fixture
    def count(self, path: Path) -> Callable[[], Counts]:
        return lambda: count(path)


class TestANaiveStoreUnderCrowdsAndKills:
    """The same promises, on a store that cannot keep them: they would notice."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock(datetime.now(UTC))

    @pytest.fixture
    def naive(self, path: Path) -> Address:
        return Address("tests.naive:NaiveStorage", (str(path),))

    def test_several_processes_log_in(self, naive: Address, upstox: LocalUpstox, account: Account) -> None:
        with pytest.raises(AssertionError):
            reliability.of_32_processes_on_an_empty_store_one_logs_in(naive, upstox, account)

    @pytest.mark.slow
    def test_a_crowd_whose_token_is_refused_logs_in(
        self, naive: Address, upstox: LocalUpstox, account: Account
    ) -> None:
        with pytest.raises(AssertionError, match="one before them, and one for all of them"):
            reliability.of_1024_callers_whose_token_is_refused_one_logs_in(naive, upstox, account, {})

    def test_a_holder_woken_late_makes_a_second_token(self, naive: Address) -> None:
        with pytest.raises(AssertionError, match="two tokens are believed to live"):
            reliability.a_holder_that_is_stopped_and_woken_late_makes_no_second_token(naive)

    def test_nobody_waits_for_a_login(self, naive: Address, upstox: LocalUpstox, account: Account) -> None:
        with pytest.raises(AssertionError, match="although another process is logging in"):
            reliability.a_login_whose_process_is_killed_holds_nobody_up(naive, upstox, account)

    @pytest.mark.slow
    def test_a_killed_writer_leaves_a_mess(self, naive: Address, path: Path) -> None:
        with pytest.raises(AssertionError, match="none active"):
            reliability.a_writer_can_be_killed_at_any_moment(naive, lambda: count(path))

    @pytest.mark.slow
    def test_a_rotation_in_two_steps_takes_tokens_away(self, path: Path) -> None:
        with pytest.raises(AssertionError, match="not there while keys were rotated"):
            reliability.a_rotation_can_be_killed_at_any_moment(Address("tests.naive:RotatesInTwoSteps", (str(path),)))

    @pytest.mark.slow
    def test_a_lock_that_removes_its_file_lets_two_in(self, naive: Address, tmp_path: Path) -> None:
        with pytest.raises(AssertionError):
            reliability.the_lock_lets_one_in_at_a_time(naive, tmp_path, 5)


def count(path: Path) -> Counts:
    with bare(path) as conn:
        active = [row["id"] for row in conn.execute("SELECT id FROM upstox_tokens WHERE is_active ORDER BY id")]
        ids = [row["id"] for row in conn.execute("SELECT id FROM upstox_tokens")]  # each later than the one before
        created = "SELECT token_id FROM upstox_token_audit WHERE action = 'created'"
        orphans = conn.execute(
            f"SELECT (SELECT count(*) FROM upstox_tokens WHERE id NOT IN ({created})) + "
            f"(SELECT count(*) FROM ({created}) WHERE token_id NOT IN (SELECT id FROM upstox_tokens))"
        ).fetchone()[0]
    return Counts(active, dict(zip(ids, ids, strict=True)), orphans)


@contextlib.contextmanager
def bare(path: Path) -> Iterator[sqlite3.Connection]:
    """The bare driver, in autocommit mode."""
    conn = sqlite3.connect(path, isolation_level=None, timeout=30)
    conn.row_factory = sqlite3.Row
    try:
        yield conn
    finally:
        conn.close()


@contextlib.contextmanager
def full(store: SQLiteUpstoxStorage) -> Iterator[None]:
    """SQLite itself says that the database cannot grow."""
    with store.get_connection() as conn:
        pages = conn.execute("PRAGMA page_count").fetchone()[0]

    def limited(path: Path) -> sqlite3.Connection:  # the limit belongs to a connection
        conn = connected(path)
        conn.execute(f"PRAGMA max_page_count = {pages}")
        return conn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_connections, "connected", limited)
        close_idle(store)
        yield
    close_idle(store)


def close_idle(store: SQLiteUpstoxStorage) -> None:
    while store._connections._idle:
        store._connections._idle.pop().close()


def limit_file_size(size: int) -> None:
    """The system refuses to let any file of this process grow beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def as_an_ordinary_user(folder: Path) -> Iterator[None]:
    """Root may write anywhere, so the test becomes nobody for a while. The folder goes to nobody, too."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
