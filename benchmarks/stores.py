"""The five stores. Each has all sides open, and the old tokens in their tables."""

from __future__ import annotations

import random
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from upstox_totp.models import AccessTokenData

from benchmarks import keyvalue, rows
from benchmarks.bare import BareHybrid, BareMongo, BarePostgreSQL, BareSQLite, OneMessage
from benchmarks.guide import GuidePooled, GuideSQLite
from benchmarks.guide_servers import GuideHybrid, GuideMongo, GuidePostgreSQL
from benchmarks.keyvalue import key_value
from benchmarks.measure import Side, Threaded
from benchmarks.promises import HybridWithPromises, MongoWithPromises, PostgreSQLWithPromises, SQLiteWithPromises
from upstox_db_examples import (
    ExpiryPolicy,
    HybridUpstoxStorage,
    KeyRing,
    MongoUpstoxStorage,
    PooledUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
)
from upstox_db_examples.core.store import TokenStorage

PROMISES = "same promises"  # the driver alone, which keeps our promises: see promises.py
ONE_MESSAGE = "one message"
STORES = ("SQLite", "PostgreSQL", "MongoDB", "Hybrid", "Pooled")
CROWD = 32
SEED = "SEED"  # the user whose row becomes all the old rows


def login(user_id: str | None) -> AccessTokenData:
    """Return a made-up login answer at once. It is the same for all sides, and not part of the comparison."""
    return AccessTokenData(
        email="trader@example.com",
        exchanges=["NSE"],
        products=["D"],
        broker="UPSTOX",
        user_id=user_id or "AB1234",
        user_name="A Trader",
        order_types=["MARKET"],
        user_type="individual",
        poa=False,
        ddpi=False,
        is_active=True,
        access_token=f"eyJ0eXAi{random.getrandbits(1600):0400x}",  # as long as a real token
    )


def users(side: str) -> list[str]:
    """Return the active users. Each caller in a crowd has a different user, and sides do not share users in a table."""
    return [f"{side}{number:02}" for number in range(CROWD)]


def options() -> dict[str, Any]:
    # A token of this run lives for at least 23 hours, whenever it is made, so no token expires during a measurement.
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    policy = ExpiryPolicy(time_of_day=an_hour_ago.time().replace(microsecond=0), zone=UTC)
    return {"login": login, "keys": KeyRing(KeyRing.new_key()), "policy": policy}


def ours(storage: TokenStorage) -> Threaded:
    def store(user_id: str) -> str:
        token: str = storage.store_token(user_id)["token"]
        return token

    def read(user_id: str) -> str | None:
        found = storage.get_valid_token(user_id)
        return found["token"] if found else None

    def forget(user_id: str) -> None:
        redis = storage.backend.redis  # type: ignore[attr-defined]
        redis.client.delete(*redis.keys_of(user_id))

    side = Threaded("ours", users("OURS"), store, read, forget if isinstance(storage, HybridUpstoxStorage) else None)
    side.storage = storage
    return side


def guide(storage: GuideSQLite | GuidePostgreSQL | GuideMongo | GuideHybrid) -> Threaded:
    def store(user_id: str) -> str:
        token: str = storage.store_token(user_id)["token"]
        return token

    def read(user_id: str) -> str | None:
        found = storage.get_valid_token(user_id)
        return found["token"] if found else None

    return Threaded("guide", users("GUIDE"), store, read, getattr(storage, "forget", None))


def guide_pooled(storage: GuidePooled) -> Threaded:
    def store(user_id: str) -> str:
        (result,) = storage.store_token_batch([user_id])
        if not result["success"]:
            raise RuntimeError(result["error"])
        return "stored"  # It returns no token.

    return Threaded("guide", users("GUIDE"), store, None)


def bare(storage: BareSQLite | BarePostgreSQL | BareMongo | BareHybrid, name: str = "bare") -> Threaded:
    forget = getattr(storage, "forget", None)
    return Threaded(name, users(name[:4].upper()), storage.store, storage.read, forget)


class Servers:
    """URLs of the servers, and the folder for files. Each store has its own files and databases."""

    def __init__(self, folder: Path, postgresql: str, mongodb: str, redis: str) -> None:
        self.folder, self.postgresql, self.mongodb, self.redis = folder, postgresql, mongodb, redis


