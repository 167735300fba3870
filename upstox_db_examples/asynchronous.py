"""The stores for asyncio and trio: each public method is awaitable and runs on a worker thread."""

# There is no `from __future__ import annotations` here: the site's generator cannot resolve type parameters in text.

import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Final, Self, cast, overload
from weakref import WeakSet, WeakValueDictionary

from anyio import CancelScope

from .async_watch import AsyncWatch
from .core.batch import PACE, BatchResult, Pace
from .core.errors import InvalidInput
from .core.store import TokenStorage
from .core.token import Secret, TokenResult
from .worker_threads import Call, Lane

if TYPE_CHECKING:
    import sqlite3

    from psycopg2.extensions import connection

    from .hybrid import HybridUpstoxStorage
    from .mongodb import MongoUpstoxStorage
    from .pooled import PooledUpstoxStorage
    from .postgresql import PostgreSQLUpstoxStorage
    from .sqlite import SQLiteUpstoxStorage


def _awaitable[Store: TokenStorage, **P, R](
    method: Callable[Concatenate[Store, P], R],
) -> "Callable[Concatenate[AsyncTokenStorage[Store], P], Coroutine[Any, Any, R]]":
    """Return the awaitable form of a store's method. Type checkers see the method's own signature."""
    name = method.__name__

    @functools.wraps(method, assigned=("__name__", "__doc__", "__annotations__"))
    async def on_a_thread(self: "AsyncTokenStorage[Store]", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.run(cast("Callable[Concatenate[Store, P], R]", _method(name)), *args, **kwargs)

    return on_a_thread


def _method(name: str) -> Callable[..., Any]:
    # By its name, because a subclass of the store may override it.
    return lambda store, *args, **kwargs: getattr(store, name)(*args, **kwargs)


class AsyncTokenStorage[Store: TokenStorage]:
    """Any of the stores, for asyncio and trio. `await` each of its methods; `async with` closes the store at the end.

    Every public method of the store is here, the special ones too, with the same arguments, results and errors. Only
    `get_connection` is different: it takes the function that uses the connection. Opening a store takes time as well:
    open it before the event loop starts, or with `await anyio.to_thread.run_sync(open_store, address)`.

    A call that is cancelled before its thread begins ends at once. One that has begun is finished first, and then the
    cancellation goes on. So no login is lost: its token is in the store, or in the error that is raised in place of the
    cancellation. A batch finishes the login that runs, and begins no other. A wait for a lock or for a silent server
    ends after the store's own `login_wait` or `timeout`.

    **Why threads, and not five native drivers.** One login at a time, the mark of a running login, and what happens to
    a token that cannot be stored: that part must be right, and native drivers would need a second version of all of it.
    They would gain little. The login itself (upstox-totp, on curl) and SQLite block in any case, and asyncpg and the
    asynchronous clients of MongoDB and Redis work under asyncio only. A thread adds about 0.2 ms to a read, and a
    program that holds its token reads it a few times a day: see `StoredTokenAuth`.

    One of these serves a whole program, even one with several event loops. Each loop has its own threads.

    Args:
        store: the store. Other threads may use it at the same time.
        threads: how many calls run at the same time, apart from logins. With more threads, the event loop waits longer
            for its turn.
        login_threads: how many users log in at the same time. These threads are separate from the others. All callers
            who wait for the login of one user take up one of them.
        watches: how many watches run at the same time. Each has a thread of its own.

    Attributes:
        store: the store itself, for code that runs on other threads.

    Raises:
        InvalidInput: a number is not a whole number of at least 1.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     async with AsyncTokenStorage(storage) as tokens:
        ...         result = await tokens.get_or_create_token("AB1234")
        ...         return result["user_id"]
        >>> asyncio.run(main())
        'AB1234'
    """

    def __init__(self, store: Store, *, threads: int = 4, login_threads: int = 8, watches: int = 64) -> None:
        if any(type(number) is not int or number < 1 for number in (threads, login_threads, watches)):
            raise InvalidInput("threads, login_threads and watches must be whole numbers of at least 1.")
        self.store: Final = store
        self._calls, self._logins = Lane(threads), Lane(login_threads)
        self._turns: WeakValueDictionary[str, Lane] = WeakValueDictionary()
        self._most_watches = watches
        self._watches: WeakSet[AsyncWatch] = WeakSet()

    async def run[**P, R](
        self, function: Callable[Concatenate[Store, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call `function(store, ...)` on a thread, for several steps in one go or for a store of your own."""
        return await self._calls.run(Call(function, self.store, *args, **kwargs))

    # What every store has

    get_valid_token = _awaitable(TokenStorage.get_valid_token)
    get_token_history = _awaitable(TokenStorage.get_token_history)
    get_user_statistics = _awaitable(TokenStorage.get_user_statistics)
    get_audit_trail = _awaitable(TokenStorage.get_audit_trail)
    get_storage_status = _awaitable(TokenStorage.get_storage_status)
    revoke_token = _awaitable(TokenStorage.revoke_token)
    cleanup_expired_tokens = _awaitable(TokenStorage.cleanup_expired_tokens)
    cleanup_old_audit_entries = _awaitable(TokenStorage.cleanup_old_audit_entries)
    rotate_keys = _awaitable(TokenStorage.rotate_keys)
    keys_in_use = _awaitable(TokenStorage.keys_in_use)
    init_database = _awaitable(TokenStorage.init_database)
    close = _awaitable(TokenStorage.close)

    # What may wait for a login

    async def store_token(self, user_identifier: str | None = None) -> TokenResult:
        """See `TokenStorage.store_token`."""
        return await self._in_turn(user_identifier, Call(self.store.store_token, user_identifier))

    async def get_or_create_token(self, user_id: str | None = None) -> TokenResult:
        """See `TokenStorage.get_or_create_token`. A thousand tasks that want one token make one login.

        Then each of them reads the token. They do not share one read, because the audit trail has to show each use.
        """
        if user_id is not None and (token := await self.get_valid_token(user_id)):
            return token
        return await self._in_turn(user_id, Call(self.store.get_or_create_token, user_id))

    async def renew_token(self, user_id: str, refused_token: str | Secret | Mapping[str, Any]) -> TokenResult:
        """See `TokenStorage.renew_token`."""
        call = Call(self.store.renew_token, user_id, refused_token)
        del refused_token  # A traceback that prints local variables must not show it.
        return await self._in_turn(user_id, call)

    async def save_token(self, response: object, *, verify: bool = False) -> TokenResult:
        """See `TokenStorage.save_token`."""
        call = Call(self.store.save_token, response, verify=verify)
        del response
        return await self._logins.run(call)

    async def log_out(self, user_id: str) -> bool:
        """See `TokenStorage.log_out`."""
        return await self._in_turn(user_id, Call(self.store.log_out, user_id))

    async def store_token_batch(
        self, user_ids: Iterable[str], *, replace: bool = False, progress: bool = True, pace: Pace = PACE
    ) -> list[BatchResult]:
        """See `TokenStorage.store_token_batch`. A cancelled batch finishes the login that runs, and begins no other."""
        until = _UntilCancelled(pace)
        call = Call(self.store.store_token_batch, user_ids, replace=replace, progress=progress, pace=until)
        return await self._logins.run(call, on_cancel=until.cancelled.set)

    def _in_turn[R](self, user_id: object, call: Call[R]) -> Coroutine[Any, Any, R]:
        # One caller per user gets a thread. The others wait here without one, and can be cancelled at once.
        return self._after(self._turns.setdefault(str(user_id).upper(), Lane(1)), call)

    async def _after[R](self, turn: Lane, call: Call[R]) -> R:
        async with turn.limiter:
            return await self._logins.run(call)

    # What only some stores have. Type checkers refuse it for the others. At run time, `__getattr__` finds it: a list of
    # these methods would import every driver.

    if TYPE_CHECKING:
        backup = _awaitable(SQLiteUpstoxStorage.backup)
        pool_status = _awaitable(PooledUpstoxStorage.pool_status)
        get_user_dashboard = _awaitable(MongoUpstoxStorage.get_user_dashboard)
        get_tokens_by_timeframe = _awaitable(MongoUpstoxStorage.get_tokens_by_timeframe)
        init_postgres = _awaitable(HybridUpstoxStorage.init_postgres)
        fold_uses = _awaitable(HybridUpstoxStorage.fold_uses)
    else:

        def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
            if name.startswith("_") or not callable(getattr(type(self.store), name, None)):
                raise AttributeError(f"{type(self.store).__name__} has no method {name!r}", name=name, obj=self)
            return functools.partial(self.run, _method(name))

    @overload
    async def get_connection[R](
        self: "AsyncTokenStorage[SQLiteUpstoxStorage]", work: "Callable[[sqlite3.Connection], R]"
    ) -> R: ...
    @overload
    async def get_connection[R](
        self: "AsyncTokenStorage[PostgreSQLUpstoxStorage] | AsyncTokenStorage[HybridUpstoxStorage]",
        work: "Callable[[connection], R]",
    ) -> R: ...
    async def get_connection[R](self: Any, work: Callable[[Any], R]) -> R:
        """Call `work(connection)` on a thread, inside `with store.get_connection() as connection`.

        The connection is not handed out, because its driver would block the event loop. MongoDB's store has no such
        method.
        """

        def with_connection(store: Any) -> R:
            with store.get_connection() as conn:
                return work(conn)

        done: R = await self.run(with_connection)
        return done

    def watch(self, user_id: str) -> AsyncWatch:
        """Return an iterator over the user's present token and each later one, as the store's `watch` does.

        async with tokens.watch("AB1234") as changes:
            async for token in changes: ...
        """
        return AsyncWatch(Call(self.store.watch, user_id), self._watches, self._most_watches)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with CancelScope(shield=True):
            await self.close()


class _UntilCancelled(Pace):
    """The pace that the caller gave, until the caller is cancelled. Other batches may share that pace."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self.cancelled = pace, threading.Event()

    @contextlib.contextmanager
    def turn(
        self,
        user_id: str,
        others: Callable[[float], list[float]] | None = None,
        *,
        stopped: threading.Event | None = None,
    ) -> Iterator[None]:
        with self._pace.turn(user_id, others, stopped=stopped or self.cancelled):
            yield
