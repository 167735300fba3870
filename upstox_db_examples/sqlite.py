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

from .backend import SCHEMA_LOCK, LocalLocks, lock_not_had
from .errors import (
    ConfigurationError,
    InvalidInput,
    LoginSuperseded,
    StorageError,
)
from .files import written_whole
from .sqlite_connections import SQLiteConnections, checked_path, explained, refuse_cut_off
from .storage import Options, TokenStorage
from .token import AuditEntry, StoredToken

logger = logging.getLogger(__name__)

ROOM = 64_000  # bytes: more than a token with its index and audit entries takes
CACHE = -2000  # SQLite's own size

# Times are whole seconds since 1970, UTC: SQLite has no time type, and text in local time is what made the guide's
# query hand out dead tokens. An active row is exactly one that holds a ciphertext, so history cannot leak one.
SCHEMA = """
CREATE TABLE upstox_tokens (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id      TEXT    NOT NULL,
    access_token TEXT,
    key_id       TEXT    NOT NULL,
    generation   INTEGER NOT NULL,
    user_name    TEXT,
    email        TEXT,
    broker       TEXT,
    user_type    TEXT,
    products     TEXT    NOT NULL CHECK (json_valid(products)),
    exchanges    TEXT    NOT NULL CHECK (json_valid(exchanges)),
    is_active    INTEGER NOT NULL DEFAULT 1,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    account      TEXT,
    metadata     TEXT    NOT NULL CHECK (json_valid(metadata)),
    usage_count  INTEGER NOT NULL DEFAULT 0,
    last_used_at INTEGER,
    UNIQUE (user_id, generation),
    CHECK (is_active = (access_token IS NOT NULL))
) STRICT;
CREATE UNIQUE INDEX one_active_token ON upstox_tokens (user_id) WHERE is_active;
CREATE INDEX active_by_expiry ON upstox_tokens (expires_at) WHERE is_active;
CREATE INDEX active_by_key ON upstox_tokens (key_id) WHERE is_active;
CREATE INDEX latest_of_account ON upstox_tokens (account, id) WHERE account IS NOT NULL;
CREATE TABLE upstox_token_audit (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    token_id     INTEGER REFERENCES upstox_tokens (id),
    user_id      TEXT,
    action       TEXT    NOT NULL,
    actor        TEXT    NOT NULL,
    performed_at INTEGER NOT NULL,
    metadata     TEXT    NOT NULL CHECK (json_valid(metadata))
) STRICT;
CREATE INDEX audit_by_user ON upstox_token_audit (user_id, performed_at, id);
"""
# login_mark: the name of a login's lock and a random word of that login, while it may replace this token at Upstox;
# empty when nobody knows whether it did. A note is encrypted as a whole.
SCHEMA_2 = """
ALTER TABLE upstox_tokens ADD COLUMN issued_at INTEGER;
ALTER TABLE upstox_tokens ADD COLUMN login_mark TEXT;
CREATE INDEX logins ON upstox_token_audit (performed_at) WHERE action = 'login';
CREATE TABLE upstox_login_notes (name TEXT PRIMARY KEY, sealed TEXT NOT NULL) STRICT;
"""
VERSION = """
SELECT user_version, (SELECT count(*) FROM sqlite_schema WHERE name IN ('upstox_tokens', 'upstox_token_audit'))
FROM pragma_user_version
"""

