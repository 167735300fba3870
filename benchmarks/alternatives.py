"""What a user would otherwise take for one machine. All of these encrypt, and all but one are durable.

Not here: keyring. It needs the desktop's key store, which a server has not, and its file backend asks for a password.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diskcache
from cryptography.fernet import Fernet
from filelock import FileLock
from key_value.aio.wrappers.encryption.fernet import FernetEncryptionWrapper
from sqlalchemy import create_engine, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks import keyvalue
from benchmarks.guide import Login
from benchmarks.measure import Result, Side, Threaded, compare
from benchmarks.promises import Cipher
from benchmarks.stores import login, options, ours, users
from upstox_db_examples import SQLiteUpstoxStorage

DAY = 86_400


class Alternative(NamedTuple):
    """One choice, its results by operation, and what it does not do."""

    name: str
    results: dict[str, Result]
    note: str

    @property
    def durable(self) -> bool:
        return self.name not in NOT_DURABLE


NOT_DURABLE = ("py-key-value", "diskcache")  # A power cut can lose what was stored.
NOTES = {
    "ours": "SQLite; one login at a time, history, audit",
    "JSON file": "a file for each user, filelock, AES, fsync; no history, no audit",
    "SQLAlchemy": "a model in SQLite, AES, `synchronous = FULL`; no lock, no audit",
    "py-key-value": "its disk store and its Fernet wrapper; no lock, no history, no audit",
    "diskcache": "AES; no lock, no history, no audit",
}


class JSONFile:
    """A file for each user. A reader needs no lock, because the file is replaced as a whole."""

    def __init__(self, folder: Path, login: Login) -> None:
        self._folder, self._login, self._cipher = folder, login, Cipher()

    def store(self, user_id: str) -> str:
        with FileLock(self._folder / f"{user_id}.lock"):
            data = self._login(user_id)
            kept = {"token": self._cipher.encrypt(data.access_token, user_id), "expires_at": time.time() + DAY}
            new = self._folder / f"{user_id}.new"
            with new.open("w") as file:
                json.dump(kept, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._folder / f"{user_id}.json")
            descriptor = os.open(self._folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return data.access_token

    def read(self, user_id: str) -> str | None:
        kept = json.loads((self._folder / f"{user_id}.json").read_text())
        return self._cipher.decrypt(kept["token"], user_id) if kept["expires_at"] > time.time() else None


class Base(DeclarativeBase):
    pass


class Token(Base):
    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(index=True)
    token: Mapped[str]
    is_active: Mapped[bool]
    expires_at: Mapped[float]


class Model:
    """A model of SQLAlchemy's, as its tutorial writes one."""

    def __init__(self, path: Path, login: Login) -> None:
        self._login, self._cipher = login, Cipher()
        self._engine = create_engine(f"sqlite:///{path}")
        event.listen(self._engine, "connect", _make_durable)
        Base.metadata.create_all(self._engine)

    def store(self, user_id: str) -> str:
        data = self._login(user_id)
        text = self._cipher.encrypt(data.access_token, user_id)
        with Session(self._engine) as session, session.begin():
            session.execute(update(Token).where(Token.user_id == user_id, Token.is_active).values(is_active=False))
            session.add(Token(user_id=user_id, token=text, is_active=True, expires_at=time.time() + DAY))
        return data.access_token

    def read(self, user_id: str) -> str | None:
        chosen = select(Token).where(Token.user_id == user_id, Token.is_active, Token.expires_at > time.time())
        with Session(self._engine) as session:
            found = session.scalars(chosen).one_or_none()
            return self._cipher.decrypt(found.token, user_id) if found else None

    def close(self) -> None:
        self._engine.dispose()


def _make_durable(conn: sqlite3.Connection, _: object) -> None:
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = FULL")


class DiskCache:
    """diskcache with its defaults, and AES."""

    def __init__(self, folder: Path, login: Login) -> None:
        self._cache, self._login, self._cipher = diskcache.Cache(str(folder)), login, Cipher()

    def store(self, user_id: str) -> str:
        data = self._login(user_id)
        self._cache.set(user_id, self._cipher.encrypt(data.access_token, user_id), expire=DAY)
        return data.access_token

    def read(self, user_id: str) -> str | None:
        text = self._cache.get(user_id)
        return self._cipher.decrypt(text, user_id) if text else None

    def close(self) -> None:
        self._cache.close()


@contextmanager
def _encrypting_key_value(folder: Path) -> Iterator[Side]:
    def wrapped(store: Any) -> Any:
        return FernetEncryptionWrapper(store, fernet=Fernet(Fernet.generate_key()))

    where: dict[str, Any] = {"directory": folder}
    with keyvalue.key_value(keyvalue.DiskStore, "tokens", login, users("KV"), wrapped, **where) as side:
        yield side


def measured(folder: Path, rounds: int, seconds: float) -> list[Alternative]:
    """Measure all of them with one caller, call by call."""
    folder.mkdir()
    with (
        SQLiteUpstoxStorage(folder / "ours.db", **options()) as storage,
        closing(Model(folder / "model.db", login)) as model,
        closing(DiskCache(folder / "cache", login)) as cache,
        _encrypting_key_value(folder / "kv") as kv,
    ):
        file = JSONFile(folder, login)
        sides: dict[str, Side] = {"ours": ours(storage)}
        sides["JSON file"] = Threaded("JSON file", users("JSON"), file.store, file.read)
        sides["SQLAlchemy"] = Threaded("SQLAlchemy", users("MODEL"), model.store, model.read)
        sides["py-key-value"] = kv
        sides["diskcache"] = Threaded("diskcache", users("DISK"), cache.store, cache.read)
        for name, side in sides.items():
            for user in side.users:
                if side.once("store", user) != side.once("read", user):
                    raise RuntimeError(f"{name}: what was stored is not what is read.")
        found = {operation: compare(sides, operation, 1, rounds, seconds) for operation in ("read", "store")}
    return [Alternative(name, {op: each[name] for op, each in found.items()}, note) for name, note in NOTES.items()]
