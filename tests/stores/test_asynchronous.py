"""AsyncTokenStorage under asyncio and trio, on every store."""

from __future__ import annotations

import inspect
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, assert_type

import anyio
import pytest
from psycopg2.extensions import connection

from upstox_db_examples import (
    Accounts,
    AsyncTokenStorage,
    HybridUpstoxStorage,
    InvalidInput,
    MongoUpstoxStorage,
    Pace,
    PooledUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SdkLogin,
    SQLiteUpstoxStorage,
    StoreUnavailable,
    TokenNotStored,
    TokenResult,
    TokenStorage,
    Watch,
)
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.clocks import AT_ONCE, Clock
from ..support.leaks import shown_with_locals
from ..support.loops import BACKENDS, WAYS_TO_CANCEL, HeldLogin, at_once, drivers_seen_here, run
from ..support.processes import KEY, USER, Address, jwt, response, token_data
from ..support.stores import held, opening

IDS = ["CD0001", "CD0002", "CD0003", "CD0004"]
STORES = (
    SQLiteUpstoxStorage,
    PooledUpstoxStorage,
    PostgreSQLUpstoxStorage,
    MongoUpstoxStorage,
    HybridUpstoxStorage,
)

Open = Callable[..., TokenStorage]


@pytest.fixture
def open_each(each_address: Address, upstox: LocalUpstox, account: Account, clock: Clock) -> Iterator[Open]:
    """Return a function that opens a store of each kind in turn, with the SDK's login at the local Upstox."""
    login = SdkLogin(account.credentials(), base_domain=upstox.base_domain)
    with opening(each_address.open, login=login, clock=clock, actor="tests", **each_address.counting()) as open_one:
        yield open_one


@pytest.fixture
def open_sqlite(tmp_path: Path, upstox: LocalUpstox, account: Account, clock: Clock) -> Iterator[Open]:
    login = SdkLogin(account.credentials(), base_domain=upstox.base_domain)
    connect = partial(SQLiteUpstoxStorage, tmp_path / "upstox.db", keys=KEY)
    with opening(connect, login=login, clock=clock, actor="tests") as open_one:
        yield open_one


def free(store: TokenStorage) -> bool:
    """Return whether nobody holds the user's lock."""
    with store.backend.lock(USER):
        return True


# Every store


def test_a_thousand_tasks_that_want_one_token_make_one_login(open_each: Open, upstox: LocalUpstox) -> None:
    tokens = AsyncTokenStorage(open_each())

    async def main() -> list[TokenResult]:
        return await at_once(1000, partial(tokens.get_or_create_token, USER))

    assert {result["token"] for result in run("asyncio", main)} == {held(tokens.store)}
    assert upstox.logins() == upstox.attempts() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_method_can_be_awaited_and_no_driver_runs_in_the_loops_thread(
    open_each: Open, upstox: LocalUpstox, clock: Clock, backend: str, tmp_path: Path
) -> None:
    store = open_each(renew_pause=0.001)
    kind, names, called = type(store), public_methods(type(store)), set()
    arguments: dict[str, tuple[Any, ...]] = {
        "log_out": (USER,),
        "save_token": (response("CD5678", jwt("CD5678", clock.now)),),
        "store_token_batch": ([USER],),
        "revoke_token": ("CD5678",),
        "backup": (tmp_path / "copy.db",),
        "get_connection": (lambda _: threading.get_ident(),),
        "get_tokens_by_timeframe": (clock.now - timedelta(days=1), clock.now),
        "get_storage_status": (),
    }
    with_a_user = ("get_valid_token", "get_token_history", "get_user_statistics", "get_audit_trail")
    arguments |= dict.fromkeys((*with_a_user, "get_user_dashboard"), (USER,))

    async def main() -> None:
        tokens = AsyncTokenStorage(store)
        results: dict[str, Any] = {}

        async def call(name: str, *given: Any, **options: Any) -> Any:
            called.add(name)
            results[name] = await getattr(tokens, name)(*given, **options)
            return results[name]

        with drivers_seen_here() as seen:
            first = await call("get_or_create_token", USER)
            upstox.kill_token(USER)
            renewed = await call("renew_token", USER, first["token"])
            assert upstox.is_living(renewed["token"])
            assert upstox.is_living((await call("store_token"))["token"])
            await call("store_token_batch", [USER], progress=False, pace=AT_ONCE)
            for name in sorted(names - called - {"close", "log_out"}):
                await call(name, *arguments.get(name, ()))
            assert await call("log_out", USER)
            await call("close")
        assert seen == set()
        assert results["get_user_statistics"]["total_tokens"] == 3
        assert results["get_valid_token"]["user_id"] == USER
        assert results.get("get_connection") != threading.get_ident()
        with pytest.raises(StoreUnavailable):
            await tokens.get_valid_token(USER)
        with pytest.raises(AttributeError, match=f"{kind.__name__} has no method 'get_tokens'"):
            getattr(tokens, "get_tokens")  # noqa: B009  # mypy refuses the name
        with pytest.raises(AttributeError):
            _ = tokens.login  # type: ignore[attr-defined]

    run(backend, main)
    assert called == names
    with drivers_seen_here() as seen:
        held(open_each())
    assert seen, "without the threads, a driver would have been seen"


