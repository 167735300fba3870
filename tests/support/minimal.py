"""The smallest versions of the patterns: how a test opens them, and sees and changes their rows by the bare driver."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, tzinfo
from multiprocessing.connection import Connection
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import psycopg2
import pymongo
import pytest
import redis

from upstox_db_examples.local.upstox import Account
from upstox_db_examples.minimal import hybrid, mongodb, pooled, postgresql, sqlite  # so that other processes start fast

KEY = b"the same key for all processes.."
PAUSES, NO_PAUSES = "upstox_totp._api.base.time", SimpleNamespace(sleep=lambda _: None)
"""What a test replaces, and by what, so that the SDK does not wait a second after each request."""
MODULES: dict[str, ModuleType] = {
    "sqlite": sqlite,
    "pooled": pooled,
    "postgresql": postgresql,
    "mongodb": mongodb,
    "hybrid": hybrid,
}


class Smallest(NamedTuple):
    """The smallest version of a pattern, on a database of this test.

    Attributes:
        where: its arguments before the key.
    """

    pattern: str
    where: tuple[str, ...]
    account: Account

    @property
    def module(self) -> ModuleType:
        return MODULES[self.pattern]

    def open(self, key: bytes = KEY, account: Account | None = None) -> Any:
        account = account or self.account
        (name,) = (name for name in vars(self.module) if name.endswith("Tokens"))
        make = getattr(self.module, name)
        if self.pattern == "mongodb":
            return make(self.where[0], key, self.where[1])
        if self.pattern == "pooled":
            return make(*self.where, key, {account.user_id: account.credentials()})
        return make(*self.where, key)

    def rows(self) -> dict[str, tuple[bytes, int]]:
        """Return the ciphertext and the expiry (seconds since 1970) of each user."""
        if self.pattern == "mongodb":
            with self._mongodb() as tokens:
                return {row["_id"]: (row["token"], int(row["expires_at"].timestamp())) for row in tokens.find()}
        with self._sql() as cursor:
            cursor.execute("SELECT user_id, token, expires_at FROM minimal_tokens")
            return {user_id: (bytes(token), expires_at) for user_id, token, expires_at in cursor.fetchall()}

    def change(self, user_id: str, column: str, value: Any) -> None:
        """Change one column of the user's row, and remove its copy from Redis."""
        if self.pattern == "mongodb":
            value = datetime.fromtimestamp(value, UTC) if column == "expires_at" else value
            with self._mongodb() as tokens:
                tokens.update_one({"_id": user_id}, {"$set": {column: value}})
            return
        mark = "?" if self.pattern in ("sqlite", "pooled") else "%s"
        with self._sql() as cursor:
            cursor.execute(f"UPDATE minimal_tokens SET {column} = {mark} WHERE user_id = {mark}", (value, user_id))
        self.forget_copies(user_id)

    def refuse_writes(self) -> None:
        """Make the database refuse every change of a token from now on, as a full disk does."""
        if self.pattern == "mongodb":
            with self._mongodb() as tokens:
                tokens.database.command("collMod", tokens.name, validator={"never": True})
            return
        with self._sql() as cursor:
            if self.pattern in ("sqlite", "pooled"):
                refuse = "SELECT RAISE(FAIL, 'database or disk is full')"
                cursor.execute(f"CREATE TRIGGER full BEFORE INSERT ON minimal_tokens BEGIN {refuse}; END")
            else:
                cursor.execute("ALTER TABLE minimal_tokens ADD CONSTRAINT never CHECK (false) NOT VALID")

    def everything(self) -> bytes:
        """Return all that the database holds, and Redis's copies."""
        if self.pattern in ("sqlite", "pooled"):
            with open(self.where[0], "rb") as file:  # noqa: PTH123
                return file.read()
        return repr(self.rows()).encode() + b"".join(self.copies().values())

    def copies(self, user_id: str | None = None) -> dict[str, bytes]:
        """Return what Redis holds of the user, by key."""
        if self.pattern != "hybrid":
            return {}
        with redis.Redis.from_url(self.where[0]) as client:
            keys: Any = client.keys(f"*{user_id or self.account.user_id}*")
            return {key.decode(): client.get(key) for key in keys}

    def forget_copies(self, user_id: str) -> None:
        for key in self.copies(user_id):
            with redis.Redis.from_url(self.where[0]) as client:
                client.delete(key)

    @contextlib.contextmanager
    def _sql(self) -> Iterator[Any]:
        connect: Callable[[str], Any] = sqlite3.connect if self.pattern in ("sqlite", "pooled") else psycopg2.connect
        with closing(connect(self.where[-1])) as db, db, closing(db.cursor()) as cursor:
            yield cursor

    @contextlib.contextmanager
    def _mongodb(self) -> Iterator[Any]:
        with pymongo.MongoClient[Any](self.where[0], tz_aware=True) as client:
            yield client[self.where[1]].minimal_tokens


@contextlib.contextmanager
def closed_at_the_end(storage: Any) -> Iterator[Any]:
    """Close what the storage keeps open, which a program would leave to its end."""
    try:
        yield storage
    finally:
        while hasattr(storage, "pool") and not storage.pool.empty():
            storage.pool.get().close()
        for client in ("client", "redis"):
            if hasattr(storage, client):
                getattr(storage, client).close()


def obtain(storage: Any, user_id: str) -> str:
    """Return the user's token, with a login if it takes one."""
    if hasattr(storage, "store_token_batch"):
        result = storage.store_token_batch([user_id])[user_id]
        if isinstance(result, Exception):
            raise result
        return str(result)
    return str(storage.get_or_create_token(user_id))


def at(clock: Callable[[], datetime]) -> type[datetime]:
    """Return a datetime class that goes by this clock."""

    class Moved(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return clock().astimezone(tz) if tz else clock().astimezone().replace(tzinfo=None)

    return Moved


def obtain_at_once(connection: Connection, smallest: Smallest, environment: dict[str, str], lease: float) -> None:
    """Obtain the token once, when told to. Send the token or the error."""
    os.environ.update(environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PAUSES, NO_PAUSES)
        if smallest.pattern == "mongodb":
            patch.setattr(mongodb, "LEASE", timedelta(seconds=lease))
        with closed_at_the_end(smallest.open()) as storage:
            connection.send("ready")
            connection.recv()
            try:
                connection.send(obtain(storage, smallest.account.user_id))
            except Exception as error:
                connection.send(repr(error))


def fork_and_borrow(connection: Connection, smallest: Smallest) -> None:
    """Fork, borrow a connection in the child, and send whether it is one of the parent's."""
    with closed_at_the_end(smallest.open()) as storage:
        parents = {id(db) for db in storage.pool.queue}
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                with storage.connection() as db:
                    os.write(writing, bytes([id(db) in parents]))
            finally:
                os._exit(0)
        os.close(writing)
        connection.send(os.read(reading, 1) == b"\1")
        os.close(reading)
        os.wait()
