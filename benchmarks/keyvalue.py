"""py-key-value, the general library that could replace this package: one value per user, read by its key.

It is asynchronous, so all its calls run in one event loop. By default it encrypts nothing and keeps no history. Its
`disk` store is SQLite, through diskcache.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from key_value.aio.stores.disk import DiskStore
from key_value.aio.stores.mongodb import MongoDBStore
from key_value.aio.stores.postgresql import PostgreSQLStore
from key_value.aio.stores.redis import RedisStore

from benchmarks.guide import Login
from benchmarks.measure import Asynchronous

NAME = "py-key-value"
DAY_SECONDS = 86_400
Store = DiskStore | MongoDBStore | PostgreSQLStore | RedisStore
__all__ = ["DiskStore", "MongoDBStore", "PostgreSQLStore", "RedisStore", "key_value"]


@contextmanager
def key_value(
    kind: type[Any],
    collection: str,
    login: Login,
    users: Sequence[str],
    wrapped: Callable[[Any], Any] = lambda store: store,
    **where: object,
) -> Iterator[Asynchronous]:
    """Yield one of its stores as a side. `wrapped` puts one of its wrappers around the store."""
    loop = asyncio.new_event_loop()
    try:

        async def opened() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # It calls some of its stores unstable.
                return await kind(**where).__aenter__()

        opened_store = loop.run_until_complete(opened())
        store = wrapped(opened_store)

        async def put(user_id: str) -> str:
            data = login(user_id)
            await store.put(user_id, data.model_dump(), collection=collection, ttl=DAY_SECONDS)
            return data.access_token

        async def get(user_id: str) -> str | None:
            value = await store.get(user_id, collection=collection)
            return value["access_token"] if value else None

        try:
            yield Asynchronous(NAME, users, loop, put, get)
        finally:
            loop.run_until_complete(opened_store.__aexit__(None, None, None))
    finally:
        loop.close()
