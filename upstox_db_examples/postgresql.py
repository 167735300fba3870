"""Pattern 2: PostgreSQL with an audit trail. Many machines, one truth, and who used which token when."""

from __future__ import annotations

import hashlib
import json
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Unpack, cast

import psycopg2
import psycopg2.extras
from psycopg2 import errorcodes
from psycopg2.extensions import POLL_OK, POLL_READ, connection, parse_dsn
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from upstox_db_examples.errors import ConfigurationError, LoginSuperseded, StorageError, StoreUnavailable
from upstox_db_examples.storage import Options, TokenStorage
from upstox_db_examples.token import Secret, StoredToken

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
CREATE INDEX active_by_expiry ON upstox_tokens (expires_at) WHERE is_active;
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
CREATE INDEX audit_by_user ON upstox_token_audit (user_id, id);
"""
VERSION_TABLE = "CREATE TABLE IF NOT EXISTS upstox_schema (version integer NOT NULL)"
# What a program needs that stores and reads tokens. The audit trail can only grow, and nothing can be dropped.
GRANTS = """
GRANT SELECT ON upstox_schema TO {role};
GRANT SELECT, INSERT, UPDATE (access_token, key_id, is_active, usage_count, last_used_at) ON upstox_tokens TO {role};
GRANT SELECT, INSERT ON upstox_token_audit TO {role};
"""

_HANDED_OUT = (
    "id AS token_id, user_id, access_token AS ciphertext, key_id, generation, created_at, expires_at, user_name, "
    "email, usage_count"
)
_AUDIT = "INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)"
# Reading, counting and auditing are one statement: one round trip, and either all of it happens or nothing.
USE = f"""
WITH used AS (
    UPDATE upstox_tokens SET usage_count = usage_count + 1, last_used_at = %(now)s
    WHERE user_id = %(user_id)s AND is_active AND expires_at > %(alive_after)s RETURNING {_HANDED_OUT}
), audited AS (
    {_AUDIT} SELECT token_id, user_id, 'used', %(actor)s, %(now)s, jsonb_build_object('usage_count', usage_count)
    FROM used
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
    SELECT id FROM upstox_tokens WHERE is_active AND expires_at <= %(now)s
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
WHERE a.user_id = %(user_id)s ORDER BY a.id DESC LIMIT %(limit)s
"""
GENERATION = "SELECT coalesce(max(generation), 0) AS latest FROM upstox_tokens WHERE user_id = %(user_id)s"
USER_OF_ACCOUNT = "SELECT user_id FROM upstox_tokens WHERE account = %(account)s ORDER BY id DESC LIMIT 1"
# Two ranges and not <>, which no index serves.
OTHER_KEYS = f"""
SELECT {_HANDED_OUT} FROM upstox_tokens WHERE is_active AND key_id < %(key_id)s UNION ALL
SELECT {_HANDED_OUT} FROM upstox_tokens WHERE is_active AND key_id > %(key_id)s LIMIT %(limit)s
"""
REPLACE = """
UPDATE upstox_tokens AS t SET access_token = new.ciphertext, key_id = new.key_id
FROM unnest(%(ids)s, %(old)s, %(new)s, %(key_ids)s) AS new (id, old, ciphertext, key_id)
WHERE t.id = new.id AND t.access_token = new.old RETURNING t.id
"""
COUNT_KEYS = "SELECT key_id, count(*) FROM upstox_tokens WHERE is_active GROUP BY key_id"


class PostgreSQLUpstoxStorage(TokenStorage):
    """Tokens in PostgreSQL 13 or newer.

    Args:
        connection_string: a URL or a libpq string, as `psycopg2.connect` takes it; several hosts, TLS and a password
            file work as libpq documents them.
        pool_size: how many connections are kept open at the most. A login uses one more, its own, to hold its lock.
        timeout: seconds for each answer of the server, and for a free connection of the pool.
        options: see `Options`.

    Raises:
        ConfigurationError: the connection string, the role or the schema is not usable.
        StoreUnavailable: the server cannot be reached.
    """

    # One step for each schema version. Never change a step that was released: append one.
    _steps: tuple[str, ...] = (SCHEMA,)

    def __init__(
        self, connection_string: str, *, pool_size: int = 5, timeout: float = 5.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self._dsn = Secret(connection_string)
        del connection_string  # A traceback that prints local variables must not show its password.
        self._where = _described(self._dsn)
        self._timeout = timeout
        # SQLAlchemy's pool and not psycopg2's own, which raises at once when it is empty and hands out dead
        # connections. What comes back is always idle, for each message is a transaction of its own: no reset needed.
        self._pool = QueuePool(
            lambda: cast(Any, self._connect()),
            pool_size=pool_size,
            max_overflow=0,
            timeout=timeout,
            use_lifo=True,
            reset_on_return=None,
        )
        self._process = os.getpid()
        self._closed = False
        self._local_locks: dict[str, threading.Lock] = {}
        self._holding = threading.local()
        self.init_database()

    def init_database(self, runtime_role: str | None = None) -> None:
        """Make the tables, or bring those of an older version forward. Safe to repeat and to run at once.

        Args:
            runtime_role: a role to be granted what storing and reading needs and nothing more: it can add to the
                audit trail, and neither change it nor drop anything. Run this as the owner of the tables.
        """
        with self._session() as conn:
            if self._version(conn) == len(self._steps) and runtime_role is None:
                return
        with self._lock("schema"), self._session() as conn:
            self._answer(conn, "BEGIN")
            for version in range(self._version(conn), len(self._steps)):
                self._answer(conn, f"{VERSION_TABLE}; {self._steps[version]}; DELETE FROM upstox_schema")
                self._answer(conn, "INSERT INTO upstox_schema VALUES (%(version)s)", version=version + 1)
            if runtime_role is not None:
                quoted = '"' + runtime_role.replace('"', '""') + '"'
                self._answer(conn, GRANTS.format(role=quoted))
            self._answer(conn, "COMMIT")

    @contextmanager
    def get_connection(self) -> Iterator[connection]:
        """An ordinary psycopg2 connection of your own, outside the pool: commit what you write."""
        with self._in_our_words():
            conn = self._opened(
                lambda: psycopg2.connect(self._dsn.reveal(), connect_timeout=max(2, int(self._timeout)))
            )
            try:
                yield conn
            finally:
                conn.close()

    def close(self) -> None:
        self._closed = True
        self._pool.dispose()

    def __repr__(self) -> str:
        return f"PostgreSQLUpstoxStorage({self._where})"

    # Connections are in psycopg2's asynchronous mode: only there a server that has stalled can be given up after a
    # set time. A wait callback would do it, too, but for all other users of psycopg2 in the process as well.

    def _connect(self) -> connection:
        conn = self._opened(
            lambda: psycopg2.connect(self._dsn.reveal(), async_=True, cursor_factory=psycopg2.extras.RealDictCursor)
        )
        try:
            _wait(conn, self._timeout)
        except BaseException:
            conn.close()
            raise
        return conn

    def _opened(self, connect: Callable[[], connection]) -> connection:
        try:
            return connect()
        except psycopg2.Error as error:
            error.__traceback__ = None  # psycopg2's own frames hold the connection string.
            raise

    @contextmanager
    def _session(self) -> Iterator[connection]:
        """The connection that holds this thread's lock, so that who lost the lock cannot write; else a pooled one."""
        with self._in_our_words():
            held: connection | None = getattr(self._holding, "conn", None)
            if held is not None:
                yield held
                return
            borrowed = self._borrow()
            try:
                yield borrowed.dbapi_connection
            except BaseException:
                borrowed.invalidate()
                raise
            finally:
                borrowed.close()

    def _borrow(self) -> Any:
        if self._process != os.getpid():
            # A forked child may not use the parent's connections, nor close them.
            self._inherited, self._pool, self._process = self._pool, self._pool.recreate(), os.getpid()
        if self._closed:
            raise StoreUnavailable("This store is closed.")
        while True:
            borrowed = self._pool.connect()
            # An idle connection has nothing to say: one that has was closed by the server.
            if not _readable(borrowed.dbapi_connection):
                return borrowed
            borrowed.invalidate()
            borrowed.close()

    def _answer(self, conn: connection, sql: str, **values: object) -> list[dict[str, Any]]:
        with conn.cursor() as cursor:
            cursor.execute(sql, values or None)
            _wait(conn, self._timeout)
            return cast(list[dict[str, Any]], cursor.fetchall()) if cursor.description else []

    def _run(self, sql: str, **values: object) -> list[dict[str, Any]]:
        with self._session() as conn:
            return self._answer(conn, sql, **values)

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except (psycopg2.Error, PoolTimeout, TimeoutError) as error:
            raise _explained(error, self._where, self._timeout) from error

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        # Only one thread of a process waits at the server, or a crowd would use up its connections.
        local = self._local_locks.setdefault(name, threading.Lock())
        if not local.acquire(timeout=self._login_wait):
            raise self._waited(name)
        try:
            outer: connection | None = getattr(self._holding, "conn", None)
            with self._in_our_words():
                if self._closed:
                    raise StoreUnavailable("This store is closed.")
                conn = outer or self._connect()
            try:
                with self._in_our_words():
                    self._wait_for_lock(conn, name)
                self._holding.conn = conn
                yield
            finally:
                self._holding.conn = outer
                if outer is None:
                    conn.close()  # The end of the session frees the lock, as its death does.
        finally:
            local.release()

    def _wait_for_lock(self, conn: connection, name: str) -> None:
        # With keepalives the server notices in half a minute that the holder's machine is gone.
        sql = (
            "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; "
            f"SET lock_timeout = {max(1, int(self._login_wait * 1000))}; SELECT pg_advisory_lock(%(key)s)"
        )
        try:
            with conn.cursor() as cursor:
                cursor.execute(sql, {"key": _lock_key(name)})
                _wait(conn, self._login_wait + self._timeout)
        except psycopg2.errors.LockNotAvailable as error:
            raise self._waited(name) from error

    def _waited(self, name: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"Waited {self._login_wait:g} s for another login of {name}. Try again, or raise login_wait."
        )

    def _version(self, conn: connection) -> int:
        exists = self._answer(
            conn,
            "SELECT to_regclass('upstox_schema') IS NOT NULL AS versioned, "
            "to_regclass('upstox_tokens') IS NOT NULL AS tokens",
        )[0]
        if exists["tokens"] != exists["versioned"]:
            raise ConfigurationError(
                f"{self._where} has a table upstox_tokens that was made by another program and may hold plaintext "
                "tokens. Name another database or schema."
            )
        rows = self._answer(conn, "SELECT version FROM upstox_schema") if exists["versioned"] else []
        version = int(rows[0]["version"]) if rows else 0
        if version > len(self._steps):
            raise ConfigurationError(
                f"{self._where} has schema version {version}; this package knows {len(self._steps)}. Upgrade it."
            )
        return version

    def _find(self, user_id: str, alive_after: datetime, now: datetime) -> StoredToken | None:
        rows = self._run(USE, user_id=user_id, alive_after=alive_after, now=now, actor=self._actor)
        return _token(rows[0]) if rows else None

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

    def _health(self) -> dict[str, Any]:
        try:
            self._count_keys()
        except StorageError as error:
            return {"postgresql": f"error: {error}"}
        return {"postgresql": "healthy"}


def _token(row: dict[str, Any]) -> StoredToken:
    columns: dict[str, Any] = {k: v.astimezone(UTC) if isinstance(v, datetime) else v for k, v in row.items()}
    return StoredToken(**columns)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row as callers see it: times as ISO text."""
    return {
        name: value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value for name, value in row.items()
    }


def _wait(conn: connection, seconds: float) -> None:
    """Until the connection has its answer.

    Raises:
        TimeoutError: it has none after this many seconds; the connection is of no more use.
    """
    deadline = time.monotonic() + seconds
    while (state := conn.poll()) != POLL_OK:
        poller = select.poll()  # and not select(), which fails where a process has more than 1,024 files open
        poller.register(conn.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError


def _readable(conn: Any) -> bool:
    poller = select.poll()
    poller.register(conn.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def _lock_key(name: str) -> int:
    """A 64-bit number for pg_advisory_lock, of which a database has one set for all its programs."""
    return int.from_bytes(hashlib.sha256(f"upstox_db_examples/{name}".encode()).digest()[:8], signed=True)


def _described(dsn: Secret) -> str:
    """Where the database is, without any password."""
    try:
        parts = parse_dsn(dsn.reveal())
        return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
    except (psycopg2.Error, TypeError):
        pass  # Its text may hold the password. Raised below, our error has no cause that shows it.
    raise ConfigurationError(
        "The connection string is not one that PostgreSQL understands, such as postgresql://user:password@host/database."
    )


_EXPLANATIONS: dict[str, tuple[type[StorageError], str]] = {
    errorcodes.INSUFFICIENT_PRIVILEGE: (
        ConfigurationError,
        "does not allow this role to do that. The owner grants it by init_database(runtime_role=...).",
    ),
    errorcodes.READ_ONLY_SQL_TRANSACTION: (StoreUnavailable, "is read-only, as a standby is. Write to the primary."),
    errorcodes.DISK_FULL: (StoreUnavailable, "has a full disk. Make room and try again."),
    errorcodes.TOO_MANY_CONNECTIONS: (
        StoreUnavailable,
        "has no connection left. Use a smaller pool_size, or a pooler.",
    ),
    errorcodes.UNDEFINED_TABLE: (ConfigurationError, "has lost its tables. Run init_database()."),
    errorcodes.UNDEFINED_OBJECT: (ConfigurationError, "does not know that role."),
}


def _explained(error: Exception, where: str, timeout: float) -> StorageError:
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(f"No connection to {where} came free for {timeout:g} s. Use a larger pool_size.")
    if isinstance(error, TimeoutError):
        return StoreUnavailable(f"PostgreSQL at {where} gave no answer for {timeout:g} s. Try again.")
    state = getattr(error, "pgcode", None)
    if state in _EXPLANATIONS:
        kind, what = _EXPLANATIONS[state]
        return kind(f"PostgreSQL at {where} {what}")
    if state is None:
        return StoreUnavailable(
            f"PostgreSQL at {where} cannot be reached, or refused the role or its password. Check both and try again."
        )
    return StoreUnavailable(f"PostgreSQL at {where} could not do it (SQLSTATE {state}). Try again.")
