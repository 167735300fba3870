"""The bare drivers keep the promises of our stores: the fairest lower limit for each of them.

The token is encrypted before the driver sees it. Only one caller at a time logs a user in, in all processes. The login
is on the disk before it begins, so that a program that is killed leaves a trace. A read from SQLite keeps the others,
too. Everything else that ours does is missing: no check of the disk's room, no mark on the earlier token, no shared
refusals, no key ring, no clear errors.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pymongo.errors import DuplicateKeyError
from pymongo.write_concern import WriteConcern

from benchmarks.bare import (
    ACTOR,
    AUDIT,
    ERASE_AND_AUDIT,
    INSERT_AND_AUDIT,
    LOGIN_AUDIT,
    BareHybrid,
    BareMongo,
    BarePostgreSQL,
    BareSQLite,
    Connections,
)
from benchmarks.guide import DAY, Login
from upstox_db_examples.core.files import identity_of
from upstox_db_examples.postgresql.prepared import PreparingConnection, message
from upstox_db_examples.postgresql.queries import FIND_UNMARKED
from upstox_db_examples.sqlite import FIND

LEASE = timedelta(seconds=10)
SOON = WriteConcern(w=1, j=False)


class Cipher:
    """AES-256-GCM, bound to the user."""

    def __init__(self) -> None:
        self._cipher = AESGCM(os.urandom(32))

    def encrypt(self, token: str, user_id: str) -> str:
        nonce = os.urandom(12)
        sealed = nonce + self._cipher.encrypt(nonce, token.encode(), user_id.encode())
        return f"v1.bare.{base64.urlsafe_b64encode(sealed).decode()}"

    def decrypt(self, text: str, user_id: str) -> str:
        encoded = text.removeprefix("v1.bare.").encode().translate(_TO_ORDINARY)
        sealed = binascii.a2b_base64(encoded, strict_mode=True)
        if binascii.b2a_base64(sealed[-(len(sealed) % 3 or 3) :], newline=False) != encoded[-4:]:
            raise ValueError("another spelling of a ciphertext")
        return self._cipher.decrypt(sealed[:12], sealed[12:], user_id.encode()).decode()


_TO_ORDINARY = bytes.maketrans(b"-_", b"+/")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file. Closing it releases the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class SQLiteWithPromises(BareSQLite):
    """A file lock, and two transactions: the login, and the token.

    A read keeps all promises of ours, in one function: from the right file, no token in doubt, only the one spelling of
    a ciphertext, and everything that a result tells.
    """

    def __init__(self, path: str, login: Login) -> None:
        super().__init__(path, login)
        self._path, self._folder, self._cipher = path, Path(path).parent, Cipher()
        self._identity = identity_of(path)

    def read(self, user_id: str) -> str | None:
        if identity_of(self._path) != self._identity:
            raise RuntimeError("another file")
        conn = self._connections.take()
        row = conn.execute(FIND, (user_id, int(time.time()))).fetchone()
        conn.rollback()
        self._connections.give_back(conn)
        if row is None or row[-1] is not None:  # the mark of a login
            return None
        token_id, owner, text, _, _, created_at, expires_at, name, email, uses, _, _ = row
        times = {
            "created_at": datetime.fromtimestamp(created_at, UTC),
            "expires_at": datetime.fromtimestamp(expires_at, UTC),
        }
        result: dict[str, Any] = {
            "token": self._cipher.decrypt(text, owner),
            "user_name": name,
            "email": email,
            "token_id": token_id,
        }
        result |= {"user_id": owner, "usage_count": uses, **times}
        return str(result["token"])

    def store(self, user_id: str) -> str:
        with locked(self._folder / f"{user_id}.lock"):
            conn = self._connections.take()
            conn.execute("BEGIN IMMEDIATE")
            conn.execute(AUDIT, (None, user_id, "login", ACTOR, int(time.time()), "{}"))
            conn.execute("COMMIT")
            data = self._login(user_id)
            self._write(conn, data, self._cipher.encrypt(data.access_token, user_id))
            self._connections.give_back(conn)
        return data.access_token


class PostgreSQLWithPromises(BarePostgreSQL):
    """Prepared statements. A store is two messages: the lock with the login, and the token with the lock's end."""

    def __init__(self, url: str, login: Login) -> None:
        super().__init__(url, login)
        self._connections = Connections(lambda: psycopg2.connect(url, connection_factory=PreparingConnection))
        self._cipher = Cipher()

    def read(self, user_id: str) -> str | None:
        now = datetime.now(UTC)
        conn = self._connections.take()
        rows = _answer(
            conn, FIND_UNMARKED, user_id=user_id, alive_after=now, now=now, actor=ACTOR, metadata="{}"
        )  # fmt: skip
        self._connections.give_back(conn)
        return self._cipher.decrypt(rows[0][-1], user_id) if rows else None

    def store(self, user_id: str) -> str:
        now = datetime.now(UTC)
        key = zlib.crc32(user_id.encode())
        conn = self._connections.take()
        lock = "SELECT pg_advisory_lock(%(key)s)"  # It belongs to the session, so it outlasts the transaction.
        _answer(conn, f"{lock};{LOGIN_AUDIT}", key=key, user_id=user_id, actor=ACTOR, now=now, metadata="{}")
        data = self._login(user_id)
        values = data.model_dump(include={"user_name", "email", "broker", "user_type"})
        values |= {"user_id": user_id, "ciphertext": self._cipher.encrypt(data.access_token, user_id), "key": key}
        values |= {"products": '["D"]', "exchanges": '["NSE"]', "now": now, "expires_at": now + DAY, "actor": ACTOR}
        unlock = "COMMIT;SELECT pg_advisory_unlock(%(key)s)"
        _answer(conn, f"{ERASE_AND_AUDIT};{INSERT_AND_AUDIT}", before="BEGIN;", after=f";{unlock}", **values)
        self._connections.give_back(conn)
        return data.access_token