def public_methods(kind: type[TokenStorage]) -> set[str]:
    """Return the names of all public methods but `watch`, which is iterated over and not awaited."""
    names = {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
    return names - {"watch"}


def test_a_cancelled_call_finishes_the_login_that_has_begun(open_each: Open, upstox: LocalUpstox) -> None:
    store = open_each()
    tokens = AsyncTokenStorage(store)
    cancelled: list[bool] = []
    for number, (backend, cancel) in enumerate(WAYS_TO_CANCEL):
        holding = HeldLogin(upstox)

        async def log_in() -> None:
            try:
                await tokens.store_token()
            except anyio.get_cancelled_exc_class():
                cancelled.append(True)
                raise

        async def main(holding: HeldLogin = holding, cancel: Any = cancel) -> None:
            await cancel(log_in, holding.go_soon)
            assert upstox.is_living(str(held(store))), "the token is stored when the cancelled call has ended"
            assert free(store)

        run(backend, main)
        assert upstox.logins() == len(cancelled) == number + 1


def test_a_login_that_hangs_takes_no_thread_from_the_reads(open_each: Open, upstox: LocalUpstox) -> None:
    made = {user_id: upstox.add_account(user_id).credentials() for user_id in [USER, *IDS]}
    store = open_each(login=Accounts(made, base_domain=upstox.base_domain))
    store.store_token(USER)
    holding = HeldLogin(upstox)

    async def main() -> None:
        tokens = AsyncTokenStorage(store, threads=1, login_threads=2)
        async with anyio.create_task_group() as tasks:
            for user_id in IDS * 5:
                tasks.start_soon(tokens.get_or_create_token, user_id)
            await holding.arrived()
            with anyio.fail_after(10):
                assert (await tokens.get_or_create_token(USER))["user_id"] == USER
                assert await tokens.get_valid_token(USER)
                assert await tokens.get_audit_trail(USER)
            assert upstox.logins() <= 3
            holding.go()

    run("asyncio", main)
    assert [upstox.logins(user_id) for user_id in IDS] == [1] * len(IDS)


# Independent of the database


@pytest.mark.parametrize(("backend", "cancel"), WAYS_TO_CANCEL)
def test_a_token_that_cannot_be_stored_is_in_the_error_of_a_cancelled_call(
    open_sqlite: Open, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch, backend: str, cancel: Any
) -> None:
    store = open_sqlite()
    holding = HeldLogin(upstox)
    caught: list[TokenNotStored] = []

    async def log_in() -> None:
        try:
            await AsyncTokenStorage(store).store_token()
        except TokenNotStored as error:
            caught.append(error)

    async def break_the_disk() -> None:
        await holding.arrived()

        def full(*_: object, **__: object) -> None:
            raise StoreUnavailable("The disk is full.")

        monkeypatch.setattr(store.backend, "insert", full)
        threading.Timer(0.1, holding.go).start()

    run(backend, partial(cancel, log_in, break_the_disk))
    (error,) = caught
    assert upstox.is_living(error.token.reveal())
    assert error.token.reveal() not in shown_with_locals(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_loses_no_token_and_a_second_one_does_not_either(
    open_sqlite: Open, upstox: LocalUpstox, backend: str
) -> None:
    store = open_sqlite()

    def press_it_twice(step: int, what: str) -> None:
        for _ in range(2 if (step, what) == (6, "answer") else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    upstox.on_step = press_it_twice
    with pytest.raises(KeyboardInterrupt):
        run(backend, AsyncTokenStorage(store).store_token)
    assert upstox.is_living(str(held(store)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_only_waits_for_anothers_login_leaves_at_once(open_sqlite: Open, upstox: LocalUpstox, backend: str) -> None:
    tokens = AsyncTokenStorage(open_sqlite())
    holding = HeldLogin(upstox)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tokens.get_or_create_token, USER)
            await holding.arrived()
            for waits in (tokens.get_or_create_token, tokens.store_token, tokens.log_out):
                with anyio.move_on_after(0.05) as scope:
                    await waits(USER)
                assert scope.cancelled_caught
            assert upstox.logins() == 1
            holding.go()

    run(backend, main)
    assert upstox.logins() == upstox.attempts() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cancelled_batch_begins_no_other_login(open_sqlite: Open, upstox: LocalUpstox, backend: str) -> None:
    made = {user_id: upstox.add_account(user_id).credentials() for user_id in IDS}
    store = open_sqlite(login=Accounts(made, base_domain=upstox.base_domain))

    async def main() -> None:
        pace = Pace([(1, 60.0)])  # The second account would have to wait for a minute.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(AsyncTokenStorage(store).store_token_batch, IDS, progress=False, pace=pace))
            while held(store, IDS[0]) is None:
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

    begun = time.monotonic()
    run(backend, main)
    assert time.monotonic() - begun < 30
    assert (upstox.logins(), held(store, IDS[1])) == (1, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_threads_run_than_were_asked_for(open_sqlite: Open, backend: str) -> None:
    store = open_sqlite()
    most, running, lock = 0, 0, threading.Lock()

    def count(_: TokenStorage) -> int:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        return threading.get_ident()

    async def main() -> None:
        tokens = AsyncTokenStorage(store, threads=3)
        assert threading.get_ident() not in await at_once(20, partial(tokens.run, count))
        async with anyio.create_task_group() as tasks:  # A cancelled call keeps its place until it has ended.
            for _ in range(20):
                tasks.start_soon(tokens.run, count)
            await anyio.sleep(0.007)
            tasks.cancel_scope.cancel()
        await at_once(20, partial(tokens.run, count))

    run(backend, main)
    assert (most, running) == (3, 0)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(InvalidInput, match="whole numbers"):
            AsyncTokenStorage(store, threads=wrong)  # type: ignore[arg-type]


def test_one_object_serves_several_event_loops_one_after_another_and_at_once(
    open_sqlite: Open, upstox: LocalUpstox
) -> None:
    tokens = AsyncTokenStorage(open_sqlite())

    async def main() -> None:
        await at_once(50, partial(tokens.get_or_create_token, USER))

    for backend in BACKENDS * 2:
        run(backend, main)
    threads = [threading.Thread(target=run, args=(backend, main)) for backend in BACKENDS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert upstox.logins() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_is_in_a_traceback(open_sqlite: Open, backend: str, clock: Clock) -> None:
    tokens = AsyncTokenStorage(open_sqlite(login=lambda _: token_data("ZZ9999")))
    refused, dead = jwt(USER, clock.now), jwt(USER, clock.now - timedelta(days=2))

    async def main() -> list[BaseException]:
        errors: list[BaseException] = []
        for call in (partial(tokens.renew_token, "-", refused), partial(tokens.save_token, response(USER, dead))):
            try:
                await call()
            except InvalidInput as error:
                errors.append(error)
        return errors

    errors = run(backend, main)
    assert len(errors) == 2
    shown = "".join(map(shown_with_locals, errors))
    assert refused[-20:] not in shown
    assert dead[-20:] not in shown


# The watch


class Watched(SQLiteUpstoxStorage):
    """Remembers its watches."""

    made: list[Watch]

    def watch(self, user_id: str) -> Watch:
        self.made = [*getattr(self, "made", []), super().watch(user_id)]
        return self.made[-1]


@pytest.fixture
def watched(tmp_path: Path, clock: Clock) -> Iterator[Watched]:
    def login(user_id: str | None) -> Any:
        return token_data(user_id or USER, jwt(USER, clock.now))

    with Watched(tmp_path / "upstox.db", keys=KEY, clock=clock, login=login) as store:
        yield store


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_watch_gives_each_token_and_ends_when_it_is_closed(watched: Watched, backend: str) -> None:
    tokens = AsyncTokenStorage(watched, threads=1, watches=1)
    seen: list[TokenResult | None] = []

    async def main() -> None:
        async with anyio.create_task_group() as tasks, tokens.watch(USER) as changes:
            async for token in changes:
                seen.append(token)
                if len(seen) == 1:
                    stored = await tokens.store_token(USER)
                elif len(seen) == 2:
                    with pytest.raises(StoreUnavailable, match="1 watches are running"):
                        await anext(tokens.watch(USER))
                    await tokens.revoke_token(USER)
                else:
                    tasks.start_soon(changes.close)
            assert [token and token["token"] for token in seen] == [None, stored["token"], None]
        with anyio.CancelScope() as scope:
            async for _ in (second := tokens.watch(USER)):
                scope.deadline = anyio.current_time() + 0.05
        assert scope.cancelled_caught
        assert next(watched.made[1], "the end") == "the end", "a cancelled wait ends the watch"
        assert [token async for token in second] == []
        async for _ in tokens.watch(USER):
            break
        found: list[TokenResult | None] = []
        with anyio.fail_after(10):  # Its thread may hold on to it for a moment.
            while not found:
                with suppress(StoreUnavailable):
                    found.append(await anext(tokens.watch(USER)))
                await anyio.sleep(0.01)
        assert found == [None], "a watch that nobody has any more is not counted"

    run(backend, main)


# What type checkers see


async def types(
    sqlite: AsyncTokenStorage[SQLiteUpstoxStorage],
    pooled: AsyncTokenStorage[PooledUpstoxStorage],
    postgresql: AsyncTokenStorage[PostgreSQLUpstoxStorage],
    mongodb: AsyncTokenStorage[MongoUpstoxStorage],
    hybrid: AsyncTokenStorage[HybridUpstoxStorage],
    now: datetime,
) -> None:
    """Never run: `make check` fails here if a signature is lost, or if a store gets another store's method."""
    assert_type(AsyncTokenStorage(pooled.store), AsyncTokenStorage[PooledUpstoxStorage])
    assert_type(await mongodb.get_valid_token(USER), TokenResult | None)
    assert_type(await hybrid.get_or_create_token(), TokenResult)
    assert_type(await sqlite.get_audit_trail(USER, limit=3), list[dict[str, Any]])
    assert_type(await pooled.backup("copy.db"), None)
    assert_type(await pooled.pool_status(), dict[str, int])
    assert_type(await mongodb.get_user_dashboard(USER), dict[str, Any])
    assert_type(await mongodb.get_tokens_by_timeframe(now, now), list[dict[str, Any]])
    assert_type(await hybrid.fold_uses(), int)
    assert_type(await hybrid.init_postgres(), None)
    assert_type(await pooled.run(PooledUpstoxStorage.pool_status), dict[str, int])

    def work(conn: sqlite3.Connection) -> int:
        return conn.total_changes

    def other_work(conn: connection) -> int:
        return conn.status

    assert_type(await pooled.get_connection(work), int)
    assert_type(await postgresql.get_connection(other_work), int)
    assert_type(await hybrid.get_connection(other_work), int)
    await sqlite.get_valid_token(7)  # type: ignore[arg-type]
    await sqlite.get_valid_tokens(USER)  # type: ignore[attr-defined]
    await sqlite.pool_status()  # type: ignore[misc]
    await mongodb.get_connection(work)  # type: ignore[misc]


def test_type_checkers_are_told_of_every_method() -> None:
    declared = inspect.getsource(AsyncTokenStorage)
    for name in set().union(*map(public_methods, STORES)):
        assert f"    {name} = _awaitable(" in declared or f"def {name}" in declared, name
