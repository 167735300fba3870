"""A Redis and a PostgreSQL of a test's own, and what is sent to Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis.connection
from redis import Redis

from upstox_db_examples import HybridUpstoxStorage, TokenStorage

from .postgresql import RowsInPostgreSQL
from .processes import USER
from .stores import OpenStore


class OnHybrid(RowsInPostgreSQL):
    @pytest.fixture(autouse=True)
    def _redis(self, redis_server: str, redis_prefix: str) -> Iterator[None]:
        self.redis_url, self.prefix = redis_server, redis_prefix
        with Redis.from_url(redis_server, decode_responses=True) as self.redis:
            yield

    def connect(self, **options: Any) -> TokenStorage:
        return HybridUpstoxStorage(self.redis_url, self.url, redis_prefix=self.prefix, **options)

    def write_raw(self, token_id: Any, **values: Any) -> None:
        super().write_raw(token_id, **values)
        for key in self.redis.scan_iter(f"{{{self.prefix}}}:*:token:*"):
            self.redis.delete(key)

    def key(self, user_id: str = USER) -> str:
        return f"{{{self.prefix}}}:{self.database()}:token:{user_id}"

    def database(self) -> str:
        """The name of this database in the keys, once a copy was put there."""
        (name, _) = self.redis.get(f"{{{self.prefix}}}:databases").split()
        return str(name)

    @pytest.fixture
    def store(self, open_store: OpenStore) -> HybridUpstoxStorage:
        store = open_store()
        assert isinstance(store, HybridUpstoxStorage)
        return store


def count_messages_to_redis(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that are sent from now on, one entry for each message."""
    messages: list[str] = []
    real: Any = redis.connection.Connection.send_packed_command

    def counted(connection: Any, command: Any, check_health: bool = True) -> Any:
        messages.append(b"".join(command).split(b"\r\n")[2].decode())
        return real(connection, command, check_health)

    monkeypatch.setattr(redis.connection.Connection, "send_packed_command", counted)
    return messages
