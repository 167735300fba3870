"""Create any number of old, inactive tokens of many users. The database itself multiplies one real row.

Each user has ten of them. All rows look alike, because other users' data does not change how fast a side finds a token.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
import redis
from pymongo import MongoClient

EACH = 10  # tokens per user
STEP = 20_000  # Redis does nothing else while it runs a script

# The numbers all have the same length, so the rows arrive in index order, which fills the index much faster. These are
# the columns of a table and their values in the old rows. All other columns are copied from the existing row.
OURS = {
    "user_id": "'OLD' || (1000000 + n.i / 10)",
    "generation": "n.i % 10 + 1",
    "is_active": "false",
    "access_token": "NULL",
}
GUIDE = {"user_id": "'OLD' || (1000000 + n.i / 10)", "is_active": "false"}
DISKCACHE = {"key": "'OLD' || (1000000 + n.i)"}
KEY_VALUE = {"key": "'OLD' || (1000000 + n.i)"}


def multiply_in_sqlite(path: str, table: str, changes: dict[str, str], count: int) -> None:
    with closing(sqlite3.connect(path)) as conn:
        (journal,) = conn.execute("PRAGMA journal_mode").fetchone()
        conn.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -400000;")
        columns = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
        numbers = f"WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {count}) "
        # diskcache counts its rows by triggers, row by row. It needs the count only for eviction, which is off.
        triggers = conn.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            conn.execute(f"DROP TRIGGER {name}")
        conn.execute(_multiplied(table, [c for c in columns if c not in ("id", "rowid")], changes, numbers, "n"))
        for _, sql in triggers:
            conn.execute(sql)
        conn.commit()
        conn.execute(f"PRAGMA journal_mode = {journal}")


def multiply_in_postgresql(url: str, table: str, changes: dict[str, str], count: int) -> None:
    with closing(psycopg2.connect(url)) as conn, conn.cursor() as cursor:
        conn.autocommit = True
        cursor.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_name = %s AND column_name <> 'id'", (table,)
        )
        columns = [name for (name,) in cursor.fetchall()]
        series = f"generate_series(0, {count - 1}) AS n (i)"
        cursor.execute("SET maintenance_work_mem = '256MB'")
        cursor.execute(_multiplied(table, columns, changes, "", series))
        cursor.execute(f"VACUUM (ANALYZE) {table}")
        cursor.execute("CHECKPOINT")


def _multiplied(table: str, columns: list[str], changes: dict[str, str], before: str, numbers: str) -> str:
    values = ", ".join(changes.get(name, f"one.{name}") for name in columns)
    one = f"(SELECT * FROM {table} LIMIT 1) AS one"
    return f"{before}INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {one}, {numbers}"


def multiply_in_mongodb(url: str, database: str, collection: str, changes: dict[str, Any], count: int) -> None:
    """Replace all documents of the collection by copies of one of them. The indexes stay."""
    thousands = max(1, count // 1000)
    number = {"$add": [{"$multiply": ["$a", count // thousands]}, "$b"]}
    with MongoClient[dict[str, Any]](url) as client:
        documents = client[database][collection]
        # An index that is created at the end takes a third of the time.
        indexes = [dict(index) for index in documents.list_indexes() if index["name"] != "_id_"]
        documents.drop_indexes()
        documents.aggregate(
            [
                {"$limit": 1},
                {"$set": {"a": {"$range": [0, thousands]}, "b": {"$range": [0, count // thousands]}}},
                {"$unwind": "$a"},
                {"$unwind": "$b"},
                {"$set": {"i": number}},
                {"$set": changes},
                {"$unset": ["_id", "a", "b", "i"]},
                {"$out": collection},
            ]
        )
        client[database].command("createIndexes", collection, indexes=indexes)


def old(of: int) -> dict[str, Any]:
    """Return an expression for a name with a number that is the same for `of` documents."""
    number = {"$toLong": {"$floor": {"$divide": ["$i", of]}}}
    return {"$concat": ["OLD", {"$toString": {"$add": [1_000_000, number]}}]}


OURS_IN_MONGODB = {"user_id": old(EACH), "generation": {"$add": [{"$mod": ["$i", EACH]}, 1]}, "is_active": False}
GUIDE_IN_MONGODB = {"user_id": old(EACH), "is_active": False}  # expires_at stays, or its TTL would remove them.
KEY_VALUE_IN_MONGODB = {"key": old(1)}


def multiply_in_redis(url: str, key: str, prefix: str, count: int) -> None:
    script = """
    local value = redis.call('GET', KEYS[1])
    for i = ARGV[2], ARGV[3] do redis.call('SET', ARGV[1] .. (1000000 + i), value) end"""
    with redis.Redis.from_url(url) as client:
        for first in range(0, count, STEP):
            client.eval(script, 1, key, prefix, first, min(first + STEP, count) - 1)


@contextmanager
def postgresql_database(url: str, name: str, template: str = "template1") -> Iterator[str]:
    """Create a database for this run, as a copy of another one if that is named, and drop it afterwards."""

    def run(sql: str) -> None:
        with closing(psycopg2.connect(url)) as conn, conn.cursor() as cursor:
            conn.autocommit = True
            cursor.execute(sql)

    run(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        base, _, options = url.partition("?")
        yield f"{base.rpartition('/')[0]}/{name}" + (f"?{options}" if options else "")
    finally:
        run(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def mongodb_database(url: str, name: str) -> Iterator[str]:
    try:
        yield name
    finally:
        with MongoClient[dict[str, Any]](url) as client:
            client.drop_database(name)


@contextmanager
def redis_prefix(url: str, prefix: str) -> Iterator[str]:
    """Yield the prefix, and delete all keys that contain it at the end."""
    try:
        yield prefix
    finally:
        with redis.Redis.from_url(url) as client:
            keys: list[Any] = []
            for key in client.scan_iter(f"*{prefix}*", count=10_000):
                keys.append(key)
                if len(keys) == 1000:
                    client.unlink(*keys)
                    keys.clear()
            if keys:
                client.unlink(*keys)