@contextmanager
def opened(name: str, servers: Servers, count: int) -> Iterator[list[Side]]:
    """Yield the sides of a store, each with `count` old tokens in its tables and an active token for each user."""
    run = f"bench_{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        sides = {
            "SQLite": _sqlite,
            "PostgreSQL": _postgresql,
            "MongoDB": _mongodb,
            "Hybrid": _hybrid,
            "Pooled": _pooled,
        }[name](stack, servers, count, run)
        for side in sides:
            for user in side.users:
                token = side.once("store", user)
                if side.can("read") and (not token or side.once("read", user) != token):
                    raise RuntimeError(f"{name}, {side.name}: what was stored is not what is read.")
        yield sides


def _sqlite(stack: ExitStack, servers: Servers, count: int, run: str) -> list[Side]:
    folder = _files(stack, servers, count, run)
    mine = stack.enter_context(SQLiteUpstoxStorage(folder / "ours.db", **options()))
    theirs = GuideSQLite(str(folder / "guide.db"), login)
    return _in_files(stack, folder, ours(mine), guide(theirs))


def _pooled(stack: ExitStack, servers: Servers, count: int, run: str) -> list[Side]:
    folder = _files(stack, servers, count, run)
    mine = stack.enter_context(PooledUpstoxStorage(folder / "ours.db", **options()))
    theirs = stack.enter_context(closing(GuidePooled(str(folder / "pooled.db"), login)))
    return _in_files(stack, folder, ours(mine), guide_pooled(theirs))


def _in_files(stack: ExitStack, folder: Path, mine: Threaded, theirs: Threaded) -> list[Side]:
    driver = stack.enter_context(closing(BareSQLite(str(folder / "ours.db"), login)))
    promising = stack.enter_context(closing(SQLiteWithPromises(str(folder / "ours.db"), login)))
    kv = stack.enter_context(key_value(keyvalue.DiskStore, "tokens", login, users("KV"), directory=folder / "disk"))
    return [mine, bare(driver), bare(promising, PROMISES), theirs, kv]


def _files(stack: ExitStack, servers: Servers, count: int, run: str) -> Path:
    """Copy the files for both SQLite stores. They are filled only once."""
    full, folder = servers.folder / f"{count}", servers.folder / run
    if not full.exists():
        full.mkdir()
        with SQLiteUpstoxStorage(full / "ours.db", **options()) as mine:
            ours(mine).once("store", SEED)
        guide(GuideSQLite(str(full / "guide.db"), login)).once("store", SEED)
        with closing(GuidePooled(str(full / "pooled.db"), login)) as pooled:
            guide_pooled(pooled).once("store", SEED)
        with key_value(keyvalue.DiskStore, "tokens", login, [SEED], directory=full / "disk") as kv:
            kv.once("store", SEED)
        rows.multiply_in_sqlite(str(full / "ours.db"), "upstox_tokens", rows.OURS, count)
        rows.multiply_in_sqlite(str(full / "guide.db"), "upstox_tokens", rows.GUIDE, count)
        rows.multiply_in_sqlite(str(full / "pooled.db"), "upstox_tokens", rows.GUIDE, count)
        rows.multiply_in_sqlite(str(full / "disk" / "cache.db"), "Cache", rows.DISKCACHE, count)
    shutil.copytree(full, folder)
    stack.callback(shutil.rmtree, folder)
    return folder


