"""The operations of a store in PostgreSQL; see core/backend.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from psycopg2.errors import InsufficientPrivilege, UndefinedObject
from psycopg2.extensions import connection

from ..core.backend import RUNNING, Backend, HarmlessLogins
from ..core.context import Context
from ..core.errors import ConfigurationError, LoginSuperseded, StorageError, StoreUnavailable
from ..core.listener import Listener, TokenState
from ..core.locks import SCHEMA_LOCK
from ..core.token import AuditEntry, StoredToken, fields_of_token
from . import notices, queries, schema
from .connections import PostgreSQLConnections
from .errors import violated_constraint
from .locks import PostgreSQLLocks
from .rows import format_row, read_token, to_utc
from .session import DESCRIBE, quote

logger = logging.getLogger(__name__)

STEP_SECONDS = 600.0  # for a schema step; an index on years of entries takes longer than any other answer


class PostgreSQLBackend(Backend):
    """The operations on a PostgreSQL database."""

    store_kind = "access token in PostgreSQL"
    # One step for each schema version. Never change a step that was released: append one.
    schema_steps: tuple[str, ...] = (schema.SCHEMA, schema.SCHEMA_2, schema.SCHEMA_3)

    def __init__(self, connections: PostgreSQLConnections, context: Context) -> None:
        super().__init__(context, connections.where)
        self.connections, self._run = connections, connections.run
        self._run_prepared = connections.run_prepared  # for what each read or login needs
        self.locks = PostgreSQLLocks(connections)
        self._harmless = HarmlessLogins()

    def has_tables(self) -> bool:
        with self.connections.session() as conn:
            return self._version(conn) > 0

    def init_database(self, runtime_role: str | None = None) -> None:
        answer = self.connections.answer
        with self.connections.session() as conn:
            if self._version(conn) == len(self.schema_steps) and runtime_role is None:
                return
        with self.lock(SCHEMA_LOCK), self.connections.session() as conn:
            answer(conn, "BEGIN")
            self._take_forward(conn)
            if runtime_role is not None:
                self._let_in(conn, runtime_role)
            answer(conn, "COMMIT")
        runtime = f", and {runtime_role} may store and read tokens" if runtime_role else ""
        logger.info("%s now has schema version %s%s", self.where, len(self.schema_steps), runtime)

    def _take_forward(self, conn: connection) -> None:
        answer, there = self.connections.answer, self._version(conn)
        encoding = conn.info.parameter_status("server_encoding")
        if not there and encoding not in ("UTF8", "SQL_ASCII"):
            raise ConfigurationError(
                f"{self.where} has the encoding {encoding}, which lacks letters of some names. Create a database with "
                "ENCODING 'UTF8' for the store."
            )
        try:
            for version in range(there, len(self.schema_steps)):
                step = f"{schema.VERSION_TABLE}; {self.schema_steps[version]}; DELETE FROM upstox_schema"
                answer(conn, step, seconds=STEP_SECONDS)
                answer(conn, "INSERT INTO upstox_schema VALUES (%(version)s)", version=version + 1)
        except InsufficientPrivilege as error:
            if not there:
                raise
            raise ConfigurationError(
                f"{self.where} has schema version {there}, but this package needs {len(self.schema_steps)}, and "
                f"this role may not change the tables. Run this as their owner: upstox-db init --runtime-role "
                f"{conn.info.user}"
            ) from error

    def _let_in(self, conn: connection, runtime_role: str) -> None:
        names = {"role": quote(runtime_role), "schema": quote(self.connections.schema or "")}
        try:
            self.connections.answer(conn, (schema.GRANT_SCHEMA + schema.GRANTS).format(**names))
        except UndefinedObject as error:
            raise ConfigurationError(f"{self.where} does not know that role. Create it first.") from error

    def close(self) -> None:
        self.connections.close()
        self.locks.close()

    def lock(self, name: str) -> AbstractContextManager[None]:
        return self.locks.hold(name, self.context.login_wait)

    def _version(self, conn: connection) -> int:
        exists = self.connections.answer(
            conn,
            "SELECT to_regclass('upstox_schema') IS NOT NULL AS versioned, "
            "to_regclass('upstox_tokens') IS NOT NULL AS tokens",
        )[0]
        where = self.where
        if exists["tokens"] != exists["versioned"]:
            raise ConfigurationError(
                f"{where} has a table upstox_tokens that was made by another program and may hold plaintext tokens. "
                "Choose another database or schema."
            )
        rows = self.connections.answer(conn, "SELECT version FROM upstox_schema") if exists["versioned"] else []
        version = int(rows[0]["version"]) if rows else 0
        if version > len(self.schema_steps):
            raise ConfigurationError(
                f"{where} has schema version {version}, but this package knows {len(self.schema_steps)}. Upgrade it."
            )
        return version

    def find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        return self.find_and_record(user_id, alive_after, now, {}, locked=locked)

    def find_and_record(
        self, user_id: str, alive_after: datetime, now: datetime, metadata: dict[str, Any], *, locked: bool = False
    ) -> StoredToken | None:
        """Do the same as `find`, with this metadata in the audit entry."""
        values: dict[str, Any] = {
            "user_id": user_id,
            "alive_after": alive_after,
            "now": now,
            "actor": self.context.actor,
        }
        sql = queries.FIND_UNMARKED if locked else queries.FIND
        # A read that had to wait for a writer finds the old row inactive, and its snapshot is too old for the new row.
        # A read that saw a mark may find its lock free because that login has just succeeded. So we ask again before
        # we believe that there is no token. Nobody replaces a token three times meanwhile.
        for _ in range(3):
            if rows := self._run_prepared(sql, **values, metadata=json.dumps(metadata)):
                return read_token(rows[0])
        return None

    def find_in_doubt(self, user_id: str) -> StoredToken | None:
        return next(map(read_token, self._run(queries.IN_DOUBT, user_id=user_id)), None)

    def find_newest(self, user_id: str) -> StoredToken | None:
        return next(map(read_token, self._run_prepared(queries.NEWEST, user_id=user_id)), None)

    def find_by_account(self, account: str) -> list[StoredToken]:
        return [read_token(row) for row in self._run(queries.OF_ACCOUNT, account=account)]

    def listen(self) -> Listener:
        return notices.listen(self.connections)

    def read_states(self, user_ids: Collection[str]) -> dict[str, TokenState]:
        rows = self._run(queries.STATES, user_ids=list(user_ids))
        return {row.pop("user_id"): TokenState(**row) for row in rows}

    def insert(
        self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None
    ) -> StoredToken:
        columns = {name: json.dumps(v) if type(v) in (list, dict) else v for name, v in fields_of_token(token).items()}
        ended = {"action": "deactivated", "reason": json.dumps({"reason": "new_token_generated"})}
        begun = {
            "how": action,
            "details": json.dumps(metadata or {}),
            "actor": self.context.actor,
            "now": token.created_at,
        }
        try:
            rows = self._run_prepared(queries.STORE, **columns, **ended, **begun, harmless=list(self._harmless.marks))
        except StoreUnavailable as error:
            if violated_constraint(error) in queries.SUPERSEDED:
                raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.") from error
            raise
        token.token_id, token.in_doubt = int(rows[0]["token_id"]), rows[0]["in_doubt"]
        return token

    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        self.mark(user_id, lock, now, metadata)

    def mark(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> list[str]:
        """Do the work of `begin_login`, and return whose tokens it marked."""
        key, over = self.locks.begin_login(lock)
        self._harmless.marks = frozenset({*over, str(key)})
        entry = {"action": "login", "actor": self.context.actor, "now": now, "metadata": json.dumps(metadata)}
        if user_id:
            rows = self._run_prepared(queries.MARK, user_id=user_id, key=key, **entry)
        else:
            rows = self._run(queries.MARK_ALL, user_id=None, key=key, note=RUNNING + lock, **entry)
        return [row["user_id"] for row in rows]

    def end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        self.unmark(lock, in_doubt, user_id)

    def unmark(self, lock: str, in_doubt: bool, user_id: str | None) -> list[str]:
        """Do the work of `end_login`, and return whose tokens this login had marked."""
        key = self.locks.logins.get(lock)
        if key is None:  # This thread began no login under this lock, or has left the lock since.
            return []
        note = None if user_id or in_doubt else RUNNING + lock  # One that stays counts as one of a killed login.
        values = {"mark": 0 if in_doubt else None, "note": note, "harmless": list(self._harmless.marks)}
        rows = self._run(queries.UNMARK, key=key, user_id=user_id, **values)
        return [row["user_id"] for row in rows]

    def clear_doubt(self, token: StoredToken) -> None:
        self._run(queries.TRUST, user_id=token.user_id, generation=token.generation)

    def revoke(self, user_id: str, now: datetime) -> bool:
        values = {"user_id": user_id, "action": "revoked", "actor": self.context.actor, "now": now, "reason": "{}"}
        return bool(self._run(queries.REVOKE, **values))

    def expire(self, now: datetime, limit: int) -> int:
        return len(self._run(queries.EXPIRE, now=now, limit=limit, actor=self.context.actor))

    def delete_entries(self, before: datetime, limit: int) -> int:
        return len(self._run(queries.FORGET, before=before, limit=limit))

    def record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        metadata_text = json.dumps(metadata or {})
        self._run(
            queries.RECORD, user_id=user_id, action=action, actor=self.context.actor, now=now, metadata=metadata_text
        )

    def logins_since(self, moment: datetime, process: str) -> list[datetime]:
        rows = self._run(queries.LOGINS_SINCE, moment=moment, process=process)
        return [row["performed_at"].astimezone(UTC) for row in rows]

    def read_notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        (row,) = self._run_prepared(queries.NOTES, names=list(names))
        return row["now"], row["notes"]

    def write_note(self, name: str, text: str) -> None:
        self._run(queries.WRITE_NOTE, name=name, sealed=text)

    def erase_note(self, name: str) -> None:
        self._run(queries.ERASE_NOTE, name=name)

    def read_history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        return [format_row(row) for row in self._run(queries.HISTORY, user_id=user_id, limit=limit, now=now)]

    def read_statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        return format_row(self._run(queries.STATISTICS, user_id=user_id, now=now)[0])

    def read_audit_trail(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        return [format_row(row) for row in self._run(queries.AUDIT, user_id=user_id, limit=limit)]

    def find_under_other_keys(self, key_id: str, limit: int, after: str | None = None) -> list[StoredToken]:
        rows = self._run(queries.OTHER_KEYS, key_id=key_id, limit=limit, after=after or "")
        return [read_token(row) for row in rows]

    def replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        replaced = self._run(
            queries.REPLACE,
            ids=[old.token_id for old, _ in rows],
            old=[old.ciphertext for old, _ in rows],
            new=[new.ciphertext for _, new in rows],
            key_ids=[new.key_id for _, new in rows],
        )
        return len(replaced)

    def count_keys(self) -> dict[str, int]:
        return {row["key_id"]: row["count"] for row in self._run(queries.COUNT_KEYS)}

    def read_users(self, after: str, limit: int) -> list[str]:
        return [row["user_id"] for row in self._run(queries.USERS, after=after, limit=limit)]

    def read_tokens(self, user_id: str | None) -> list[StoredToken]:
        return [read_token(row) for row in self._run(queries.TOKENS_OF, user_id=user_id)]

    def read_entries(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = {
            "performed_at": after.performed_at if after else "-infinity",
            "position": after.position if after else 0,
        }
        rows = self._run(queries.ENTRIES_OF, user_id=user_id, **place, limit=limit)
        return [AuditEntry(**to_utc(row)) for row in rows]

    def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        rows = [
            {
                **fields_of_token(token),
                "access_token": token.ciphertext or None,
                "is_active": bool(token.ciphertext),
                "login_lock": 0 if token.in_doubt and token.ciphertext else None,
            }
            for token in tokens
        ]
        dumped = {"tokens": json.dumps(rows, default=datetime.isoformat)}
        dumped["entries"] = json.dumps([entry._asdict() for entry in entries], default=datetime.isoformat)
        self._run(queries.PUT_IN, user_id=user_id, **dumped)

    def check_health(self) -> dict[str, Any]:
        try:
            self.count_keys()
            (found,) = self._run(DESCRIBE)
        except StorageError as error:
            return {"postgresql": f"error: {error}"}
        details: dict[str, Any] = {"schema": self.connections.schema}
        if self.connections.pooled:
            details["pooler"] = True
        if found["overridden"]:  # what others have set and this store does not heed
            details["overridden"] = found["overridden"]
        if found["off"]:
            details["warning"] = f"A power cut can lose tokens, because the server has {', '.join(found['off'])} off."
        return {"postgresql": "healthy", "details": {"postgresql": details}}
