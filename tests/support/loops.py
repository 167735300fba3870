"""Event loops: run a test under asyncio and under trio, and see what runs in a loop's thread."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import anyio
import anyio.to_thread

from upstox_db_examples.local.upstox import LocalUpstox

BACKENDS = ("asyncio", "trio")
DRIVERS = ("sqlite3", "psycopg2", "pymongo", "redis", "curl_cffi", "cryptography")


def run[R](backend: str, main: Callable[[], Awaitable[R]]) -> R:
    return anyio.run(main, backend=backend)


async def at_once(count: int, job: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run this many tasks at the same time, and return their results."""
    results: list[Any] = []

    async def one() -> None:
        results.append(await job())

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
    return results


@contextmanager
def drivers_seen_here() -> Iterator[set[str]]:
    """Yield a set that gets the name of each driver that runs in this thread inside the block."""
    seen: set[str] = set()

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            modules = {str(frame.f_globals.get("__name__")).partition(".")[0]}
        elif event == "c_call":
            owner = type(getattr(called, "__self__", None))
            modules = {str(each).partition(".")[0] for each in (called.__module__, owner.__module__)}
        else:
            return
        seen.update(modules.intersection(DRIVERS))

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)


class HeldLogin:
    """Holds back the answer to a login at the local Upstox, whose token is made already, until the test lets it go."""

    def __init__(self, upstox: LocalUpstox) -> None:
        self._arrived, self._go = threading.Event(), threading.Event()
        upstox.on_step = self._wait

    def _wait(self, step: int, what: str) -> None:
        if (step, what) == (6, "answer"):
            self._arrived.set()
            assert self._go.wait(30)

    async def arrived(self) -> None:
        assert await anyio.to_thread.run_sync(self._arrived.wait, 30)

    def go(self) -> None:
        self._go.set()

    async def go_soon(self) -> None:
        await self.arrived()
        threading.Timer(0.1, self.go).start()


async def cancel_scope(job: Callable[[], Coroutine[Any, Any, None]], begun: Callable[[], Awaitable[Any]]) -> None:
    """Start the job, and cancel it by a scope once it has begun. Return when it has ended."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(job)
        await begun()
        tasks.cancel_scope.cancel()


async def cancel_task(job: Callable[[], Coroutine[Any, Any, None]], begun: Callable[[], Awaitable[Any]]) -> None:
    """Do the same with asyncio's own `Task.cancel`, twice."""
    task = asyncio.ensure_future(job())
    await begun()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with suppress(asyncio.CancelledError):
        await task


WAYS_TO_CANCEL = (("asyncio", cancel_scope), ("asyncio", cancel_task), ("trio", cancel_scope))