def _postgresql(stack: ExitStack, servers: Servers, count: int, run: str) -> list[Side]:
    own = stack.enter_context(rows.postgresql_database(servers.postgresql, f"{run}_ours"))
    other = stack.enter_context(rows.postgresql_database(servers.postgresql, f"{run}_guide"))
    mine = ours(stack.enter_context(PostgreSQLUpstoxStorage(own, pool_size=CROWD, **options())))
    theirs = guide(GuidePostgreSQL(other, login))
    kv = stack.enter_context(key_value(keyvalue.PostgreSQLStore, "tokens", login, users("KV"), url=other))
    for side in (mine, theirs, kv):
        side.once("store", SEED)
    rows.multiply_in_postgresql(own, "upstox_tokens", rows.OURS, count)
    rows.multiply_in_postgresql(other, "upstox_tokens", rows.GUIDE, count)
    rows.multiply_in_postgresql(other, "kv_store", rows.KEY_VALUE, count)
    driver = stack.enter_context(closing(BarePostgreSQL(own, login)))
    one = stack.enter_context(closing(OneMessage(own, login)))
    promising = stack.enter_context(closing(PostgreSQLWithPromises(own, login)))
    fewest = Threaded(ONE_MESSAGE, users("ONE"), one.store, None)
    return [mine, bare(driver), bare(promising, PROMISES), theirs, kv, fewest]


def _mongodb(stack: ExitStack, servers: Servers, count: int, run: str) -> list[Side]:
    url = servers.mongodb
    own = stack.enter_context(rows.mongodb_database(url, f"{run}_ours"))
    other = stack.enter_context(rows.mongodb_database(url, f"{run}_guide"))
    third = stack.enter_context(rows.mongodb_database(url, f"{run}_kv"))
    mine = ours(stack.enter_context(MongoUpstoxStorage(url, own, **options())))
    storage = GuideMongo(url, other, login)
    stack.callback(storage.client.close)
    theirs = guide(storage)
    kv = stack.enter_context(
        key_value(keyvalue.MongoDBStore, "tokens", login, users("KV"), url=url, db_name=third, coll_name="tokens")
    )
    for side in (mine, theirs, kv):
        side.once("store", SEED)
    rows.multiply_in_mongodb(url, own, "tokens", rows.OURS_IN_MONGODB, count)
    rows.multiply_in_mongodb(url, other, "tokens", rows.GUIDE_IN_MONGODB, count)
    rows.multiply_in_mongodb(url, third, "tokens", rows.KEY_VALUE_IN_MONGODB, count)
    driver = stack.enter_context(closing(BareMongo(url, own, login)))
    promising = stack.enter_context(closing(MongoWithPromises(url, own, login)))
    return [mine, bare(driver), bare(promising, PROMISES), theirs, kv]


def _hybrid(stack: ExitStack, servers: Servers, count: int, run: str) -> list[Side]:
    prefix = stack.enter_context(rows.redis_prefix(servers.redis, run))
    own = stack.enter_context(rows.postgresql_database(servers.postgresql, f"{run}_ours"))
    other = stack.enter_context(rows.postgresql_database(servers.postgresql, f"{run}_guide"))
    hybrid = HybridUpstoxStorage(servers.redis, own, redis_prefix=prefix, pool_size=CROWD, **options())
    mine = ours(stack.enter_context(hybrid))
    storage = GuideHybrid(keywords(servers.redis), other, login)
    stack.callback(storage.redis.close)
    storage.prefix = f"{prefix}:guide:"
    theirs = guide(storage)
    kv = stack.enter_context(key_value(keyvalue.RedisStore, prefix, login, users("KV"), url=servers.redis))
    for side in (mine, theirs, kv):
        side.once("store", SEED)
    rows.multiply_in_postgresql(own, "upstox_tokens", rows.OURS, count)
    rows.multiply_in_postgresql(other, "upstox_token_backup", rows.GUIDE, count)
    rows.multiply_in_redis(servers.redis, f"{prefix}::{SEED}", f"{prefix}::OLD", count)
    driver = BareHybrid(servers.redis, BarePostgreSQL(own, login), f"{prefix}:bare")
    promising = HybridWithPromises(servers.redis, PostgreSQLWithPromises(own, login), f"{prefix}:promises")
    sides = [stack.enter_context(closing(side)) for side in (driver, promising)]
    return [mine, bare(sides[0]), bare(sides[1], PROMISES), theirs, kv]


def keywords(url: str) -> dict[str, Any]:
    """Convert the URL to the keyword arguments that the guide takes."""
    parts = urlsplit(url)
    database = int(parts.path.strip("/") or 0)
    known = {"host": parts.hostname, "port": parts.port, "db": database, "password": parts.password}
    return {**known, **({"username": parts.username} if parts.username else {})}
