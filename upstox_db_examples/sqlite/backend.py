"""The operations of a store on a SQLite file; see core/backend.py."""

from __future__ import annotations

import json
import logging
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.backend import RUNNING, Backend, HarmlessLogins
from ..core.context import Context
from ..core.errors import ConfigurationError, InvalidInput, LoginSuperseded, StorageError
from ..core.forks import start_anew_in_children
from ..core.listener import Listener, TokenState
from ..core.locks import SCHEMA_LOCK, LocalLocks
from ..core.token import AuditEntry, StoredToken
from . import locks, queries
from .connections import SQLiteConnections, refuse_cut_off
from .notices import DataVersion
from .rows import columns_of, format_row, read_every_column, read_known, read_token, to_moment, to_seconds

logger = logging.getLogger(__name__)

ROOM = 64_000  # bytes; more than a token takes, with its index and audit entries
CACHE = -2000  # SQLite's default
_FILLER = "0" * ROOM


class SQLiteBackend(Backend):
    """The operations on a SQLite file.

    Args:
        connections: to the file.
        audit_reads: see `SQLiteUpstoxStorage`.
    """

    store_kind = "access token in SQLite"
    # There is one step for each schema version, and a file of an older version is upgraded. Never change a released
    # step: append one.
    schema_steps: tuple[str, ...] = (queries.SCHEMA, queries.SCHEMA_2)

    def __init__(self, connections: SQLiteConnections, context: Context, *, audit_reads: bool = False) -> None:
        super().__init__(context, repr(str(connections.path)))
        self.connections, self.path = connections, connections.path
        self._audit_reads = audit_reads
        self._locks = Path(f"{self.path}-locks")
        self._local_locks = LocalLocks()
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        self._harmless = HarmlessLogins()  # A child that is forked during a login takes no part in it.

    def has_tables(self) -> bool:
        with self.connections.lend() as conn:
            return self._version(conn) > 0

    def init_database(self, runtime_role: str | None = None) -> None:
        if runtime_role is not None:
            raise InvalidInput("SQLite has no roles: anyone who can write the file can do everything. Check its mode.")
        with self.connections.lend() as conn:
            if self._version(conn) == len(self.schema_steps):
                return
        # One process at a time: SQLite does not wait when two switch to WAL, it answers "locked" at once.
        with self.lock(SCHEMA_LOCK), self.connections.lend() as conn:
            conn.execute("PRAGMA journal_mode = WAL")
            for version in range(self._version(conn), len(self.schema_steps)):
                step = f"{self.schema_steps[version]} PRAGMA user_version = {version + 1};"
                conn.executescript(f"BEGIN IMMEDIATE; {step} COMMIT;")
                logger.info("%s now has schema version %s", self.path, version + 1)

    def close(self) -> None:
        self.connections.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self.connections.turn_to_write(), self.connections.lend() as conn:
            # IMMEDIATE, because a read that turns into a write fails at once if another writer came first.
            conn.execute("BEGIN IMMEDIATE")
            self.connections.refuse_another_log(conn)
            yield conn
            conn.execute("COMMIT")
            # What went into a file that is not the database any more must not be acknowledged.
            self.connections.refuse_another_log(conn)
            self.connections.refuse_another_file()

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        wait = self.context.login_wait
        with self._local_locks.hold(name, wait), locks.hold(f"{self._locks}/{name}.lock", name, wait):
            yield

    def _version(self, conn: sqlite3.Connection) -> int:
        # One statement sees one moment. With two, another process might make the tables in between.
        version, ours = map(int, conn.execute(queries.SCHEMA_VERSION).fetchone())
        if version > len(self.schema_steps):
            raise ConfigurationError(
                f"{self.path} has schema version {version}, but this package knows {len(self.schema_steps)}. "
                "Upgrade it."
            )
        if ours != (2 if version else 0):
            raise ConfigurationError(
                f"{self.path} was made by another program and may hold plaintext tokens. Choose another file."
            )
        refuse_cut_off(conn, self.path)
        return version

    def find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        if not self._audit_reads:
            return self._find_unaudited(user_id, to_seconds(alive_after), locked)
        with self._transaction() as conn:
            # Nobody else can write now, so the mark and the holder of its lock match.
            found = conn.execute(queries.FIND, (user_id, to_seconds(alive_after))).fetchone()
            if found is None or not self._may_hand_out(found["login_mark"], locked):
                return None
            row = conn.execute(queries.USE, (to_seconds(now), user_id, to_seconds(alive_after))).fetchone()
            self._audit_entry(conn, row["token_id"], user_id, "used", now, {"usage_count": row["usage_count"]})
        return read_token(row)

    def _find_unaudited(self, user_id: str, alive_after: int, locked: bool) -> StoredToken | None:
        read, values = self.connections.read, (user_id, alive_after)
        rows = read(queries.FIND, values)
        while rows and (mark := rows[0]["login_mark"]) is not None:
            if locked:
                return None
            if self._is_held(mark):
                break
            # The login is over. If its mark is still there, nobody knows how it ended. If not, there is news to read.
            rows = read(queries.FIND, values)
            if rows and rows[0]["login_mark"] == mark:
                return None
        return read_token(rows[0]) if rows else None

    def _may_hand_out(self, mark: str | None, locked: bool) -> bool:
        return mark is None or (not locked and self._is_held(mark))

    def _is_held(self, mark: str) -> bool:
        """Tell whether the login that left this mark still holds its lock."""
        return locks.is_held(f"{self._locks}/{mark.partition(' ')[0]}.lock")

    def find_in_doubt(self, user_id: str) -> StoredToken | None:
        row = self._one(queries.IN_DOUBT, user_id)
        if row and row["login_mark"].startswith(f"{user_id.upper()} "):
            # The lock that this mark names is the caller's now. Readers must not take the caller for that login.
            with self._transaction() as conn:
                conn.execute(queries.DOUBT, (user_id, row["login_mark"]))
        return read_known(row) if row else None

    def find_newest(self, user_id: str) -> StoredToken | None:
        row = self._one(queries.NEWEST, user_id)
        return read_known(row) if row else None

    def listen(self) -> Listener:
        return DataVersion(self.path)

    def read_states(self, user_ids: Collection[str]) -> dict[str, TokenState]:
        rows = self._rows(queries.STATES, json.dumps(list(user_ids)))
        return {user_id: TokenState(number, bool(active), bool(marked)) for user_id, number, active, marked in rows}

    def find_by_account(self, account: str) -> list[StoredToken]:
        return [read_known(row) for row in self._rows(queries.OF_ACCOUNT, account)]

    def insert(
        self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None
    ) -> StoredToken:
        with self._transaction() as conn:
            # A later token stays active, so that the insert that follows is refused.
            for row in conn.execute(queries.ERASE_EARLIER, (token.user_id, token.generation)).fetchall():
                reason = {"reason": "new_token_generated"}
                self._audit_entry(conn, row["id"], token.user_id, "deactivated", token.created_at, reason)
            harmless = self._harmless.marks if action == "created" else self._list_logins_that_are_over(conn)
            mark = self._mark_of_running(conn, harmless)
            try:
                token_id: int = conn.execute(queries.INSERT, columns_of(token) | {"login_mark": mark}).fetchone()["id"]
            except sqlite3.IntegrityError as error:
                # SQLite names the columns, not the constraint. A retry would not help against any other constraint.
                if str(error) not in queries.SUPERSEDED:
                    raise
                raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.") from error
            self._audit_entry(conn, token_id, token.user_id, action, token.created_at, metadata)
        token.token_id, token.in_doubt = token_id, mark is not None
        return token

    def revoke(self, user_id: str, now: datetime) -> bool:
        return self._erase("revoked", now, queries.ERASE, user_id) > 0

    def expire(self, now: datetime, limit: int) -> int:
        return self._erase("expired", now, queries.EXPIRE, to_seconds(now), limit)

    def delete_entries(self, before: datetime, limit: int) -> int:
        # Search outside the transaction, so that writers need not wait.
        old = [(row["id"],) for row in self._rows(queries.OLD_ENTRIES, to_seconds(before), limit)]
        with self._transaction() as conn:
            conn.executemany("DELETE FROM upstox_token_audit WHERE id = ?", old)
        return len(old)

    def _erase(self, action: str, now: datetime, sql: str, *values: object) -> int:
        with self._transaction() as conn:
            rows = conn.execute(sql, values).fetchall()
            for row in rows:
                self._audit_entry(conn, row["id"], row["user_id"], action, now)
        return len(rows)

    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        mark = f"{lock} {uuid.uuid4().hex}"
        with self._transaction() as conn:
            self._check_room(conn)
            self._audit_entry(conn, None, user_id, "login", now, metadata)
            values = {"user_id": user_id, "lock": lock, "mark": mark}
            conn.execute(queries.MARK if user_id else queries.MARK_ALL, values)
            over = self._list_logins_that_are_over(conn)
            if user_id is None:
                conn.execute(queries.WRITE_NOTE, (RUNNING + lock, mark))
        self._harmless.marks = over | {mark}

    def end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        with self._transaction() as conn:
            mark = "" if in_doubt else self._mark_of_running(conn, self._harmless.marks)
            conn.execute(queries.UNMARK, {"lock": lock, "mark": mark, "user_id": user_id})
            if user_id is None and not in_doubt:  # A note that stays counts as one of a login that was killed.
                conn.execute(queries.ERASE_NOTE, (RUNNING + lock,))

    def _list_logins_that_are_over(self, conn: sqlite3.Connection) -> frozenset[str]:
        running = [row["sealed"] for row in conn.execute(queries.RUNNING_LOGINS)]
        return frozenset(mark for mark in running if not self._is_held(mark))

    def _mark_of_running(self, conn: sqlite3.Connection, harmless: frozenset[str]) -> str | None:
        """Return the mark of a login without a user id that may replace this token. Its end brings the next one's."""
        running = (row["sealed"] for row in conn.execute(queries.RUNNING_LOGINS).fetchall())
        return next((mark for mark in running if mark not in harmless), None)

    def clear_doubt(self, token: StoredToken) -> None:
        which = (token.user_id, token.generation)
        with self._transaction() as conn:
            row = conn.execute(queries.MARK_OF, which).fetchone()
            # The caller holds the user's own lock, so only a login under another lock can be running.
            if row and (
                row["login_mark"].startswith(f"{token.user_id.upper()} ") or not self._is_held(row["login_mark"])
            ):
                conn.execute(queries.CLEAR_DOUBT, which)

    def record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        with self._transaction() as conn:
            self._audit_entry(conn, None, user_id, action, now, metadata)

    def logins_since(self, moment: datetime, process: str) -> list[datetime]:
        return [to_moment(row["performed_at"]) for row in self._rows(queries.LOGINS_SINCE, to_seconds(moment), process)]

    def read_notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        rows = self._rows(queries.NOTES, json.dumps(list(names)))
        return float(rows[0]["now"]), {row["name"]: row["sealed"] for row in rows if row["name"] is not None}

    def write_note(self, name: str, text: str) -> None:
        with self._transaction() as conn:
            conn.execute(queries.WRITE_NOTE, (name, text))

    def erase_note(self, name: str) -> None:
        with self._transaction() as conn:
            conn.execute(queries.ERASE_NOTE, (name,))

    def _check_room(self, conn: sqlite3.Connection) -> None:
        """Find out that the disk is full before a login is spent: write as much as the token needs, and take it back.

        With a cache of one page, SQLite writes it to the log at once. It does not count there, and the rest of the
        transaction overwrites it. (A checkpoint of the log would show it as well, but waits for the disk three more
        times.)
        """
        conn.execute("PRAGMA cache_size = 1")
        try:
            conn.execute("SAVEPOINT room")
            # Not as the metadata: SQLite would look whether they are JSON.
            conn.execute(queries.RECORD, (None, None, "room", _FILLER, 0, "{}"))
            conn.execute("ROLLBACK TO room")
        finally:
            conn.execute(f"PRAGMA cache_size = {CACHE}")

    def read_history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        rows = self._rows(queries.HISTORY, to_seconds(now), user_id, limit)
        return [{**format_row(row), "is_active": bool(row["is_active"])} for row in rows]

    def read_statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        return format_row(self._rows(queries.STATISTICS, to_seconds(now), user_id)[0])

    def read_audit_trail(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        rows = self._rows(queries.AUDIT, user_id, limit)
        return [{**format_row(row), "metadata": json.loads(row["metadata"])} for row in rows]

    def find_under_other_keys(self, key_id: str, limit: int, after: str | None = None) -> list[StoredToken]:
        return [read_token(row) for row in self._rows(queries.OTHER_KEYS, after or "", key_id, key_id, limit)]

    def replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        values = [(new.ciphertext, new.key_id, old.token_id, old.ciphertext) for old, new in pairs]
        with self._transaction() as conn:
            return conn.executemany(queries.REPLACE, values).rowcount

    def count_keys(self) -> dict[str, int]:
        return {row["key_id"]: row[1] for row in self._rows(queries.COUNT_KEYS)}

    def check_health(self) -> dict[str, Any]:
        try:
            self.count_keys()
        except StorageError as error:
            return {"sqlite": f"error: {error}"}
        return {"sqlite": "healthy"}

    def read_users(self, after: str, limit: int) -> list[str]:
        return [user_id for (user_id,) in self._rows(queries.USERS, after, after, limit, limit, limit)]

    def read_tokens(self, user_id: str | None) -> list[StoredToken]:
        return [read_every_column(row) for row in self._rows(queries.TOKENS_OF, user_id)]

    def read_entries(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = (to_seconds(after.performed_at), after.position) if after else (-1, 0)
        rows = self._rows(queries.ENTRIES_OF, user_id, *place, limit)
        return [
            AuditEntry(action, actor, to_moment(at), json.loads(text), *rest) for action, actor, at, text, *rest in rows
        ]

    def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        moved = ({**e._asdict(), "metadata": json.dumps(e.metadata), "user_id": user_id} for e in entries)
        rows = [{**each, "performed_at": to_seconds(each["performed_at"])} for each in moved]
        with self._transaction() as conn:
            conn.executemany(queries.PUT_IN, [columns_of(token) for token in tokens])
            mark = self._mark_of_running(conn, self._list_logins_that_are_over(conn))
            if tokens and mark:
                conn.execute(queries.MARK_MERGED, (mark, user_id))
            conn.executemany(queries.PUT_IN_AUDIT, rows)

    def _one(self, sql: str, *values: object) -> sqlite3.Row | None:
        rows = self._rows(sql, *values)
        return rows[0] if rows else None

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        return self.connections.read(sql, values)

    def _audit_entry(
        self,
        conn: sqlite3.Connection,
        token_id: int | None,
        user_id: str | None,
        action: str,
        now: datetime,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        text = json.dumps(metadata) if metadata else "{}"
        conn.execute(queries.RECORD, (token_id, user_id, action, self.context.actor, to_seconds(now), text))
