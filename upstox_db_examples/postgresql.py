"""Pattern 2: PostgreSQL with an audit trail. Many machines, one truth, and who used which token when."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Unpack

from psycopg2 import errorcodes
from psycopg2.extensions import connection

from .backend import SCHEMA_LOCK
from .checks import require_pool_size, require_positive
from .errors import ConfigurationError, LoginSuperseded, StorageError, StoreUnavailable
from .postgresql_connections import PostgreSQLConnections
from .storage import Options, TokenStorage
from .token import AuditEntry, Secret, StoredToken

logger = logging.getLogger(__name__)

# user_type is text and not an enum: Upstox may add a type, and the token must be kept all the same. An active row is
# exactly one that holds a ciphertext. A page is left half empty so that counting a use writes no index.
SCHEMA = """
CREATE TABLE upstox_tokens (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      text        NOT NULL,
    access_token text,
    key_id       text        NOT NULL,
    generation   integer     NOT NULL,
    user_name    text,
    email        text,
    broker       text,
    user_type    text,
    products     jsonb       NOT NULL,
    exchanges    jsonb       NOT NULL,
    is_active    boolean     NOT NULL DEFAULT true,
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    account      text,
    metadata     jsonb       NOT NULL,
    usage_count  integer     NOT NULL DEFAULT 0,
    last_used_at timestamptz,
    UNIQUE (user_id, generation),
    CHECK (is_active = (access_token IS NOT NULL))
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX one_active_token ON upstox_tokens (user_id) WHERE is_active;
-- Not WHERE is_active: a planner that misjudges how many tokens live would then find a user's token by this index.
CREATE INDEX ciphertext_by_expiry ON upstox_tokens (expires_at) WHERE access_token IS NOT NULL;
CREATE INDEX active_by_key ON upstox_tokens (key_id) WHERE is_active;
CREATE INDEX latest_of_account ON upstox_tokens (account, id) WHERE account IS NOT NULL;
CREATE TABLE upstox_token_audit (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token_id     bigint REFERENCES upstox_tokens (id),
    user_id      text,
    action       text        NOT NULL,
    actor        text        NOT NULL,
    performed_at timestamptz NOT NULL,
    metadata     jsonb       NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_by_user ON upstox_token_audit (user_id, performed_at, id);
"""
VERSION_TABLE = "CREATE TABLE IF NOT EXISTS upstox_schema (version integer NOT NULL)"
# What a program needs that stores and reads tokens. The audit trail can only grow, and nothing can be dropped.
GRANTS = """
GRANT SELECT ON upstox_schema TO {role};
GRANT SELECT, INSERT, UPDATE (access_token, key_id, is_active, usage_count, last_used_at) ON upstox_tokens TO {role};
GRANT SELECT, INSERT ON upstox_token_audit TO {role};
"""

HANDED_OUT = """id AS token_id, user_id, access_token AS ciphertext, key_id, generation,
              created_at, expires_at, user_name, email, usage_count"""
_AUDIT = "INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)"
# Reading, counting and auditing are one statement: one round trip, and either all of it happens or nothing.
USE = f"""
WITH used AS (
    UPDATE upstox_tokens SET usage_count = usage_count + 1, last_used_at = %(now)s
    WHERE user_id = %(user_id)s AND is_active AND expires_at > %(alive_after)s
    RETURNING {HANDED_OUT}
), audited AS (
    {_AUDIT}
    SELECT token_id, user_id, 'used', %(actor)s, %(now)s,
           jsonb_build_object('usage_count', usage_count) || %(metadata)s::jsonb FROM used
)
SELECT * FROM used
"""
ERASE = f"""
WITH erased AS (
    UPDATE upstox_tokens SET is_active = false, access_token = NULL WHERE user_id = %(user_id)s AND is_active
    RETURNING id, user_id
)
{_AUDIT} SELECT id, user_id, %(action)s, %(actor)s, %(now)s, %(reason)s FROM erased RETURNING token_id
"""
INSERT = f"""
WITH stored AS (
    INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, user_name, email, broker, user_type,
                               products, exchanges, created_at, expires_at, account, metadata)
    VALUES (%(user_id)s, %(ciphertext)s, %(key_id)s, %(generation)s, %(user_name)s, %(email)s, %(broker)s,
            %(user_type)s, %(products)s, %(exchanges)s, %(created_at)s, %(expires_at)s, %(account)s, %(metadata)s)
    RETURNING id, user_id
)
{_AUDIT} SELECT id, user_id, 'created', %(actor)s, %(created_at)s, '{{}}' FROM stored RETURNING token_id
"""
# Two statements in one message are one transaction and one round trip.
STORE = f"{ERASE};{INSERT}"
EXPIRE = f"""
WITH dead AS (
    SELECT id FROM upstox_tokens WHERE access_token IS NOT NULL AND expires_at <= %(now)s
    ORDER BY expires_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), erased AS (
    UPDATE upstox_tokens SET is_active = false, access_token = NULL WHERE id IN (SELECT id FROM dead)
    RETURNING id, user_id
)
{_AUDIT} SELECT id, user_id, 'expired', %(actor)s, %(now)s, '{{}}' FROM erased RETURNING token_id
"""
RECORD = f"{_AUDIT} VALUES (NULL, %(user_id)s, %(action)s, %(actor)s, %(now)s, %(metadata)s)"
HISTORY = """
SELECT id AS token_id, created_at, expires_at, is_active AND expires_at > %(now)s AS is_active, user_name, email,
       broker, usage_count, last_used_at
FROM upstox_tokens WHERE user_id = %(user_id)s ORDER BY generation DESC LIMIT %(limit)s
"""
STATISTICS = """
SELECT count(*) AS total_tokens, count(*) FILTER (WHERE is_active AND expires_at > %(now)s) AS active_tokens,
       coalesce(sum(usage_count), 0) AS total_usage, coalesce(avg(usage_count), 0)::float AS avg_usage_per_token,
       max(created_at) AS last_generation, max(last_used_at) AS last_usage
FROM upstox_tokens WHERE user_id = %(user_id)s
"""
AUDIT = """
SELECT a.action, a.performed_at, a.actor, a.metadata, a.user_id, a.token_id, t.created_at AS token_created
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE a.user_id = %(user_id)s ORDER BY a.performed_at DESC, a.id DESC LIMIT %(limit)s
"""
# By id, for old entries have low ones: so no index on the time has to be kept up to date with each read.
FORGET = """
DELETE FROM upstox_token_audit
WHERE id IN (SELECT id FROM upstox_token_audit WHERE performed_at < %(before)s ORDER BY id LIMIT %(limit)s) RETURNING id
"""
GENERATION = "SELECT coalesce(max(generation), 0) AS latest FROM upstox_tokens WHERE user_id = %(user_id)s"
USER_OF_ACCOUNT = "SELECT user_id FROM upstox_tokens WHERE account = %(account)s ORDER BY id DESC LIMIT 1"
# Two ranges and not <>, which no index serves.
OTHER_KEYS = f"""
SELECT {HANDED_OUT} FROM upstox_tokens WHERE is_active AND key_id < %(key_id)s UNION ALL
SELECT {HANDED_OUT} FROM upstox_tokens WHERE is_active AND key_id > %(key_id)s LIMIT %(limit)s
"""
REPLACE = """
UPDATE upstox_tokens AS t SET access_token = new.ciphertext, key_id = new.key_id
FROM unnest(%(ids)s, %(old)s, %(new)s, %(key_ids)s) AS new (id, old, ciphertext, key_id)
WHERE t.id = new.id AND t.access_token = new.old RETURNING t.id
"""
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
_COPIED = """user_id, key_id, generation, created_at, expires_at, user_name, email, broker, user_type, products,
             exchanges, account, metadata, usage_count, last_used_at"""
TOKENS_OF = f"""
SELECT {_COPIED}, coalesce(access_token, '') AS ciphertext FROM upstox_tokens WHERE user_id = %(user_id)s
ORDER BY generation
"""
# Not IS NOT DISTINCT FROM, which no index serves; of this the planner drops the half that does not apply.
ENTRIES_OF = """
SELECT a.action, a.actor, a.performed_at, a.metadata, t.generation, a.id AS position
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE (a.user_id = %(user_id)s OR (%(user_id)s IS NULL AND a.user_id IS NULL))
      AND (a.performed_at, a.id) > (%(performed_at)s, %(position)s)
ORDER BY a.performed_at, a.id LIMIT %(limit)s
"""
# Two statements in one message, and so in one transaction.
PUT_IN = f"""
INSERT INTO upstox_tokens AS t ({_COPIED}, access_token, is_active)
SELECT {_COPIED}, access_token, is_active FROM jsonb_populate_recordset(NULL::upstox_tokens, %(tokens)s)
ORDER BY generation
ON CONFLICT (user_id, generation) DO UPDATE SET
    access_token = CASE WHEN excluded.is_active THEN t.access_token END, is_active = t.is_active AND excluded.is_active,
    usage_count = greatest(t.usage_count, excluded.usage_count),
    last_used_at = greatest(t.last_used_at, excluded.last_used_at);
INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)
SELECT t.id, %(user_id)s, e.entry ->> 'action', e.entry ->> 'actor', (e.entry ->> 'performed_at')::timestamptz,
       e.entry -> 'metadata'
