"""How long an event loop makes its tasks wait while something else goes on in it, under asyncio or trio."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio

PAUSE = 0.001


async def delays_during(job: Callable[[], Awaitable[object]]) -> list[float]:
    """Run the job beside a task that sleeps for a millisecond again and again.

    Returns:
        by how many seconds each of these sleeps was too long, the shortest delay first.
    """
    delays: list[float] = []

    async def sleep_on_and_on() -> None:
        while True:
            begun = time.perf_counter()
            await anyio.sleep(PAUSE)
            delays.append(time.perf_counter() - begun - PAUSE)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleep_on_and_on)
        await job()
        tasks.cancel_scope.cancel()
    return sorted(delays)
