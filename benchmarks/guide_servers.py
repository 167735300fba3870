"""The PostgreSQL, MongoDB and Redis parts of the SDK's guide. See guide.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import redis
from psycopg2.extras import RealDictCursor
from pymongo import ASCENDING, DESCENDING, MongoClient

from benchmarks.guide import DAY, Login

HOUR = timedelta(hours=1)


class GuidePostgreSQL:
    """A connection for each call, and an audit entry for each token that is stored, ended or read."""

    def __init__(self, url: str, login: Login) -> None:
        self.url, self.login = url, login
        with self.connection() as conn, conn.cursor() as cursor:
            cursor.execute("""
                DO $$ BEGIN CREATE TYPE user_type_enum AS ENUM ('individual', 'corporate');
                EXCEPTION WHEN duplicate_object THEN null; END $$""")
            cursor.execute("""
                CREATE TABLE IF NOT EXISTS upstox_tokens (
                    id SERIAL PRIMARY KEY, user_id VARCHAR(50) NOT NULL, access_token TEXT NOT NULL,
                    user_name VARCHAR(100), email VARCHAR(100), broker VARCHAR(20), user_type user_type_enum,
                    products JSONB, exchanges JSONB, is_active BOOLEAN DEFAULT TRUE,
                    created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP, expires_at TIMESTAMPTZ NOT NULL,
                    metadata JSONB DEFAULT '{}'::jsonb, last_used_at TIMESTAMPTZ, usage_count INTEGER DEFAULT 0
                )""")
            cursor.execute("""
                CREATE INDEX IF NOT EXISTS idx_upstox_tokens_user_active ON upstox_tokens (user_id, is_active)
                WHERE is_active = TRUE""")
            cursor.execute("CREATE INDEX IF NOT EXISTS idx_upstox_tokens_expires ON upstox_tokens (expires_at)")
            cursor.execute("CREATE INDEX IF NOT EXISTS idx_upstox_tokens_created ON upstox_tokens (created_at)")
            cursor.execute("""
                CREATE TABLE IF NOT EXISTS upstox_token_audit (
                    id SERIAL PRIMARY KEY, token_id INTEGER REFERENCES upstox_tokens (id), action VARCHAR(20) NOT NULL,
                    performed_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP, metadata JSONB DEFAULT '{}'::jsonb
                )""")
            conn.commit()

    @contextmanager
    def connection(self) -> Iterator[Any]:
        conn = psycopg2.connect(self.url)
        try:
            yield conn
        finally:
            conn.close()

    def store_token(self, user_id: str | None = None) -> dict[str, Any]:
        data = self.login(user_id)
        expires_at = datetime.now() + DAY
        audit = "INSERT INTO upstox_token_audit (token_id, action, metadata) VALUES (%s, %s, %s)"
        profile = {"is_active_user": data.is_active, "generation_method": "upstox_totp_sdk", "sdk_version": "1.0.3"}
        with self.connection() as conn, conn.cursor(cursor_factory=RealDictCursor) as cursor:
            cursor.execute(
                # Repaired: the whole JSON text is a parameter, because a quoted value inside a quoted literal is not
                # valid SQL.
                "UPDATE upstox_tokens SET is_active = FALSE, metadata = metadata || %s::jsonb "
                "WHERE user_id = %s AND is_active = TRUE RETURNING id",
                (json.dumps({"deactivated_at": datetime.now().isoformat()}), data.user_id),
            )
            ended = [row["id"] for row in cursor.fetchall()]
            cursor.execute(
                "INSERT INTO upstox_tokens (user_id, access_token, user_name, email, broker, user_type, products, "
                "exchanges, expires_at, metadata) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING id",
                (
                    data.user_id,
                    data.access_token,
                    data.user_name,
                    data.email,
                    data.broker,
                    data.user_type,
                    json.dumps(data.products),
                    json.dumps(data.exchanges),
                    expires_at,
                    json.dumps(profile),
                ),
            )
            token_id = cursor.fetchone()["id"]
            for each in ended:
                cursor.execute(audit, (each, "deactivated", json.dumps({"reason": "new_token_generated"})))
            when = json.dumps({"generation_time": datetime.now().isoformat()})
            cursor.execute(audit, (token_id, "created", when))
            conn.commit()
        return {"token": data.access_token, "user_id": data.user_id, "token_id": token_id}

    def get_valid_token(self, user_id: str) -> dict[str, Any] | None:
        with self.connection() as conn, conn.cursor(cursor_factory=RealDictCursor) as cursor:
            cursor.execute(
                "SELECT id, access_token, expires_at, user_name, usage_count FROM upstox_tokens WHERE user_id = %s "
                "AND is_active = TRUE AND expires_at > NOW() + INTERVAL '1 hour' ORDER BY created_at DESC LIMIT 1",
                (user_id,),
            )
            row = cursor.fetchone()
            if row is None:
                return None
            uses = row["usage_count"] + 1
            cursor.execute(
                "UPDATE upstox_tokens SET usage_count = usage_count + 1, last_used_at = NOW() WHERE id = %s",
                (row["id"],),
            )
            cursor.execute(
                "INSERT INTO upstox_token_audit (token_id, action, metadata) VALUES (%s, %s, %s)",
                (row["id"], "used", json.dumps({"usage_count": uses})),
            )
            conn.commit()
        return {"token": row["access_token"], "expires_at": row["expires_at"].isoformat(), "usage_count": uses}


class GuideMongo:
    """One client for all calls. A read is three separate operations, and so is a store."""

    def __init__(self, url: str, database: str, login: Login) -> None:
        self.client: MongoClient[dict[str, Any]] = MongoClient(url)
        self.tokens, self.audit = self.client[database].tokens, self.client[database].token_audit
        self.login = login
        self.tokens.create_index([("user_id", ASCENDING), ("is_active", ASCENDING), ("expires_at", DESCENDING)])
        # Repaired: the guide has a plain index on expires_at here, and MongoDB refuses a second one on the same key
        # below.
        self.tokens.create_index([("created_at", DESCENDING)])
        self.audit.create_index([("user_id", ASCENDING), ("performed_at", DESCENDING)])
        self.tokens.create_index([("expires_at", ASCENDING)], expireAfterSeconds=0)

    def store_token(self, user_id: str | None = None) -> dict[str, Any]:
        data, now = self.login(user_id), _utc()
        ended = self.tokens.update_many(
            {"user_id": data.user_id, "is_active": True},
            {"$set": {"is_active": False, "deactivated_at": now, "deactivation_reason": "new_token_generated"}},
        )
        how = {"generation_method": "upstox_totp_sdk"}
        stored = self.tokens.insert_one(
            {
                **{name: getattr(data, name) for name in ("user_id", "access_token", "user_name", "email", "broker")},
                **{name: getattr(data, name) for name in ("user_type", "products", "exchanges")},
                "is_active": True,
                "created_at": now,
                "expires_at": now + DAY,
                "usage_count": 0,
                "last_used_at": None,
                "metadata": {
                    "is_active_user": data.is_active,
                    **how,
                    "sdk_version": "1.0.3",
                    "generation_timestamp": now.isoformat(),
                },
            }
        )
        metadata = {"old_tokens_deactivated": ended.modified_count, **how}
        self._audit(stored.inserted_id, data.user_id, "token_created", now, metadata)
        return {"token": data.access_token, "user_id": data.user_id, "token_id": str(stored.inserted_id)}

    def get_valid_token(self, user_id: str) -> dict[str, Any] | None:
        now = _utc()
        found = self.tokens.find_one(
            {"user_id": user_id, "is_active": True, "expires_at": {"$gt": now + HOUR}},
            sort=[("created_at", DESCENDING)],
        )
        if found is None:
            return None
        self.tokens.update_one({"_id": found["_id"]}, {"$inc": {"usage_count": 1}, "$set": {"last_used_at": now}})
        uses = found["usage_count"] + 1
        self._audit(found["_id"], user_id, "token_used", now, {"usage_count": uses})
        return {"token": found["access_token"], "expires_at": found["expires_at"].isoformat(), "usage_count": uses}

    def _audit(self, token_id: object, user_id: str, action: str, now: datetime, metadata: dict[str, Any]) -> None:
        entry = {"token_id": token_id, "user_id": user_id, "action": action, "performed_at": now, "metadata": metadata}
        self.audit.insert_one(entry)


class GuideHybrid:
    """Redis comes first, and each call that needs PostgreSQL opens a connection to it."""

    prefix = "upstox:token:"

    def __init__(self, redis_config: dict[str, Any], postgres: str, login: Login) -> None:
        self.redis = redis.Redis(**redis_config, decode_responses=True)
        self.postgres, self.login = postgres, login
        with self.connection() as conn, conn.cursor() as cursor:
            cursor.execute("""
                CREATE TABLE IF NOT EXISTS upstox_token_backup (
                    id SERIAL PRIMARY KEY, user_id VARCHAR(50) NOT NULL, access_token TEXT NOT NULL, user_data JSONB,
                    created_at TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP, expires_at TIMESTAMPTZ NOT NULL,
                    is_active BOOLEAN DEFAULT TRUE
                )""")
            cursor.execute("""
                CREATE INDEX IF NOT EXISTS idx_backup_user_active
                ON upstox_token_backup (user_id, is_active, expires_at)""")
            conn.commit()

    @contextmanager
    def connection(self) -> Iterator[Any]:
        # Repaired: the connection is closed. psycopg2's own `with` only ends the transaction.
        with closing(psycopg2.connect(self.postgres)) as conn:
            yield conn

    def store_token(self, user_id: str | None = None) -> dict[str, Any]:
        data, now = self.login(user_id), datetime.now()
        token = {name: getattr(data, name) for name in ("user_id", "user_name", "email")}
        token |= {"token": data.access_token, "created_at": now.isoformat(), "expires_at": (now + DAY).isoformat()}
        token["usage_count"] = 0
        names = ("user_name", "email", "broker", "user_type", "products", "exchanges", "is_active")
        # Repaired, here and below: redis-py warns about setex(). This is its new name.
        self.redis.set(f"{self.prefix}{data.user_id}", json.dumps(token), ex=23 * 3600)
        with self.connection() as conn, conn.cursor() as cursor:
            cursor.execute(
                "UPDATE upstox_token_backup SET is_active = FALSE WHERE user_id = %s AND is_active = TRUE",
                (data.user_id,),
            )
            cursor.execute(
                "INSERT INTO upstox_token_backup (user_id, access_token, user_data, expires_at) "
                "VALUES (%s, %s, %s, %s)",
                (data.user_id, data.access_token, json.dumps({name: getattr(data, name) for name in names}), now + DAY),
            )
            conn.commit()
        return token

    def get_valid_token(self, user_id: str) -> dict[str, Any] | None:
        key = f"{self.prefix}{user_id}"
        if cached := self.redis.get(key):
            token: dict[str, Any] = json.loads(str(cached))
            expires_at = datetime.fromisoformat(token["expires_at"])
            # Repaired: a time from PostgreSQL has a zone, and cannot be compared with a time without one.
            now = datetime.now(expires_at.tzinfo)
            if expires_at > now + HOUR:
                token["usage_count"] += 1
                self.redis.set(key, json.dumps(token), ex=int((expires_at - now).total_seconds()))
                return token
        with self.connection() as conn, conn.cursor() as cursor:
            cursor.execute(
                "SELECT access_token, user_data, expires_at FROM upstox_token_backup WHERE user_id = %s "
                "AND is_active = TRUE AND expires_at > NOW() + INTERVAL '1 hour' ORDER BY created_at DESC LIMIT 1",
                (user_id,),
            )
            row = cursor.fetchone()
        if row is None:
            return None
        found, user_data, expires_at = row  # Repaired: psycopg2 has decoded the JSONB already.
        token = {name: user_data.get(name) for name in ("user_name", "email")}
        token |= {"token": found, "user_id": user_id, "expires_at": expires_at.isoformat(), "usage_count": 1}
        # Repaired: both times have a zone.
        if (seconds := int((expires_at - datetime.now(UTC)).total_seconds())) > 0:
            self.redis.set(key, json.dumps(token), ex=seconds)
        return token

    def forget(self, user_id: str) -> None:
        """Delete the copy in Redis. The guide has no such method: the benchmark of a cold read needs it."""
        self.redis.delete(f"{self.prefix}{user_id}")


def _utc() -> datetime:
    # Repaired: utcnow() is deprecated. This is the same time, also without a zone.
    return datetime.now(UTC).replace(tzinfo=None)