def _answer(conn: Any, sql: str, before: str = "", after: str = "", **values: object) -> list[tuple[Any, ...]]:
    known = message(sql)
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute(before + known.for_session(conn.known) + after, values)
        conn.known |= known.names
        rows: list[tuple[Any, ...]] = cursor.fetchall() if cursor.description else []
    return rows


class MongoWithPromises(BareMongo):
    """A lease. The login and the active token are waited for. MongoDB's journal keeps the order of the other writes."""

    def __init__(self, url: str, database: str, login: Login) -> None:
        super().__init__(url, database, login)
        self._cipher = Cipher()
        self._leases = self._db.bare_leases.with_options(write_concern=SOON)

    def read(self, user_id: str) -> str | None:
        text = super().read(user_id)
        return self._cipher.decrypt(text, user_id) if text else None

    def store(self, user_id: str) -> str:
        while not self._leased(user_id):
            time.sleep(0.02)
        entry = {"user_id": user_id, "action": "login", "actor": ACTOR, "performed_at": datetime.now(UTC)}
        self._db.token_audit.insert_one(entry)
        data = self._login(user_id)
        self._write(data, self._cipher.encrypt(data.access_token, user_id), SOON)
        self._leases.delete_one({"_id": user_id})
        return data.access_token

    def _leased(self, user_id: str) -> bool:
        now = datetime.now(UTC)
        try:
            free = {"_id": user_id, "until": {"$lt": now}}
            self._leases.update_one(free, {"$set": {"until": now + LEASE}}, upsert=True)
        except DuplicateKeyError:  # The lease is there and has not expired.
            return False
        return True


class HybridWithPromises(BareHybrid):
    """No old copy survives in Redis: it is deleted before the new token is stored. Redis has the encrypted token."""

    def __init__(self, redis_url: str, postgresql: PostgreSQLWithPromises, prefix: str) -> None:
        super().__init__(redis_url, postgresql, prefix)
        self._cipher = Cipher()

    def read(self, user_id: str) -> str | None:
        found = self._copied(user_id)
        if found:
            return self._cipher.decrypt(found, user_id)
        token = self._postgresql.read(user_id)
        if token:
            self._copy(user_id, self._cipher.encrypt(token, user_id))
        return token

    def store(self, user_id: str) -> str:
        self.forget(user_id)
        token = self._postgresql.store(user_id)
        self._copy(user_id, self._cipher.encrypt(token, user_id))
        return token
