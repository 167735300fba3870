"""Pattern 2: PostgreSQL with an audit trail. Many machines share one truth, and see who used which token when."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Unpack

from psycopg2.errors import InsufficientPrivilege
from psycopg2.extensions import connection

from ..core.backend import SCHEMA_LOCK
from ..core.checks import require_pool_size, require_positive
from ..core.errors import ConfigurationError, LoginSuperseded, StorageError, StoreUnavailable
from ..core.store import Options, TokenStorage
from ..core.token import AuditEntry, Secret, StoredToken
from . import queries
from .connections import PostgreSQLConnections, violated

logger = logging.getLogger(__name__)

STEP_SECONDS = 600.0  # for a schema step; an index on years of entries takes longer than any other answer


class PostgreSQLUpstoxStorage(TokenStorage):
    """Tokens in PostgreSQL 13 or newer.

    Args:
        connection_string: a URL or a libpq string, as `psycopg2.connect` takes it. Several hosts, TLS and a password
            file work as libpq documents them.
        pool_size: the maximum number of connections. A login uses one more to hold its lock; up to `pool_size` of
            those are kept as well.
        timeout: seconds for each answer of the server, and for a free connection of the pool.
        options: see `Options`.

    Raises:
        ConfigurationError: the connection string, the role or the schema is not usable.
        StoreUnavailable: the server cannot be reached.
    """

    _kind = "access token in PostgreSQL"
    # One step for each schema version. Never change a step that was released: append one.
    _steps: tuple[str, ...] = (queries.SCHEMA, queries.SCHEMA_2)

    def __init__(
        self, connection_string: str, *, pool_size: int = 5, timeout: float = 5.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        require_pool_size(pool_size)
        require_positive("timeout", timeout)
        dsn = Secret(connection_string)
        del connection_string  # A traceback that prints local variables must not show its password.
        self._connections = PostgreSQLConnections(dsn, pool_size, timeout)
        self._run = self._connections.run
        self.init_database()

    def init_database(self, runtime_role: str | None = None) -> None:
        """Make the tables, or upgrade those of an older version. Safe to repeat and to run concurrently.

        Args:
            runtime_role: a role to grant the least rights that storing and reading need. It can add to the audit
                trail, but cannot change it or drop anything. Run this as the owner of the tables.
        """
        answer = self._connections.answer
        with self._connections.session() as conn:
            if self._version(conn) == len(self._steps) and runtime_role is None:
                return
        with self._lock(SCHEMA_LOCK), self._connections.session() as conn:
            answer(conn, "BEGIN")
            self._take_forward(conn)
            if runtime_role is not None:
                quoted = '"' + runtime_role.replace('"', '""') + '"'
                answer(conn, queries.GRANTS.format(role=quoted))
            answer(conn, "COMMIT")
        runtime = f", and {runtime_role} may store and read tokens" if runtime_role else ""
        logger.info("%s now has schema version %s%s", self._connections.where, len(self._steps), runtime)

    def _take_forward(self, conn: connection) -> None:
        answer, there = self._connections.answer, self._version(conn)
        try:
            for version in range(there, len(self._steps)):
                step = f"{queries.VERSION_TABLE}; {self._steps[version]}; DELETE FROM upstox_schema"
                answer(conn, step, seconds=STEP_SECONDS)
                answer(conn, "INSERT INTO upstox_schema VALUES (%(version)s)", version=version + 1)
        except InsufficientPrivilege as error:
            if not there:
                raise
            raise ConfigurationError(
                f"{self._connections.where} has schema version {there}, but this package needs {len(self._steps)}, and "
                f"this role may not change the tables. Run this as their owner: upstox-db init --runtime-role "
                f"{conn.info.user}"
            ) from error

    def get_connection(self) -> AbstractContextManager[connection]:
        """Open an ordinary psycopg2 connection of your own, outside the pool. Commit what you write."""
        return self._connections.ordinary()

    def close(self) -> None:
        self._connections.close()

    def __repr__(self) -> str:
        return f"PostgreSQLUpstoxStorage({self._connections.where})"

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return self._connections.lock(name, self._login_wait)

    def _version(self, conn: connection) -> int:
        exists = self._connections.answer(
            conn,
            "SELECT to_regclass('upstox_schema') IS NOT NULL AS versioned, "
            "to_regclass('upstox_tokens') IS NOT NULL AS tokens",
        )[0]
        where = self._connections.where
        if exists["tokens"] != exists["versioned"]:
            raise ConfigurationError(
                f"{where} has a table upstox_tokens that was made by another program and may hold plaintext tokens. "
                "Choose another database or schema."
            )
        rows = self._connections.answer(conn, "SELECT version FROM upstox_schema") if exists["versioned"] else []
        version = int(rows[0]["version"]) if rows else 0
        if version > len(self._steps):
            raise ConfigurationError(
                f"{where} has schema version {version}, but this package knows {len(self._steps)}. Upgrade it."
            )
        return version

    def _find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        return self._use(user_id, alive_after, now, "{}", locked=locked)

    def _use(
        self, user_id: str, alive_after: datetime, now: datetime, metadata: str, *, locked: bool = False
    ) -> StoredToken | None:
        values: dict[str, Any] = {"user_id": user_id, "alive_after": alive_after, "now": now, "actor": self._actor}
        sql = queries.USE_UNMARKED if locked else queries.USE
        # A read that had to wait for a writer finds the old row inactive, and its snapshot is too old for the new row.
        # A read that saw a mark may find its lock free because that login has just succeeded. So we ask again before
        # we believe that there is no token. Nobody replaces a token three times meanwhile.
        for _ in range(3):
            # Not the connection that holds this thread's locks: its own login's lock would look free there.
            with self._connections.session(apart=not locked) as conn:
                rows = self._connections.answer(conn, sql, **values, metadata=metadata)
            if rows:
                return _token(rows[0])
        return None

    def _in_doubt(self, user_id: str) -> StoredToken | None:
        return next(map(_token, self._run(queries.IN_DOUBT, user_id=user_id)), None)

    def _newest(self, user_id: str) -> StoredToken | None:
        return next(map(_token, self._run(queries.NEWEST, user_id=user_id)), None)

    def _tokens_of_account(self, account: str) -> list[StoredToken]:
        return [_token(row) for row in self._run(queries.OF_ACCOUNT, account=account)]

    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> int:
        columns = {name: json.dumps(v) if type(v) in (list, dict) else v for name, v in asdict(token).items()}
        ended = {"action": "deactivated", "reason": json.dumps({"reason": "new_token_generated"})}
        begun = {"how": action, "details": json.dumps(metadata or {}), "actor": self._actor, "now": token.created_at}
        try:
            rows = self._run(queries.STORE, **columns, **ended, **begun)
        except StoreUnavailable as error:
            if violated(error) in queries.SUPERSEDED:
                raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.") from error
            raise
        return int(rows[0]["token_id"])

    def _begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        self._mark(user_id, lock, now, metadata)

    def _mark(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> list[str]:
        """Do the work of `_begin_login`, and return whose tokens it marked."""
        key = self._connections.begin_login(lock)
        entry = {"action": "login", "actor": self._actor, "now": now, "metadata": json.dumps(metadata)}
        rows = self._run(queries.MARK if user_id else queries.MARK_ALL, user_id=user_id, key=key, **entry)
        return [row["user_id"] for row in rows]

    def _end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        self._unmark(lock, in_doubt, user_id)

    def _unmark(self, lock: str, in_doubt: bool, user_id: str | None) -> list[str]:
        """Do the work of `_end_login`, and return whose tokens this login had marked."""
        key = self._connections.logins.get(lock)
        if key is None:  # This thread began no login under this lock, or has left the lock since.
            return []
        rows = self._run(queries.UNMARK, key=key, mark=0 if in_doubt else None, user_id=user_id)
        return [row["user_id"] for row in rows]

    def _clear_doubt(self, token: StoredToken) -> None:
        self._run(queries.CLEAR_DOUBT, user_id=token.user_id, generation=token.generation)

    def _revoke(self, user_id: str, now: datetime) -> bool:
        values = {"user_id": user_id, "action": "revoked", "actor": self._actor, "now": now, "reason": "{}"}
        return bool(self._run(queries.ERASE, **values))

    def _expire(self, now: datetime, limit: int) -> int:
        return len(self._run(queries.EXPIRE, now=now, limit=limit, actor=self._actor))

    def _forget_entries(self, before: datetime, limit: int) -> int:
        return len(self._run(queries.FORGET, before=before, limit=limit))

    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        metadata_text = json.dumps(metadata or {})
        self._run(queries.RECORD, user_id=user_id, action=action, actor=self._actor, now=now, metadata=metadata_text)

    def _logins_since(self, moment: datetime, process: str) -> list[datetime]:
        rows = self._run(queries.LOGINS_SINCE, moment=moment, process=process)
        return [row["performed_at"].astimezone(UTC) for row in rows]

    def _notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        (row,) = self._run(queries.NOTES, names=list(names))
        return row["now"], row["notes"]

    def _write_note(self, name: str, text: str) -> None:
        self._run(queries.WRITE_NOTE, name=name, sealed=text)

    def _erase_note(self, name: str) -> None:
        self._run(queries.ERASE_NOTE, name=name)

    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        return [_shown(row) for row in self._run(queries.HISTORY, user_id=user_id, limit=limit, now=now)]

    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        return _shown(self._run(queries.STATISTICS, user_id=user_id, now=now)[0])

    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        return [_shown(row) for row in self._run(queries.AUDIT, user_id=user_id, limit=limit)]

    def _under_other_keys(self, key_id: str, limit: int) -> list[StoredToken]:
        return [_token(row) for row in self._run(queries.OTHER_KEYS, key_id=key_id, limit=limit)]

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        replaced = self._run(
            queries.REPLACE,
            ids=[old.token_id for old, _ in rows],
            old=[old.ciphertext for old, _ in rows],
            new=[new.ciphertext for _, new in rows],
            key_ids=[new.key_id for _, new in rows],
        )
        return len(replaced)

    def _count_keys(self) -> dict[str, int]:
        return {row["key_id"]: row["count"] for row in self._run(queries.COUNT_KEYS)}

    def _users(self) -> list[str | None]:
        return [row["user_id"] for row in self._run(queries.USERS)]

    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        return [_token(row) for row in self._run(queries.TOKENS_OF, user_id=user_id)]

    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = {
            "performed_at": after.performed_at if after else "-infinity",
            "position": after.position if after else 0,
        }
        rows = self._run(queries.ENTRIES_OF, user_id=user_id, **place, limit=limit)
        return [AuditEntry(**_in_utc(row)) for row in rows]

    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        rows = [
            {
                **asdict(token),
                "access_token": token.ciphertext or None,
                "is_active": bool(token.ciphertext),
                "login_lock": 0 if token.in_doubt and token.ciphertext else None,
            }
            for token in tokens
        ]
        dumped = {"tokens": json.dumps(rows, default=datetime.isoformat)}
        dumped["entries"] = json.dumps([entry._asdict() for entry in entries], default=datetime.isoformat)
        self._run(queries.PUT_IN, user_id=user_id, **dumped)

    def _health(self) -> dict[str, Any]:
        try:
            self._count_keys()
        except StorageError as error:
            return {"postgresql": f"error: {error}"}
        return {"postgresql": "healthy"}


def _token(row: dict[str, Any]) -> StoredToken:
    return StoredToken(**_in_utc(row))


def _in_utc(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.astimezone(UTC) if isinstance(value, datetime) else value for name, value in row.items()}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row to what callers see: times become ISO text."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in _in_utc(row).items()}