FROM jsonb_array_elements(%(entries)s) WITH ORDINALITY AS e (entry, nth)
LEFT JOIN upstox_tokens AS t ON t.user_id = %(user_id)s AND t.generation = (e.entry ->> 'generation')::integer
ORDER BY e.nth ON CONFLICT DO NOTHING
"""


class PostgreSQLUpstoxStorage(TokenStorage):
    """Tokens in PostgreSQL 13 or newer.

    Args:
        connection_string: a URL or a libpq string, as `psycopg2.connect` takes it; several hosts, TLS and a password
            file work as libpq documents them.
        pool_size: how many connections there are at the most. A login uses one more, its own, to hold its lock; of
            these as many are kept as well.
        timeout: seconds for each answer of the server, and for a free connection of the pool.
        options: see `Options`.

    Raises:
        ConfigurationError: the connection string, the role or the schema is not usable.
        StoreUnavailable: the server cannot be reached.
    """

    _kind = "access token in PostgreSQL"
    # One step for each schema version. Never change a step that was released: append one.
    _steps: tuple[str, ...] = (SCHEMA,)

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
        """Make the tables, or bring those of an older version forward. Safe to repeat and to run at once.

        Args:
            runtime_role: a role to be granted what storing and reading needs and nothing more: it can add to the
                audit trail, and neither change it nor drop anything. Run this as the owner of the tables.
        """
        answer = self._connections.answer
        with self._connections.session() as conn:
            if self._version(conn) == len(self._steps) and runtime_role is None:
                return
        with self._lock(SCHEMA_LOCK), self._connections.session() as conn:
            answer(conn, "BEGIN")
            for version in range(self._version(conn), len(self._steps)):
                answer(conn, f"{VERSION_TABLE}; {self._steps[version]}; DELETE FROM upstox_schema")
                answer(conn, "INSERT INTO upstox_schema VALUES (%(version)s)", version=version + 1)
            if runtime_role is not None:
                quoted = '"' + runtime_role.replace('"', '""') + '"'
                answer(conn, GRANTS.format(role=quoted))
            answer(conn, "COMMIT")
        runtime = f", and {runtime_role} may store and read tokens" if runtime_role else ""
        logger.info("%s has schema version %s now%s", self._connections.where, len(self._steps), runtime)

    def get_connection(self) -> AbstractContextManager[connection]:
        """An ordinary psycopg2 connection of your own, outside the pool: commit what you write."""
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
                "Name another database or schema."
            )
        rows = self._connections.answer(conn, "SELECT version FROM upstox_schema") if exists["versioned"] else []
        version = int(rows[0]["version"]) if rows else 0
        if version > len(self._steps):
            raise ConfigurationError(
                f"{where} has schema version {version}; this package knows {len(self._steps)}. Upgrade it."
            )
        return version

    def _find(self, user_id: str, alive_after: datetime, now: datetime) -> StoredToken | None:
        return self._use(user_id, alive_after, now, "{}")

    def _use(self, user_id: str, alive_after: datetime, now: datetime, metadata: str) -> StoredToken | None:
        values = {"user_id": user_id, "alive_after": alive_after, "now": now, "actor": self._actor}
        # A read that had to wait for a writer finds the old row inactive, and the new one is later than its snapshot.
        # So "none" is believed only when it is said again; nobody replaces a token three times meanwhile.
        for _ in range(3):
            if rows := self._run(USE, **values, metadata=metadata):
                return _token(rows[0])
        return None

    def _insert(self, token: StoredToken) -> int:
        columns = {name: json.dumps(v) if type(v) in (list, dict) else v for name, v in asdict(token).items()}
        reason = json.dumps({"reason": "new_token_generated"})
        try:
            rows = self._run(
                STORE, **columns, action="deactivated", actor=self._actor, now=token.created_at, reason=reason
            )
        except StoreUnavailable as error:
            if getattr(error.__cause__, "pgcode", None) == errorcodes.UNIQUE_VIOLATION:
                raise LoginSuperseded(f"A newer login of {token.user_id} is stored. Read its token.") from error
            raise
        return int(rows[0]["token_id"])

    def _revoke(self, user_id: str, now: datetime) -> bool:
        return bool(self._run(ERASE, user_id=user_id, action="revoked", actor=self._actor, now=now, reason="{}"))

    def _expire(self, now: datetime, limit: int) -> int:
        return len(self._run(EXPIRE, now=now, limit=limit, actor=self._actor))

    def _forget_entries(self, before: datetime, limit: int) -> int:
        return len(self._run(FORGET, before=before, limit=limit))

    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        metadata_text = json.dumps(metadata or {})
        self._run(RECORD, user_id=user_id, action=action, actor=self._actor, now=now, metadata=metadata_text)

    def _generation(self, user_id: str) -> int:
        return int(self._run(GENERATION, user_id=user_id)[0]["latest"])

    def _user_of_account(self, account: str) -> str | None:
        return next((row["user_id"] for row in self._run(USER_OF_ACCOUNT, account=account)), None)

    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        return [_shown(row) for row in self._run(HISTORY, user_id=user_id, limit=limit, now=now)]

    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        return _shown(self._run(STATISTICS, user_id=user_id, now=now)[0])

    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        return [_shown(row) for row in self._run(AUDIT, user_id=user_id, limit=limit)]

    def _under_other_keys(self, key_id: str, limit: int) -> list[StoredToken]:
        return [_token(row) for row in self._run(OTHER_KEYS, key_id=key_id, limit=limit)]

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        replaced = self._run(
            REPLACE,
            ids=[old.token_id for old, _ in rows],
            old=[old.ciphertext for old, _ in rows],
            new=[new.ciphertext for _, new in rows],
            key_ids=[new.key_id for _, new in rows],
        )
        return len(replaced)

    def _count_keys(self) -> dict[str, int]:
        return {row["key_id"]: row["count"] for row in self._run(COUNT_KEYS)}

    def _users(self) -> list[str | None]:
        return [row["user_id"] for row in self._run(USERS)]

    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        return [_token(row) for row in self._run(TOKENS_OF, user_id=user_id)]

    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = {
            "performed_at": after.performed_at if after else "-infinity",
            "position": after.position if after else 0,
        }
        return [AuditEntry(**_in_utc(row)) for row in self._run(ENTRIES_OF, user_id=user_id, **place, limit=limit)]

    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        rows = [
            {**asdict(token), "access_token": token.ciphertext or None, "is_active": bool(token.ciphertext)}
            for token in tokens
        ]
        dumped = {"tokens": json.dumps(rows, default=datetime.isoformat)}
        dumped["entries"] = json.dumps([entry._asdict() for entry in entries], default=datetime.isoformat)
        self._run(PUT_IN, user_id=user_id, **dumped)

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
    """The row as callers see it: times as ISO text."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in _in_utc(row).items()}
