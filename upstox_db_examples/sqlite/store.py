"""Pattern 1: SQLite. One file on one machine, any number of processes and threads."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

from filelock import FileLock, Timeout

from ..core.backend import SCHEMA_LOCK, LocalLocks, lock_not_had
from ..core.errors import (
    ConfigurationError,
    InvalidInput,
    LoginSuperseded,
    StorageError,
)
from ..core.files import written_whole
from ..core.store import Options, TokenStorage
from ..core.token import AuditEntry, StoredToken
from . import queries
from .connections import SQLiteConnections, checked_path, explained, refuse_cut_off

logger = logging.getLogger(__name__)

ROOM = 64_000  # bytes; more than a token takes, with its index and audit entries
CACHE = -2000  # SQLite's default


class SQLiteUpstoxStorage(TokenStorage):
    """Tokens in a SQLite file.

    Args:
        db_path: the file. It is made with mode 0600 if it is missing. It must not be on a network file system.
        audit_reads: count each token that is handed out, and write it to the audit trail. This is off by default:
            a read then writes nothing, and does not wait for other writers.
        options: see `Options`.

    Raises:
        ConfigurationError: the path cannot be used, or the file holds something else.
    """

    _kind = "access token in SQLite"
    # There is one step for each schema version, and a file of an older version is upgraded. Never change a released
    # step: append one.
    _steps: tuple[str, ...] = (queries.SCHEMA, queries.SCHEMA_2)

    def __init__(
        self, db_path: str | os.PathLike[str] = "upstox.db", *, audit_reads: bool = False, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self.db_path = checked_path(db_path)
        self._audit_reads = audit_reads
        self._locks = Path(f"{self.db_path}-locks")
        self._local_locks = LocalLocks()
        self._connections = self._connections_to(self.db_path)
        self.init_database()

    def init_database(self, runtime_role: str | None = None) -> None:
        """Make the tables, or upgrade those of an older version. Safe to repeat and to run concurrently.

        Args:
            runtime_role: must be None, because SQLite has no roles.
        """
        if runtime_role is not None:
            raise InvalidInput("SQLite has no roles: anyone who can write the file can do everything. Check its mode.")
        with self.get_connection() as conn:
            if self._version(conn) == len(self._steps):
                return
        # One process at a time: SQLite does not wait when two switch to WAL, it answers "locked" at once.
        with self._lock(SCHEMA_LOCK), self.get_connection() as conn:
            conn.execute("PRAGMA journal_mode = WAL")
            for version in range(self._version(conn), len(self._steps)):
                step = f"{self._steps[version]} PRAGMA user_version = {version + 1};"
                conn.executescript(f"BEGIN IMMEDIATE; {step} COMMIT;")
                logger.info("%s now has schema version %s", self.db_path, version + 1)

    def get_connection(self) -> AbstractContextManager[sqlite3.Connection]:
        """Lend a connection in autocommit mode. A transaction that is left open is rolled back.

        Raises:
            StoreUnavailable, ConfigurationError: SQLite raised an error inside; this is its translation.
        """
        return self._connections.lent()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the database as it is now, while others read and write. Open the copy like any other database.

        The copy is complete or missing: it gets its name, and replaces an older copy, only once it is on the disk.

        Raises:
            InvalidInput: the path is a database in use, maybe this one.
            StoreUnavailable: the copy cannot be written there.
        """
        # SQLite would apply the log beside a database in use to the copy, and destroy it.
        if Path(f"{path}-wal").exists() or (Path(path).exists() and self.db_path.samefile(path)):
            raise InvalidInput(f"{path} is a database in use. Choose another file for the copy.")
        with written_whole(Path(path)) as temporary, self.get_connection() as conn:
            copy = sqlite3.connect(temporary, isolation_level=None)
            try:
                conn.backup(copy)  # In one step. Otherwise it would start over whenever somebody writes.
                if copy.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                    raise sqlite3.DatabaseError
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.OperationalError):  # The destination failed: a full disk, for one.
                    raise explained(error, Path(path)) from error
                raise ConfigurationError(
                    f"{self.db_path} is damaged, and its copy would be too. Restore an older backup."
                ) from error
            finally:
                copy.close()
        logger.info("Copied %s to %s", self.db_path, path)

    def close(self) -> None:
        self._connections.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.db_path)!r})"

    def _connections_to(self, path: Path) -> SQLiteConnections:
        return SQLiteConnections(path)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self.get_connection() as conn:
            # IMMEDIATE, because a read that turns into a write fails at once if another writer came first.
            conn.execute("BEGIN IMMEDIATE")
            yield conn
            conn.execute("COMMIT")

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        # The system frees the lock when its holder dies. The file stays, because unlinking it would let two in.
        lock = FileLock(self._locks / f"{name}.lock", timeout=self._login_wait, mode=0o600, thread_local=False)
        with self._local_locks.hold(name, self._login_wait):
            try:
                self._locks.mkdir(mode=0o700, exist_ok=True)
                lock.acquire()
            except Timeout as error:
                raise lock_not_had(name, self._login_wait) from error
            except OSError as error:
                raise ConfigurationError(f"No lock file can be made in {self._locks}: {error.strerror}.") from error
            try:
                yield
            finally:
                lock.release()

    def _version(self, conn: sqlite3.Connection) -> int:
        # One statement sees one moment. With two, another process might make the tables in between.
        version, ours = map(int, conn.execute(queries.VERSION).fetchone())
        if version > len(self._steps):
            raise ConfigurationError(
                f"{self.db_path} has schema version {version}, but this package knows {len(self._steps)}. Upgrade it."
            )
        if ours != (2 if version else 0):
            raise ConfigurationError(
                f"{self.db_path} was made by another program and may hold plaintext tokens. Choose another file."
            )
        refuse_cut_off(conn, self.db_path)
        return version

    def _find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        if not self._audit_reads:
            return self._find_unaudited(user_id, _seconds(alive_after), locked)
        with self._transaction() as conn:
            # Nobody else can write now, so the mark and the holder of its lock match.
            found = conn.execute(queries.FIND, (user_id, _seconds(alive_after))).fetchone()
            if found is None or not self._counts(found["login_mark"], locked):
                return None
            row = conn.execute(queries.USE, (_seconds(now), user_id, _seconds(alive_after))).fetchone()
            self._audit_entry(conn, row["token_id"], user_id, "used", now, {"usage_count": row["usage_count"]})
        return _token(row)

    def _find_unaudited(self, user_id: str, alive_after: int, locked: bool) -> StoredToken | None:
        rows = self._rows(queries.FIND, user_id, alive_after)
        while rows and (mark := rows[0]["login_mark"]) is not None:
            if locked:
                return None
            if self._is_held(mark):
                break
            # The login is over. If its mark is still there, nobody knows how it ended. If not, there is news to read.
            rows = self._rows(queries.FIND, user_id, alive_after)
            if rows and rows[0]["login_mark"] == mark:
                return None
        return _token(rows[0]) if rows else None

    def _counts(self, mark: str | None, locked: bool) -> bool:
        return mark is None or (not locked and self._is_held(mark))

    def _is_held(self, mark: str) -> bool:
        """Tell whether the login that left this mark still holds its lock."""
        import fcntl  # Imported here, because Windows lacks it and everything else works there.

        try:
            with (self._locks / f"{mark.partition(' ')[0]}.lock").open("rb") as file:
                # A shared lock, so that two readers at once do not mistake each other for the holder.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _in_doubt(self, user_id: str) -> StoredToken | None:
        row = self._one(queries.IN_DOUBT, user_id)
        return _known(row) if row else None

    def _newest(self, user_id: str) -> StoredToken | None:
        row = self._one(queries.NEWEST, user_id)
        return _known(row) if row else None

    def _tokens_of_account(self, account: str) -> list[StoredToken]:
        return [_known(row) for row in self._rows(queries.OF_ACCOUNT, account)]

    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> int:
        with self._transaction() as conn:
            for row in conn.execute(queries.ERASE, (token.user_id,)).fetchall():
                reason = {"reason": "new_token_generated"}
                self._audit_entry(conn, row["id"], token.user_id, "deactivated", token.created_at, reason)
            try:
                token_id: int = conn.execute(queries.INSERT, _columns(token)).fetchone()["id"]
            except sqlite3.IntegrityError as error:
                # SQLite names the columns, not the constraint. A retry would not help against any other constraint.
                if str(error) != "UNIQUE constraint failed: upstox_tokens.user_id, upstox_tokens.generation":
                    raise
                raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.") from error
            self._audit_entry(conn, token_id, token.user_id, action, token.created_at, metadata)
        return token_id

    def _revoke(self, user_id: str, now: datetime) -> bool:
        return self._erase("revoked", now, queries.ERASE, user_id) > 0

    def _expire(self, now: datetime, limit: int) -> int:
        return self._erase("expired", now, queries.EXPIRE, _seconds(now), limit)

    def _forget_entries(self, before: datetime, limit: int) -> int:
        # Search outside the transaction, so that writers need not wait.
        old = [(row["id"],) for row in self._rows(queries.OLD_ENTRIES, _seconds(before), limit)]
        with self._transaction() as conn:
            conn.executemany("DELETE FROM upstox_token_audit WHERE id = ?", old)
        return len(old)

    def _erase(self, action: str, now: datetime, sql: str, *values: object) -> int:
        with self._transaction() as conn:
            rows = conn.execute(sql, values).fetchall()
            for row in rows:
                self._audit_entry(conn, row["id"], row["user_id"], action, now)
        return len(rows)

    def _begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        values = {"user_id": user_id, "lock": lock, "mark": f"{lock} {uuid.uuid4().hex}"}
        self._make_room()  # First, because a mark that a full disk keeps there would put a living token in doubt.
        with self._transaction() as conn:
            self._audit_entry(conn, None, user_id, "login", now, metadata)
            conn.execute(queries.MARK if user_id else queries.MARK_ALL, values)

    def _end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        with self._transaction() as conn:
            conn.execute(queries.UNMARK, {"lock": lock, "mark": "" if in_doubt else None, "user_id": user_id})

    def _clear_doubt(self, token: StoredToken) -> None:
        with self._transaction() as conn:
            conn.execute(queries.CLEAR_DOUBT, (token.user_id, token.generation))

    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        with self._transaction() as conn:
            self._audit_entry(conn, None, user_id, action, now, metadata)

    def _logins_since(self, moment: datetime, process: str) -> list[datetime]:
        return [_moment(row["performed_at"]) for row in self._rows(queries.LOGINS_SINCE, _seconds(moment), process)]

    def _notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        rows = self._rows(queries.NOTES, json.dumps(list(names)))
        return float(rows[0]["now"]), {row["name"]: row["sealed"] for row in rows if row["name"] is not None}

    def _write_note(self, name: str, text: str) -> None:
        with self._transaction() as conn:
            conn.execute(queries.WRITE_NOTE, (name, text))

    def _erase_note(self, name: str) -> None:
        with self._transaction() as conn:
            conn.execute("DELETE FROM upstox_login_notes WHERE name = ?", (name,))

    def _make_room(self) -> None:
        """Find out that the disk is full before a login is spent: write as much as the token needs, and roll back.

        With a cache of one page, SQLite writes it to the log at once. It does not count there, and the next transaction
        overwrites it. (A checkpoint of the log would show it as well, but waits for the disk three more times.)
        """
        with self.get_connection() as conn:
            conn.execute("PRAGMA cache_size = 1")
            try:
                conn.execute("BEGIN IMMEDIATE")
                conn.execute(queries.RECORD, (None, None, "room", "", 0, json.dumps("0" * ROOM)))
                conn.execute("ROLLBACK")
            finally:
                conn.execute(f"PRAGMA cache_size = {CACHE}")

    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        rows = self._rows(queries.HISTORY, _seconds(now), user_id, limit)
        return [{**_shown(row), "is_active": bool(row["is_active"])} for row in rows]

    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        return _shown(self._rows(queries.STATISTICS, _seconds(now), user_id)[0])

    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        rows = self._rows(queries.AUDIT, user_id, limit)
        return [{**_shown(row), "metadata": json.loads(row["metadata"])} for row in rows]

    def _under_other_keys(self, key_id: str, limit: int) -> list[StoredToken]:
        return [_token(row) for row in self._rows(queries.OTHER_KEYS, key_id, key_id, limit)]

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        values = [(new.ciphertext, new.key_id, old.token_id, old.ciphertext) for old, new in pairs]
        with self._transaction() as conn:
            return conn.executemany(queries.REPLACE, values).rowcount

    def _count_keys(self) -> dict[str, int]:
        return {row["key_id"]: row[1] for row in self._rows(queries.COUNT_KEYS)}

    def _health(self) -> dict[str, Any]:
        try:
            self._count_keys()
        except StorageError as error:
            return {"sqlite": f"error: {error}"}
        return {"sqlite": "healthy"}

    def _users(self) -> list[str | None]:
        return [row["user_id"] for row in self._rows(queries.USERS)]

    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        return [_whole(row) for row in self._rows(queries.TOKENS_OF, user_id)]

    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = (_seconds(after.performed_at), after.position) if after else (-1, 0)
        rows = self._rows(queries.ENTRIES_OF, user_id, *place, limit)
        return [AuditEntry(who, by, _moment(at), json.loads(text), *rest) for who, by, at, text, *rest in rows]

    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        moved = ({**e._asdict(), "metadata": json.dumps(e.metadata), "user_id": user_id} for e in entries)
        rows = [{**each, "performed_at": _seconds(each["performed_at"])} for each in moved]
        with self._transaction() as conn:
            conn.executemany(queries.PUT_IN, [_columns(token) for token in tokens])
            conn.executemany(queries.PUT_IN_AUDIT, rows)

    def _one(self, sql: str, *values: object) -> sqlite3.Row | None:
        rows = self._rows(sql, *values)
        return rows[0] if rows else None

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self.get_connection() as conn:
            return conn.execute(sql, values).fetchall()

    def _audit_entry(
        self,
        conn: sqlite3.Connection,
        token_id: int | None,
        user_id: str | None,
        action: str,
        now: datetime,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        values = (token_id, user_id, action, self._actor, _seconds(now), json.dumps(metadata or {}))
        conn.execute(queries.RECORD, values)


def _columns(token: StoredToken) -> dict[str, object]:
    """Convert a token to columns: times become seconds, lists and dicts become JSON."""
    # Not with `asdict`, because its deep copies take three times as long.
    columns: dict[str, object] = {field.name: getattr(token, field.name) for field in fields(token)}
    for name, value in columns.items():
        if isinstance(value, datetime):
            columns[name] = _seconds(value)
        elif isinstance(value, list | dict):
            columns[name] = json.dumps(value)
    return columns


def _token(row: Iterable[Any]) -> StoredToken:
    # In the order of _HANDED_OUT. Every read comes through here, and looking up columns by name takes twice as long.
    (
        token_id,
        user_id,
        ciphertext,
        key_id,
        generation,
        created_at,
        expires_at,
        user_name,
        email,
        used,
        account,
        mark,
    ) = row
    return StoredToken(
        user_id,
        ciphertext or "",
        key_id,
        generation,
        datetime.fromtimestamp(created_at, UTC),
        datetime.fromtimestamp(expires_at, UTC),
        user_name,
        email,
        account=account,
        token_id=token_id,
        usage_count=used,
        in_doubt=mark is not None,
    )


def _known(row: sqlite3.Row) -> StoredToken:
    """Read a token with more than a reader needs: when Upstox issued it."""
    *handed_out, issued_at = row
    return replace(_token(handed_out), issued_at=None if issued_at is None else _moment(issued_at))


def _whole(row: sqlite3.Row) -> StoredToken:
    """Read a token with all its columns."""
    columns = {name: row[name] for name in row.keys()}  # noqa: SIM118  # Iterating over a Row gives its values.
    columns["in_doubt"] = bool(columns["in_doubt"])
    for name in ("created_at", "expires_at", "last_used_at", "issued_at"):
        columns[name] = None if columns[name] is None else _moment(columns[name])
    for name in ("products", "exchanges", "metadata"):
        columns[name] = json.loads(columns[name])
    return StoredToken(**columns)


def _shown(row: sqlite3.Row) -> dict[str, Any]:
    """Convert a row to what callers see: times become ISO text."""
    times = (
        "created_at",
        "expires_at",
        "last_used_at",
        "performed_at",
        "token_created",
        "last_generation",
        "last_usage",
    )
    return {
        name: datetime.fromtimestamp(row[name], UTC).isoformat()
        if name in times and row[name] is not None
        else row[name]
        for name in row.keys()  # noqa: SIM118  # Iterating over a Row gives its values.
    }


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