_HANDED_OUT = (
    "id AS token_id, user_id, access_token AS ciphertext, key_id, generation, created_at, expires_at, user_name, "
    "email, usage_count, account, login_mark"
)
_KNOWN = f"{_HANDED_OUT}, issued_at"
FIND = f"SELECT {_HANDED_OUT} FROM upstox_tokens WHERE user_id = ? AND is_active AND expires_at > ?"
IN_DOUBT = f"SELECT {_KNOWN} FROM upstox_tokens WHERE user_id = ? AND is_active AND login_mark IS NOT NULL"
USE = f"""
UPDATE upstox_tokens SET usage_count = usage_count + 1, last_used_at = ?
WHERE user_id = ? AND is_active AND expires_at > ? RETURNING {_HANDED_OUT}
"""
INSERT = """
INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, user_name, email, broker, user_type, products,
                           exchanges, created_at, expires_at, account, metadata, issued_at)
VALUES (:user_id, :ciphertext, :key_id, :generation, :user_name, :email, :broker, :user_type, :products,
        :exchanges, :created_at, :expires_at, :account, :metadata, :issued_at) RETURNING id
"""
ERASE = """
UPDATE upstox_tokens SET is_active = 0, access_token = NULL, login_mark = NULL
WHERE user_id = ? AND is_active RETURNING id, user_id
"""
EXPIRE = """
UPDATE upstox_tokens SET is_active = 0, access_token = NULL, login_mark = NULL
WHERE id IN (SELECT id FROM upstox_tokens WHERE is_active AND expires_at <= ? LIMIT ?) RETURNING id, user_id
"""
RECORD = """
INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata) VALUES (?, ?, ?, ?, ?, ?)
"""
HISTORY = """
SELECT id AS token_id, created_at, expires_at, is_active AND expires_at > ? AS is_active, user_name, email, broker,
       usage_count, last_used_at
FROM upstox_tokens WHERE user_id = ? ORDER BY generation DESC LIMIT ?
"""
STATISTICS = """
SELECT count(*) AS total_tokens, count(*) FILTER (WHERE is_active AND expires_at > ?) AS active_tokens,
       coalesce(sum(usage_count), 0) AS total_usage, coalesce(avg(usage_count), 0.0) AS avg_usage_per_token,
       max(created_at) AS last_generation, max(last_used_at) AS last_usage
FROM upstox_tokens WHERE user_id = ?
"""
AUDIT = """
SELECT a.action, a.performed_at, a.actor, a.metadata, a.user_id, a.token_id, t.created_at AS token_created
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE a.user_id = ? ORDER BY a.performed_at DESC, a.id DESC LIMIT ?
"""
# By id, for old entries have low ones: so no index on the time has to be kept up to date with each write.
OLD_ENTRIES = "SELECT id FROM upstox_token_audit WHERE performed_at < ? ORDER BY id LIMIT ?"
# A mark that an earlier holder of the same lock has left says nothing any more but that it was not taken away.
_OF_THIS_LOCK = "substr(login_mark, 1, length(:lock) + 1) = :lock || ' '"
MARK = f"""
UPDATE upstox_tokens SET login_mark = CASE WHEN login_mark IS NULL THEN :mark ELSE '' END
WHERE is_active AND user_id = :user_id AND (login_mark IS NULL OR {_OF_THIS_LOCK})
"""
MARK_ALL = f"""
UPDATE upstox_tokens SET login_mark = CASE WHEN login_mark IS NULL THEN :mark ELSE '' END
WHERE is_active AND (login_mark IS NULL OR {_OF_THIS_LOCK})
"""
UNMARK = f"""
UPDATE upstox_tokens SET login_mark = :mark
WHERE is_active AND {_OF_THIS_LOCK} AND (:user_id IS NULL OR user_id = :user_id)
"""
CLEAR_DOUBT = "UPDATE upstox_tokens SET login_mark = NULL WHERE user_id = ? AND generation = ? AND is_active"
LOGINS_SINCE = """
SELECT performed_at FROM upstox_token_audit
WHERE action = 'login' AND performed_at > ? AND json_extract(metadata, '$.process') IS NOT ?
ORDER BY performed_at DESC LIMIT 100
"""
# SQLite has no clock but this machine's: that one, and not the store's, which a program may set.
NOTES = """
SELECT (julianday('now') - 2440587.5) * 86400 AS now, name, sealed FROM (SELECT 1) LEFT JOIN upstox_login_notes
ON name IN (SELECT value FROM json_each(?))
"""
WRITE_NOTE = """
INSERT INTO upstox_login_notes (name, sealed) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed
"""
OF_ACCOUNT = f"SELECT {_KNOWN} FROM upstox_tokens WHERE account = ? AND is_active ORDER BY id DESC LIMIT 100"
# Not used any more; somebody may import them.
GENERATION = "SELECT coalesce(max(generation), 0) FROM upstox_tokens WHERE user_id = ?"
USER_OF_ACCOUNT = "SELECT user_id FROM upstox_tokens WHERE account = ? ORDER BY id DESC LIMIT 1"
NEWEST = f"SELECT {_KNOWN} FROM upstox_tokens WHERE user_id = ? ORDER BY generation DESC LIMIT 1"
# Two ranges and not <>, which no index serves.
OTHER_KEYS = f"""
SELECT {_HANDED_OUT} FROM upstox_tokens WHERE is_active AND key_id < ? UNION ALL
SELECT {_HANDED_OUT} FROM upstox_tokens WHERE is_active AND key_id > ? LIMIT ?
"""
REPLACE = "UPDATE upstox_tokens SET access_token = ?, key_id = ? WHERE id = ? AND access_token = ?"
COUNT_KEYS = "SELECT key_id, count(*) FROM upstox_tokens WHERE is_active GROUP BY key_id"
# From one user of the audit trail straight to the next: it may have millions of entries, and few users.
USERS = """
WITH RECURSIVE audited (user_id) AS (
    SELECT min(user_id) FROM upstox_token_audit UNION ALL
    SELECT (SELECT min(a.user_id) FROM upstox_token_audit AS a WHERE a.user_id > audited.user_id) FROM audited
    WHERE user_id IS NOT NULL
)
SELECT user_id FROM upstox_tokens UNION SELECT user_id FROM audited WHERE user_id IS NOT NULL UNION
SELECT NULL WHERE EXISTS (SELECT 1 FROM upstox_token_audit WHERE user_id IS NULL) ORDER BY 1
"""
_COPIED = (
    "user_id, key_id, generation, created_at, expires_at, user_name, email, broker, user_type, products, exchanges, "
    "account, metadata, usage_count, last_used_at, issued_at"
)
TOKENS_OF = (
    f"SELECT {_COPIED}, coalesce(access_token, '') AS ciphertext, login_mark IS NOT NULL AS in_doubt "
    "FROM upstox_tokens WHERE user_id = ? ORDER BY generation"
)
ENTRIES_OF = """
SELECT a.action, a.actor, a.performed_at, a.metadata, t.generation, a.id
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE a.user_id IS ? AND (a.performed_at, a.id) > (?, ?) ORDER BY a.performed_at, a.id LIMIT ?
"""
PUT_IN = f"""
INSERT INTO upstox_tokens ({_COPIED}, access_token, is_active, login_mark)
VALUES ({", ".join(f":{name}" for name in _COPIED.split(", "))}, nullif(:ciphertext, ''), :ciphertext <> '',
        CASE WHEN :in_doubt THEN '' END)
ON CONFLICT (user_id, generation) DO UPDATE SET
    access_token = CASE WHEN excluded.is_active THEN access_token END, is_active = is_active AND excluded.is_active,
    usage_count = max(usage_count, excluded.usage_count),
    last_used_at = nullif(max(coalesce(last_used_at, 0), coalesce(excluded.last_used_at, 0)), 0)
"""
PUT_IN_AUDIT = """
INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)
VALUES ((SELECT id FROM upstox_tokens WHERE user_id = :user_id AND generation = :generation), :user_id, :action, :actor,
        :performed_at, :metadata)
"""


