"""SQLite: the contract, the file, the schema and the path."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    export_tokens,
    sqlite,
)
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.sqlite import connections as sqlite_connections
from upstox_db_examples.sqlite.backend import SQLiteBackend
from upstox_db_examples.sqlite.connections import open_connection

from ..contracts.store import StoreContract
from ..support import leaks
from ..support.processes import USER, token_data
from ..support.sqlite import OnSQLite, bare
from ..support.stores import OpenStore, living


def others_can_read(file: Path) -> bool:
    # Only root can become another user. Otherwise look at the permissions of the file.
    if os.geteuid() != 0:
        return file.is_file() and bool(file.stat().st_mode & 0o077)
    command = ["cat", str(file)]
    done = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
    return done.returncode == 0


def token_data_of(user_id: str | None) -> AccessTokenData:
    return token_data(user_id or USER)


STEPS = SQLiteBackend.schema_steps


def with_steps(*steps: str) -> type[SQLiteUpstoxStorage]:
    """Return a store class of another version, with these schema steps."""
    backend = type("OtherBackend", (SQLiteBackend,), {"schema_steps": steps})
    return type("OtherVersion", (SQLiteUpstoxStorage,), {"backend_class": backend})


class TestSQLite(OnSQLite, StoreContract):
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
        # Use a folder that others can enter, because nobody else can enter pytest's.
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
        assert path.stat().st_mode & 0o777 == 0o640, "the mode must stay, because somebody may have set it on purpose"

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
            assert conn.execute("PRAGMA synchronous").fetchone()[0] == 2, "2 means FULL"
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
            (sqlite.OTHER_KEYS, 4),
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
        later_version = with_steps(*STEPS, "ALTER TABLE upstox_tokens ADD COLUMN colour TEXT;")
        token = store.store_token()["token"]
        with later_version(store.db_path, keys=store.cipher.ring, clock=store.backend.context.now) as later:
            assert living(later)["token"] == token
            with later.get_connection() as conn:
                assert conn.execute("SELECT colour FROM upstox_tokens").fetchone()["colour"] is None
        with pytest.raises(ConfigurationError, match="schema version 3"):
            SQLiteUpstoxStorage(store.db_path)

    def test_a_step_that_fails_leaves_the_schema_as_it_was(self, store: SQLiteUpstoxStorage) -> None:
        broken = with_steps(*STEPS, "ALTER TABLE upstox_tokens ADD COLUMN colour TEXT; SELECT nonsense;")
        with pytest.raises(StorageError):
            broken(store.db_path)
        with bare(store.db_path) as conn:
            assert conn.execute("PRAGMA user_version").fetchone()[0] == len(STEPS)
            assert "colour" not in [row["name"] for row in conn.execute("PRAGMA table_info(upstox_tokens)")]
        assert store.store_token()

    @pytest.mark.parametrize("nth", range(1, 7))
    def test_a_store_that_another_process_makes_meanwhile_is_opened(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
    ) -> None:
        """Another program creates the tables just before the nth statement of this one."""
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
            conn = open_connection(path)
            if not statements:
                conn.set_trace_callback(overtake)
            return conn

        monkeypatch.setattr(sqlite_connections, "open_connection", watched)
        with SQLiteUpstoxStorage(path) as store:
            assert store.get_valid_token(USER) is None
        # From the third statement on this program has the lock, and creates the tables.
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


@contextlib.contextmanager
def as_an_ordinary_user(folder: Path) -> Iterator[None]:
    """Run the block as nobody, who also gets the folder, because root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
