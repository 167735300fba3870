"""A store as one writes it in a hurry. Every promise that is tested with kills and crowds must fail here."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from upstox_db_examples.core.answer import Minted
from upstox_db_examples.core.token import StoredToken, TokenResult
from upstox_db_examples.hybrid import HybridUpstoxStorage
from upstox_db_examples.hybrid.redis import Use
from upstox_db_examples.postgresql import PostgreSQLUpstoxStorage
from upstox_db_examples.sqlite import SQLiteUpstoxStorage


class NaiveStorage:
    """Each statement commits by itself, nobody waits for anybody, and the lock file is tidied away."""

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

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
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


class TellsRedisLast(HybridUpstoxStorage):
    """The order that looks right: into PostgreSQL, and when that has worked, into Redis."""

    def _begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        PostgreSQLUpstoxStorage._begin_login(self, user_id, lock, now, metadata)

    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> int:
        redis = self._redis
        token_id = PostgreSQLUpstoxStorage._insert(self, token, action, metadata)
        redis._client.set(redis._keys(token.user_id)[0], "tombstone")  # so that `put` takes the copy at once
        redis.put(replace(token, token_id=token_id), token.created_at, tombstone="tombstone")
        return token_id


class FoldsAgain(HybridUpstoxStorage):
    """Adds up what waits in Redis, and does not ask whether it has been added already."""

    def _fold(self, uses: list[Use]) -> int:
        return super()._fold([use._replace(use=uuid.uuid4().hex) for use in uses])


class DoesNotMark(SQLiteUpstoxStorage):
    """Writes down that a login begins, and leaves the token as it is that this login will kill."""

    def _begin_login(self, user_id: str | None, _: str, now: datetime, metadata: dict[str, Any]) -> None:
        self._record(user_id, "login", now, metadata)


class SavesOnce(SQLiteUpstoxStorage):
    """Stores the token that a login has made, and raises what the database or Ctrl-C has raised."""

    def _keep(self, minted: Minted, *rest: Any) -> TokenResult:
        _, before, lock, now, wish, refusal = rest
        result = self._save(minted, before, now, "created")
        self._tidy_up(minted, True, lock, wish, refusal)
        return result


class RotatesInTwoSteps(SQLiteUpstoxStorage):
    """The old ciphertext goes, and then the new one comes."""

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        for old, new in rows:
            with self.get_connection() as conn:
                gone = "UPDATE upstox_tokens SET is_active = 0, access_token = NULL WHERE id = ?"
                conn.execute(gone, (old.token_id,))
                back = "UPDATE upstox_tokens SET is_active = 1, access_token = ?, key_id = ? WHERE id = ?"
                conn.execute(back, (new.ciphertext, new.key_id, old.token_id))
        return len(rows)