class SQLiteUpstoxStorage(TokenStorage):
    """Tokens in a SQLite file.

    Args:
        db_path: the file; made with mode 0600 if it is not there. Not on a network file system.
        audit_reads: count each handed-out token and write it to the audit trail. Off by default: a read then
            writes nothing, and is answered while another process writes.
        options: see `Options`.

    Raises:
        ConfigurationError: the path cannot be used, or holds something else.
    """

    _kind = "access token in SQLite"
    # One step for each schema version; a file of an older version is taken forward. Never change a step that was
    # released: append one.
    _steps: tuple[str, ...] = (SCHEMA, SCHEMA_2)

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
        """Make the tables, or bring those of an older version forward. Safe to repeat and to run at once.

        Args:
            runtime_role: not for SQLite, which knows no roles.
        """
        if runtime_role is not None:
            raise InvalidInput("SQLite has no roles: whoever may write to the file may do everything. Check its mode.")
        with self.get_connection() as conn:
            if self._version(conn) == len(self._steps):
                return
        # Only one process at a time, for SQLite answers a concurrent switch to WAL with "locked" without waiting.
        with self._lock(SCHEMA_LOCK), self.get_connection() as conn:
            conn.execute("PRAGMA journal_mode = WAL")
            for version in range(self._version(conn), len(self._steps)):
                step = f"{self._steps[version]} PRAGMA user_version = {version + 1};"
                conn.executescript(f"BEGIN IMMEDIATE; {step} COMMIT;")
                logger.info("%s has schema version %s now", self.db_path, version + 1)

    def get_connection(self) -> AbstractContextManager[sqlite3.Connection]:
        """A connection in autocommit mode. A transaction that is left open is rolled back.

        Raises:
            StoreUnavailable, ConfigurationError: whatever SQLite raised inside, in our words.
        """
        return self._connections.lent()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """A copy of the database at this moment, while others read and write. Open it as any other.

        It is whole or not there at all: it gets its name, in place of an older one, when it is on the disk.

        Raises:
            InvalidInput: a database that is in use lies there, maybe this one itself.
            StoreUnavailable: it cannot be written there.
        """
        # The log that lies beside a database in use would be applied to the copy, and destroy it.
        if Path(f"{path}-wal").exists() or (Path(path).exists() and self.db_path.samefile(path)):
            raise InvalidInput(f"{path} is a database in use. Name another file for its copy.")
        with written_whole(Path(path)) as temporary, self.get_connection() as conn:
            copy = sqlite3.connect(temporary, isolation_level=None)
            try:
                conn.backup(copy)  # In one step: else it would begin again whenever somebody writes.
                if copy.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                    raise sqlite3.DatabaseError
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.OperationalError):  # It is the copy's place, such as a full disk.
                    raise explained(error, Path(path)) from error
                raise ConfigurationError(
                    f"{self.db_path} is damaged, and so would be its copy. Bring an older backup back."
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
            # IMMEDIATE: a read that becomes a write fails at once when another writer was faster.
            conn.execute("BEGIN IMMEDIATE")
            yield conn
            conn.execute("COMMIT")

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        # The system frees the lock when its holder dies, and the file stays: unlinking it would let two in.
        lock = FileLock(self._locks / f"{name}.lock", timeout=self._login_wait, mode=0o600, thread_local=False)
        with self._local_locks.hold(name, self._login_wait):
            try:
                self._locks.mkdir(mode=0o700, exist_ok=True)
                lock.acquire()
            except Timeout as error:
                raise lock_not_had(name, self._login_wait) from error
            except OSError as error:
                raise ConfigurationError(f"No lock can be made in {self._locks}: {error.strerror}.") from error
            try:
                yield
            finally:
                lock.release()

    def _version(self, conn: sqlite3.Connection) -> int:
        # In one statement, and so of one moment: another process may be making the tables.
        version, ours = map(int, conn.execute(VERSION).fetchone())
        if version > len(self._steps):
            raise ConfigurationError(
                f"{self.db_path} has schema version {version}; this package knows {len(self._steps)}. Upgrade it."
            )
        if ours != (2 if version else 0):
            raise ConfigurationError(
                f"{self.db_path} was made by another program and may hold plaintext tokens. Name another file."
            )
        refuse_cut_off(conn, self.db_path)
        return version

    def _find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        if not self._audit_reads:
            return self._find_unaudited(user_id, _seconds(alive_after), locked)
        with self._transaction() as conn:
            # Nobody else can write meanwhile, so what the mark says and who holds its lock belong together.
            found = conn.execute(FIND, (user_id, _seconds(alive_after))).fetchone()
            if found is None or not self._counts(found["login_mark"], locked):
                return None
            row = conn.execute(USE, (_seconds(now), user_id, _seconds(alive_after))).fetchone()
            self._audit_entry(conn, row["token_id"], user_id, "used", now, {"usage_count": row["usage_count"]})
        return _token(row)

    def _find_unaudited(self, user_id: str, alive_after: int, locked: bool) -> StoredToken | None:
        rows = self._rows(FIND, user_id, alive_after)
        while rows and (mark := rows[0]["login_mark"]) is not None:
            if locked:
                return None
            if self._is_held(mark):
                break
            # The login is over. If its mark stayed, nobody knows how it ended; if not, there is something new.
            rows = self._rows(FIND, user_id, alive_after)
            if rows and rows[0]["login_mark"] == mark:
                return None
        return _token(rows[0]) if rows else None

    def _counts(self, mark: str | None, locked: bool) -> bool:
        return mark is None or (not locked and self._is_held(mark))

    def _is_held(self, mark: str) -> bool:
        """Whether the login that left this mark still holds its lock."""
        import fcntl  # Not at the top: Windows lacks it, and all else works there.

        try:
            with (self._locks / f"{mark.partition(' ')[0]}.lock").open("rb") as file:
                # Shared: two readers who look at once do not take each other for the holder.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _in_doubt(self, user_id: str) -> StoredToken | None:
        row = self._one(IN_DOUBT, user_id)
        return _known(row) if row else None

    def _newest(self, user_id: str) -> StoredToken | None:
        row = self._one(NEWEST, user_id)
        return _known(row) if row else None

    def _tokens_of_account(self, account: str) -> list[StoredToken]:
        return [_known(row) for row in self._rows(OF_ACCOUNT, account)]

    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> int:
        with self._transaction() as conn:
            for row in conn.execute(ERASE, (token.user_id,)).fetchall():
                reason = {"reason": "new_token_generated"}
                self._audit_entry(conn, row["id"], token.user_id, "deactivated", token.created_at, reason)
            try:
                token_id: int = conn.execute(INSERT, _columns(token)).fetchone()["id"]
            except sqlite3.IntegrityError as error:
                # SQLite names the columns and not the constraint. Another one has to be mended, not tried again.
                if str(error) != "UNIQUE constraint failed: upstox_tokens.user_id, upstox_tokens.generation":
                    raise
                raise LoginSuperseded(f"A newer login of {token.user_id} is stored. Read its token.") from error
            self._audit_entry(conn, token_id, token.user_id, action, token.created_at, metadata)
        return token_id

    def _revoke(self, user_id: str, now: datetime) -> bool:
        return self._erase("revoked", now, ERASE, user_id) > 0

    def _expire(self, now: datetime, limit: int) -> int:
        return self._erase("expired", now, EXPIRE, _seconds(now), limit)

    def _forget_entries(self, before: datetime, limit: int) -> int:
        # Looked for outside the transaction, which would keep writers waiting.
        old = [(row["id"],) for row in self._rows(OLD_ENTRIES, _seconds(before), limit)]
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
        self._make_room()  # First: a mark that stays because the disk is full would put a living token in doubt.
        with self._transaction() as conn:
            self._audit_entry(conn, None, user_id, "login", now, metadata)
            conn.execute(MARK if user_id else MARK_ALL, values)

    def _end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        with self._transaction() as conn:
            conn.execute(UNMARK, {"lock": lock, "mark": "" if in_doubt else None, "user_id": user_id})

    def _clear_doubt(self, token: StoredToken) -> None:
        with self._transaction() as conn:
            conn.execute(CLEAR_DOUBT, (token.user_id, token.generation))

    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        with self._transaction() as conn:
            self._audit_entry(conn, None, user_id, action, now, metadata)

    def _logins_since(self, moment: datetime, process: str) -> list[datetime]:
        return [_moment(row["performed_at"]) for row in self._rows(LOGINS_SINCE, _seconds(moment), process)]

    def _notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        rows = self._rows(NOTES, json.dumps(list(names)))
        return float(rows[0]["now"]), {row["name"]: row["sealed"] for row in rows if row["name"] is not None}

    def _write_note(self, name: str, text: str) -> None:
        with self._transaction() as conn:
            conn.execute(WRITE_NOTE, (name, text))

    def _erase_note(self, name: str) -> None:
        with self._transaction() as conn:
            conn.execute("DELETE FROM upstox_login_notes WHERE name = ?", (name,))

    def _make_room(self) -> None:
        """A full disk has to show before a login is spent: what the token needs is written once and rolled back.

        A cache of one page has it written to the log at once. There it counts for nothing, and the next transaction
        writes over it. (To bring the log into the database does as much, and waits for the disk three times more.)
        """
        with self.get_connection() as conn:
            conn.execute("PRAGMA cache_size = 1")
            try:
                conn.execute("BEGIN IMMEDIATE")
                conn.execute(RECORD, (None, None, "room", "", 0, json.dumps("0" * ROOM)))
                conn.execute("ROLLBACK")
            finally:
                conn.execute(f"PRAGMA cache_size = {CACHE}")

    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        rows = self._rows(HISTORY, _seconds(now), user_id, limit)
        return [{**_shown(row), "is_active": bool(row["is_active"])} for row in rows]

    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        return _shown(self._rows(STATISTICS, _seconds(now), user_id)[0])

    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        return [{**_shown(row), "metadata": json.loads(row["metadata"])} for row in self._rows(AUDIT, user_id, limit)]

    def _under_other_keys(self, key_id: str, limit: int) -> list[StoredToken]:
        return [_token(row) for row in self._rows(OTHER_KEYS, key_id, key_id, limit)]

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        values = [(new.ciphertext, new.key_id, old.token_id, old.ciphertext) for old, new in pairs]
        with self._transaction() as conn:
            return conn.executemany(REPLACE, values).rowcount

    def _count_keys(self) -> dict[str, int]:
        return {row["key_id"]: row[1] for row in self._rows(COUNT_KEYS)}

    def _health(self) -> dict[str, Any]:
        try:
            self._count_keys()
        except StorageError as error:
            return {"sqlite": f"error: {error}"}
        return {"sqlite": "healthy"}

    def _users(self) -> list[str | None]:
        return [row["user_id"] for row in self._rows(USERS)]

    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        return [_whole(row) for row in self._rows(TOKENS_OF, user_id)]

    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = (_seconds(after.performed_at), after.position) if after else (-1, 0)
        rows = self._rows(ENTRIES_OF, user_id, *place, limit)
        return [AuditEntry(who, by, _moment(at), json.loads(text), *rest) for who, by, at, text, *rest in rows]

    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        moved = ({**e._asdict(), "metadata": json.dumps(e.metadata), "user_id": user_id} for e in entries)
        rows = [{**each, "performed_at": _seconds(each["performed_at"])} for each in moved]
        with self._transaction() as conn:
            conn.executemany(PUT_IN, [_columns(token) for token in tokens])
            conn.executemany(PUT_IN_AUDIT, rows)

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
        conn.execute(RECORD, (token_id, user_id, action, self._actor, _seconds(now), json.dumps(metadata or {})))


def _columns(token: StoredToken) -> dict[str, object]:
    """A token as SQLite takes it: times as seconds, lists and dicts as JSON."""
    # Not by `asdict`, whose deep copies take three times as long.
    columns: dict[str, object] = {field.name: getattr(token, field.name) for field in fields(token)}
    for name, value in columns.items():
        if isinstance(value, datetime):
            columns[name] = _seconds(value)
        elif isinstance(value, list | dict):
            columns[name] = json.dumps(value)
    return columns


def _token(row: Iterable[Any]) -> StoredToken:
    # In the order of _HANDED_OUT, for every read comes by here and looking columns up by name takes twice as long.
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
    """A token with what is known of it beside what a reader needs."""
    *handed_out, issued_at = row
    return replace(_token(handed_out), issued_at=None if issued_at is None else _moment(issued_at))


def _whole(row: sqlite3.Row) -> StoredToken:
    """A token with all its columns."""
    columns = {name: row[name] for name in row.keys()}  # noqa: SIM118  # Iterating over a Row gives its values.
    columns["in_doubt"] = bool(columns["in_doubt"])
    for name in ("created_at", "expires_at", "last_used_at", "issued_at"):
        columns[name] = None if columns[name] is None else _moment(columns[name])
    for name in ("products", "exchanges", "metadata"):
        columns[name] = json.loads(columns[name])
    return StoredToken(**columns)


def _shown(row: sqlite3.Row) -> dict[str, Any]:
    """The row as callers see it: times as ISO text."""
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
