"""A watch over a user's token, for asyncio and trio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self
from weakref import WeakSet

from anyio import CancelScope

from .core.errors import StoreUnavailable
from .core.token import TokenResult
from .core.watch import Watch
from .worker_threads import Call, Lane


class AsyncWatch:
    """A watch over one user's token, made by `AsyncTokenStorage.watch`. `close` it, or use `async with`.

    It waits for the next token on a thread of its own. When that wait is cancelled, the watch ends.

    Raises:
        StoreUnavailable: at the first token, if too many watches run.
    """

    def __init__(self, open: Call[Watch], running: WeakSet[AsyncWatch], most: int) -> None:
        self._open, self._running, self._most = open, running, most
        self._lane = Lane(1)
        self._watch: Watch | None = None
        self._tokens: Iterator[TokenResult | None] = iter(())
        self._closed = False

    async def close(self) -> None:
        """End the watch, also while another task waits for its next token. A second call is harmless."""
        with CancelScope(shield=True):
            await Lane(1).run(self._end)
        self._running.discard(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenResult | None:
        if self not in self._running and not self._closed:
            if len(self._running) >= self._most:
                raise StoreUnavailable(
                    f"{self._most} watches are running already. Close one, or pass a larger number as `watches`."
                )
            self._running.add(self)
        found: list[TokenResult | None] = []
        try:
            found = await self._lane.run(self._next, on_cancel=self._end)
        finally:
            if not found:
                self._running.discard(self)
        if not found:
            raise StopAsyncIteration
        return found[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _next(self) -> list[TokenResult | None]:
        """Return the next token in a list, or an empty list at the end."""
        if self._watch is None and not self._closed:
            self._watch = self._open()
            self._tokens = iter(self._watch)
        if self._closed and self._watch is not None:  # `_end` may have come before there was anything to close.
            self._watch.close()
        try:
            return [next(self._tokens)]
        except StopIteration:
            return []

    def _end(self) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.close()
