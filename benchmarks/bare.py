"""The bare drivers do the same durable work in as few messages as possible, on tables that our stores created.

A read from SQLite is one indexed SELECT. If our store counts and audits a read, so does the bare driver. There is no
encryption, no check, no lock and no login entry: this is the minimum that a program could do. (promises.py keeps these
promises.) Connections are already open. As in our stores, a call takes the connection that was used last.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg2
import redis
from bson import ObjectId
from pymongo import MongoClient
from pymongo.write_concern import WriteConcern
from upstox_totp.models import AccessTokenData

from benchmarks.guide import DAY, Login
from upstox_db_examples.hybrid.redis import LUA
from upstox_db_examples.postgresql import USE
from upstox_db_examples.sqlite import RECORD

ACTOR = "bare"
INSERT = """
INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, user_name, email, broker, user_type, products,
                           exchanges, created_at, expires_at, metadata)
SELECT ?, ?, '', coalesce(max(generation), 0) + 1, ?, ?, ?, ?, ?, ?, ?, ?, '{}' FROM upstox_tokens WHERE user_id = ?
RETURNING id
"""
ERASE = "UPDATE upstox_tokens SET is_active = ?, access_token = NULL WHERE user_id = ? AND is_active RETURNING id"
AUDIT = RECORD
# The same for PostgreSQL, with the audit entries in the statements.
_ENTRY = "INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)"
ERASE_AND_AUDIT = f"""
WITH erased AS (
    UPDATE upstox_tokens SET is_active = false, access_token = NULL WHERE user_id = %(user_id)s AND is_active
    RETURNING id, user_id
)
{_ENTRY} SELECT id, user_id, 'deactivated', %(actor)s, %(now)s, '{{}}' FROM erased
"""
INSERT_AND_AUDIT = f"""
WITH stored AS (
    INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, user_name, email, broker, user_type, products,
                               exchanges, created_at, expires_at, metadata)
    SELECT %(user_id)s, %(ciphertext)s, '', coalesce(max(generation), 0) + 1, %(user_name)s, %(email)s, %(broker)s,
           %(user_type)s, %(products)s, %(exchanges)s, %(now)s, %(expires_at)s, '{{}}'
    FROM upstox_tokens WHERE user_id = %(user_id)s RETURNING id, user_id
)
{_ENTRY} SELECT id, user_id, 'created', %(actor)s, %(now)s, '{{}}' FROM stored
"""
LOGIN_AUDIT = f"{_ENTRY} VALUES (NULL, %(user_id)s, 'login', %(actor)s, %(now)s, %(metadata)s)"


class Connections[T]:
    """Open connections, with the last used on top."""

    def __init__(self, connect: Callable[[], T]) -> None:
        self._connect = connect
        self._idle: deque[T] = deque()

    def take(self) -> T:
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def give_back(self, conn: T) -> None:
        self._idle.append(conn)

    def close(self) -> None:
        for conn in self._idle:
            conn.close()  # type: ignore[attr-defined]


class BareSQLite:
    def __init__(self, path: str, login: Login) -> None:
        def connect() -> sqlite3.Connection:
            conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            conn.executescript("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
            return conn

        self._connections, self._login = Connections(connect), login

    def read(self, user_id: str) -> str | None:
        conn = self._connections.take()
        row = conn.execute(
            "SELECT access_token, expires_at FROM upstox_tokens WHERE user_id = ? AND is_active AND expires_at > ?",
            (user_id, int(time.time())),
        ).fetchone()
        self._connections.give_back(conn)
        return row[0] if row else None

    def store(self, user_id: str) -> str:
        data = self._login(user_id)
        conn = self._connections.take()
        self._write(conn, data, data.access_token)
        self._connections.give_back(conn)
        return data.access_token

    def _write(self, conn: sqlite3.Connection, data: AccessTokenData, text: str) -> None:
        user_id, now = data.user_id, int(time.time())
        conn.execute("BEGIN IMMEDIATE")
        for (old,) in conn.execute(ERASE, (0, user_id)).fetchall():
            conn.execute(AUDIT, (old, user_id, "deactivated", ACTOR, now, "{}"))
        (token_id,) = conn.execute(INSERT, (*columns(data, text), now, now + 86_400, user_id)).fetchone()
        conn.execute(AUDIT, (token_id, user_id, "created", ACTOR, now, "{}"))
        conn.execute("COMMIT")

    def close(self) -> None:
        self._connections.close()


class BarePostgreSQL:
    """Each statement is a message of its own, as with most programs. `OneMessage` shows what that costs."""

    def __init__(self, url: str, login: Login) -> None:
        self._connections: Connections[Any] = Connections(lambda: psycopg2.connect(url))
        self._login = login

    def read(self, user_id: str) -> str | None:
        conn = self._connections.take()
        conn.autocommit = True
        now = datetime.now(UTC)
        with conn.cursor() as cursor:
            cursor.execute(USE, {"user_id": user_id, "alive_after": now, "now": now, "actor": ACTOR, "metadata": "{}"})
            row = cursor.fetchone()
        self._connections.give_back(conn)
        return row[-1] if row else None  # The token is the last column.

    def store(self, user_id: str) -> str:
        data, now = self._login(user_id), datetime.now(UTC)
        conn = self._connections.take()
        conn.autocommit = False
        with conn.cursor() as cursor:
            cursor.execute(_percent(ERASE), (False, user_id))
            for (old,) in cursor.fetchall():
                cursor.execute(_percent(AUDIT), (old, user_id, "deactivated", ACTOR, now, "{}"))
            cursor.execute(_percent(INSERT), (*columns(data, data.access_token), now, now + DAY, user_id))
            (token_id,) = cursor.fetchone()
            cursor.execute(_percent(AUDIT), (token_id, user_id, "created", ACTOR, now, "{}"))
        conn.commit()
        self._connections.give_back(conn)
        return data.access_token

    def close(self) -> None:
        self._connections.close()


class OneMessage(BarePostgreSQL):
    """The same transaction in one message: the minimum for PostgreSQL."""

    def store(self, user_id: str) -> str:
        data, now = self._login(user_id), datetime.now(UTC)
        lists = {"products": json.dumps(data.products), "exchanges": json.dumps(data.exchanges)}
        values = data.model_dump() | lists | {"now": now, "expires_at": now + DAY, "actor": ACTOR}
        conn = self._connections.take()
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(f"{ERASE_AND_AUDIT};{INSERT_AND_AUDIT}", values | {"ciphertext": data.access_token})
        self._connections.give_back(conn)
        return data.access_token


class BareMongo:
    """Three writes, each in the journal of a majority, as in our store. Our store does not use a transaction either."""

    def __init__(self, url: str, database: str, login: Login) -> None:
        self._client: MongoClient[dict[str, Any]] = MongoClient(url, tz_aware=True)
        self._durable = WriteConcern(w="majority", j=True)
        self._db = self._client.get_database(database, write_concern=self._durable)
        self._tokens, self._active, self._login = self._db.tokens, self._db.active_tokens, login

    def read(self, user_id: str) -> str | None:
        now = datetime.now(UTC)
        found = self._active.find_one({"_id": user_id, "expires_at": {"$gt": now}})
        if found:
            used = {"$inc": {"usage_count": 1}, "$set": {"last_used_at": now}, "$push": {"audit": _entry("used", now)}}
            record = self._tokens.find_one_and_update({"_id": found["token_id"]}, used, {"usage_count": 1})
            if record and record["usage_count"] % 100 == 99:  # our store moves the entries away at this point
                self._tokens.update_one({"_id": found["token_id"]}, {"$set": {"audit": []}})
        return found["ciphertext"].removeprefix("v1.bare.") if found else None

    def store(self, user_id: str) -> str:
        data = self._login(user_id)
        self._write(data, f"v1.bare.{data.access_token}", self._durable)
        return data.access_token

    def _write(self, data: AccessTokenData, text: str, others: WriteConcern) -> None:
        """Write the token. `others` is for the writes before and after the one that makes it active."""
        user_id, now, token_id = data.user_id, datetime.now(UTC), ObjectId()
        records = self._tokens.with_options(write_concern=others)
        newest = self._tokens.find_one({"user_id": user_id}, {"generation": 1}, sort=[("generation", -1)])
        generation = newest["generation"] + 1 if newest else 1
        times = {"generation": generation, "created_at": now, "expires_at": now + DAY}
        names = ("user_id", "user_name", "email", "broker", "user_type", "products", "exchanges")
        record = {"_id": token_id, **{name: getattr(data, name) for name in names}, **times, "is_active": True}
        record |= {"usage_count": 0, "last_used_at": None, "audit": [_entry("created", now)]}
        records.insert_one(record)
        # The validator of the collection accepts only values that look like a ciphertext.
        active = {"token_id": token_id, "ciphertext": text, "key_id": "bare", **times}
        self._active.replace_one({"_id": user_id}, active, upsert=True)
        records.update_many(
            {"user_id": user_id, "is_active": True, "generation": {"$lt": generation}},
            {"$set": {"is_active": False}, "$push": {"audit": _entry("deactivated", now)}},
        )

    def close(self) -> None:
        self._client.close()


class BareHybrid:
    """PostgreSQL's transaction, then a copy in Redis. A read is only our Lua script while the copy exists."""

    def __init__(self, redis_url: str, postgresql: BarePostgreSQL, prefix: str) -> None:
        self._postgresql = postgresql
        self._redis: Any = redis.Redis.from_url(redis_url)
        self._use = self._redis.register_script((LUA / "use.lua").read_text())
        self._prefix = f"{{{prefix}}}:"

    def read(self, user_id: str) -> str | None:
        if found := self._copied(user_id):
            return found
        token = self._postgresql.read(user_id)
        if token:
            self._copy(user_id, token)
        return token

    def _copied(self, user_id: str) -> str | None:
        now = int(time.time())
        keys = [self._prefix + user_id, f"{self._prefix}{user_id}:count", f"{self._prefix}uses"]
        found = self._use(keys=keys, args=[user_id, now, ACTOR, now, "an id", 0])
        return str(found[2].decode()) if found[0] == b"used" else None

    def store(self, user_id: str) -> str:
        token = self._postgresql.store(user_id)
        self._copy(user_id, token)
        return token

    def forget(self, user_id: str) -> None:
        self._redis.delete(self._prefix + user_id)

    def _copy(self, user_id: str, token: str) -> None:
        day_later = int(time.time()) + 86_400
        self._redis.set(self._prefix + user_id, f"{day_later}000 1 {day_later} 1 {token}", ex=86_400)

    def close(self) -> None:
        self._redis.close()
        self._postgresql.close()


def columns(data: AccessTokenData, text: str) -> tuple[object, ...]:
    lists = (json.dumps(data.products), json.dumps(data.exchanges))
    return (data.user_id, text, data.user_name, data.email, data.broker, data.user_type, *lists)


def _percent(sql: str) -> str:
    """Return the statement in psycopg2's style."""
    return sql.replace("?", "%s")


def _entry(action: str, now: datetime) -> dict[str, Any]:
    return {"_id": ObjectId(), "action": action, "actor": ACTOR, "performed_at": now}
