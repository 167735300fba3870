"""Two waits that are no call's time: how long an event loop stands still, and how soon a watch tells of a new token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import anyio

from benchmarks.loop_delay import delays_during
from upstox_db_examples import AsyncTokenStorage, TokenStorage

WATCHED = "WATCHED"
IDLE, AWAITED, BLOCKING = "nothing", "awaited", "called in the loop"


class Delay(NamedTuple):
    """Delays in milliseconds.

    Attributes:
        loop: how much too long an event loop's tasks slept: the median and the 99th percentile, by what went on.
        watch: from the call of store_token until the watch had the token: the median and the longest.
    """

    store: str
    loop: dict[str, tuple[float, float]]
    watch: tuple[float, float]


def measured(name: str, storage: TokenStorage, users: Sequence[str], calls: int, seconds: float) -> Delay:
    """Measure both on this storage."""
    return Delay(name, _loop(storage, users, seconds), _watch(storage, min(calls, 20)))


def _loop(storage: TokenStorage, users: Sequence[str], seconds: float) -> dict[str, tuple[float, float]]:
    async def nothing() -> None:
        await anyio.sleep(seconds)

    async def awaited() -> None:
        end = time.perf_counter() + seconds
        tokens = AsyncTokenStorage(storage)

        async def caller(user: str) -> None:
            while time.perf_counter() < end:
                await tokens.get_valid_token(user)
                await tokens.store_token(user)

        async with anyio.create_task_group() as tasks:
            for user in users[:4]:
                tasks.start_soon(caller, user)

    async def blocking() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            storage.get_valid_token(users[0])
            storage.store_token(users[0])
            await anyio.sleep(0)

    found = {}
    for what, job in ((IDLE, nothing), (AWAITED, awaited), (BLOCKING, blocking)):
        delays = anyio.run(delays_during, job)
        found[what] = (statistics.median(delays) * 1000, delays[int(len(delays) * 0.99)] * 1000) if delays else (0, 0)
    return found


def _watch(storage: TokenStorage, times: int) -> tuple[float, float]:
    delays = []
    with closing(storage.watch(WATCHED)) as watch:
        if next(watch) is not None:
            raise RuntimeError(f"{WATCHED} has a token before the first one is stored.")
        for number in range(times):
            # Polling has a rhythm of its own. The stores come at changing moments of it.
            time.sleep(0.05 + 0.1 * number / times)
            begin = time.perf_counter()
            stored = storage.store_token(WATCHED)["token"]
            if (token := next(watch)) is None or token["token"] != stored:
                raise RuntimeError("The watch told of another token.")
            delays.append((time.perf_counter() - begin) * 1000)
    return statistics.median(delays), max(delays)
