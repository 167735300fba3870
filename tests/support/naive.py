"""Naive stores, as somebody in a hurry would write them. They must fail every test that kills or crowds processes."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self, cast

from upstox_db_examples.core.answer import Minted
from upstox_db_examples.core.life_cycle import LifeCycle
from upstox_db_examples.core.settings import Options, Settings
from upstox_db_examples.core.token import StoredToken, TokenResult
from upstox_db_examples.hybrid import HybridUpstoxStorage
from upstox_db_examples.hybrid.backend import HybridBackend
from upstox_db_examples.hybrid.fold import Fold
from upstox_db_examples.hybrid.redis import RedisTokens
from upstox_db_examples.hybrid.uses import Use
from upstox_db_examples.postgresql.backend import PostgreSQLBackend
from upstox_db_examples.sqlite import SQLiteUpstoxStorage
from upstox_db_examples.sqlite.backend import SQLiteBackend


class NaiveStorage:
    """A store whose statements commit one by one. Logins do not wait for each other, and the lock file is deleted."""

    def __init__(self, db_path: str, *, login: Callable[[str], Any], **_: Any) -> None:
        self.db_path, self._login = db_path, login
        self.conn = sqlite3.connect(db_path, timeout=30, isolation_level=None, check_same_thread=False)
        self.conn.execute(
            "CREATE TABLE IF NOT EXISTS upstox_tokens (id INTEGER PRIMARY KEY, user_id, token, is_active)"
        )
        self.conn.execute("CREATE TABLE IF NOT EXISTS upstox_token_audit (id INTEGER PRIMARY KEY, token_id, action)")

    def store_token(self, user_id: str) -> dict[str, Any]:
        token = self._login(user_id).access_token
        self.conn.execute("UPDATE upstox_tokens SET is_active = 0 WHERE user_id = ?", (user_id,))
        self.conn.execute("INSERT INTO upstox_tokens (user_id, token, is_active) VALUES (?, ?, 1)", (user_id, token))
        (token_id,) = self.conn.execute("SELECT max(id) FROM upstox_tokens").fetchone()
        self.conn.execute("INSERT INTO upstox_token_audit (token_id, action) VALUES (?, 'created')", (token_id,))
        return {"token": token, "token_id": token_id}

    def get_or_create_token(self, user_id: str) -> dict[str, Any]:
        return self.get_valid_token(user_id) or self.store_token(user_id)

    def get_valid_token(self, user_id: str) -> dict[str, Any] | None:
        row = self.conn.execute(
            "SELECT token FROM upstox_tokens WHERE user_id = ? AND is_active ORDER BY id DESC", (user_id,)
        ).fetchone()
        return {"token": row[0]} if row else None

    def renew_token(self, user_id: str, refused: str) -> dict[str, Any]:
        read = self.get_valid_token(user_id)
        return read if read and read["token"] != refused else self.store_token(user_id)

    @property
    def backend(self) -> Self:
        return self

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        path = Path(f"{self.db_path}-{name}.lock")
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            time.sleep(0)
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.conn.close()


class TellsRedisLastBackend(HybridBackend):
    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        self.postgres.begin_login(user_id, lock, now, metadata)

    def insert(
        self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None
    ) -> StoredToken:
        stored = self.postgres.insert(token, action, metadata)
        tombstone = self.redis.bury([token.user_id], 10).tombstone  # so that `put` accepts the copy at once
        self.redis.put(stored, token.created_at, tombstone=tombstone)
        return stored


class TellsRedisLast(HybridUpstoxStorage):
    """A store that writes in the order that looks right: first to PostgreSQL, and then to Redis."""

    backend_class = TellsRedisLastBackend


class AddsAgain(Fold):
    def put(self, uses: list[Use]) -> int:
        return super().put([use._replace(use_id=uuid.uuid4().hex) for use in uses])


class FoldsAgainBackend(HybridBackend):
    def __init__(self, postgres: PostgreSQLBackend, redis: RedisTokens, believed: float, buried_for: float) -> None:
        super().__init__(postgres, redis, believed, buried_for)
        self.fold = AddsAgain(postgres.connections, redis)


class FoldsAgain(HybridUpstoxStorage):
    """A store that adds up the use counts in Redis without checking whether they have been added already."""

    backend_class = FoldsAgainBackend


class DoesNotMarkBackend(SQLiteBackend):
    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        self.record(user_id, "login", now, {**metadata, "under": lock})


class DoesNotMark(SQLiteUpstoxStorage):
    """A store that records the start of a login but does not mark the token that this login will kill."""

    backend_class = DoesNotMarkBackend


class SavesOnceInItsLife(LifeCycle):
    def _keep(self, minted: Minted, *rest: Any) -> TokenResult:
        _, before, lock, now, wish, refusal = rest
        result = self._saving.save(minted, before, now, "created")
        self._tidy_up(minted, True, lock, wish, refusal)
        return result


class SavesOnce(SQLiteUpstoxStorage):
    """A store that tries only once to save a new token, and lets any error of the database or Ctrl-C through."""

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        options.pop("audit_reads", None)
        settings = Settings("SavesOnce", cast(Options, options))
        self._life_cycle = SavesOnceInItsLife(self.backend, self.cipher, self._users, settings)


class RotatesInTwoStepsBackend(SQLiteBackend):
    def replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        for old, new in rows:
            with self.connections.lend() as conn:
                gone = "UPDATE upstox_tokens SET is_active = 0, access_token = NULL WHERE id = ?"
                conn.execute(gone, (old.token_id,))
                back = "UPDATE upstox_tokens SET is_active = 1, access_token = ?, key_id = ? WHERE id = ?"
                conn.execute(back, (new.ciphertext, new.key_id, old.token_id))
        return len(rows)


class RotatesInTwoSteps(SQLiteUpstoxStorage):
    """A store that deletes the old ciphertext first and writes the new one afterwards."""

    backend_class = RotatesInTwoStepsBackend
