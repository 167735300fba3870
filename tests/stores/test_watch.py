"""Watches across processes and forks on every store, and how each database tells that there is something new."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from upstox_db_examples import (
    ConfigurationError,
    HybridUpstoxStorage,
    MongoUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
    TokenStorage,
)
from upstox_db_examples.core import listener, watch
from upstox_db_examples.local.servers import RedisServer
from upstox_db_examples.postgresql import queries

from ..support import processes
from ..support.databases import MongoDatabase
from ..support.mongodb import RUNTIME_1, another_user
from ..support.poolers import SmallPooler
from ..support.postgresql import as_role, bare, count_messages
from ..support.processes import KEY, USER, Address, made_up_login, response, wait_until
from ..support.stores import opening
from ..support.watching import following, lookouts, store_when_told, watch_and_fork

LISTENING = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%LISTEN upstox_tokens;%'
"""
OPTIONS: dict[str, Any] = {"keys": KEY, "login": made_up_login}


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "POLL", 1000)


class TestOnEachStore:
    def test_what_another_process_stores_is_seen(self, each_address: Address) -> None:
        process, connection = processes.start(store_when_told, each_address)
        try:
            assert connection.recv() == "ready"
            with each_address.open() as store, following(store) as followed:
                assert followed.token() is None
                for _ in range(3):
                    connection.send("go")
                    assert followed.token() == connection.recv()
        finally:
            processes.kill(process)

    def test_an_inherited_watch_ends_in_the_child_and_goes_on_in_the_parent(self, each_address: Address) -> None:
        process, connection = processes.start(watch_and_fork, each_address)
        try:
            assert connection.poll(60), "it hangs"
            assert connection.recv() == (["right"] * 3, [True] * 4)
        finally:
            processes.kill(process)

    def test_a_watch_that_nobody_uses_any_more_ends_by_itself(
        self, each_address: Address, opened: Callable[..., TokenStorage]
    ) -> None:
        store = opened(each_address, keys=KEY)
        one, other = store.watch(USER), store.watch("CD5678")
        assert next(one) is next(other) is None
        (thread,) = lookouts()
        del one
        gc.collect()
        assert lookouts() == [thread]
        del other
        gc.collect()
        wait_until(lambda: not lookouts())
        assert next(store.watch(USER)) is None


@pytest.mark.usefixtures("no_polling")
class TestPostgreSQL:
    def test_fifty_watches_hold_one_connection_and_cost_a_read_and_a_store_no_message(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opening(PostgreSQLUpstoxStorage, **OPTIONS) as open_one, ExitStack() as stack:
            store, another = open_one(postgres_url), open_one(postgres_url)
            messages = count_messages(monkeypatch)

            def sent(call: Callable[[str], object]) -> int:
                for _ in range(2):  # The first time, statements are prepared.
                    messages.clear()
                    call("CD5678")
                return len([message for message in messages if message != queries.STATES])

            unwatched = [sent(call) for call in (another.store_token, another.get_valid_token)]
            all_followed = [stack.enter_context(following(store, f"AB{number:04}")) for number in range(50)]
            assert {followed.token() for followed in all_followed} == {None}
            wait_until(lambda: len(bare(postgres_url, LISTENING)) == 1)
            token = another.store_token("AB0049")["token"]
            assert all_followed[-1].token() == token
            assert [sent(call) for call in (another.store_token, another.get_valid_token)] == unwatched
            messages.clear()
            another.store_token("CD5678")
            wait_until(lambda: queries.STATES in messages)
            assert messages.count(queries.STATES) < 5, (
                "one question for all watches, and perhaps one for an earlier store"
            )
            assert len(bare(postgres_url, LISTENING)) == 1

    def test_a_program_that_does_not_tell_is_noticed_all_the_same(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch, "LOOK_ANYWAY", 0.5)
        silent = queries.STORE.replace(", pg_notify('upstox_tokens', '')", "")
        assert silent != queries.STORE
        monkeypatch.setattr(queries, "STORE", silent)
        with opening(PostgreSQLUpstoxStorage, **OPTIONS) as open_one, following(open_one(postgres_url)) as followed:
            assert followed.token() is None
            token = open_one(postgres_url).store_token(USER)["token"]
            assert followed.token() == token

    def test_the_runtime_role_may_watch(self, postgres_url: str) -> None:
        role = f"runtime_{urlsplit(postgres_url).path[-12:]}"
        bare(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            with opening(PostgreSQLUpstoxStorage, **OPTIONS) as open_one:
                owner = open_one(postgres_url)
                owner.init_database(runtime_role=role)
                runtime = open_one(as_role(postgres_url, role, "secret"))
                with following(runtime) as followed:
                    assert followed.token() is None
                    for store in (owner, runtime):
                        token = store.store_token(USER)["token"]
                        assert followed.token() == token
        finally:
            bare(postgres_url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    def test_a_connection_that_ends_is_replaced(self, postgres_url: str) -> None:
        with opening(PostgreSQLUpstoxStorage, **OPTIONS) as open_one:
            another = open_one(postgres_url)
            with following(open_one(postgres_url)) as followed:
                assert followed.token() is None
                wait_until(lambda: bare(postgres_url, LISTENING))
                bare(postgres_url, f"SELECT pg_terminate_backend(pid, 5000) FROM ({LISTENING}) AS listening")
                token = another.store_token(USER)["token"]
                assert followed.token() == token
                wait_until(lambda: bare(postgres_url, LISTENING))

    @pytest.mark.parametrize(
        ("mode", "invents_ids"), [("session", True), ("transaction", True), ("transaction", False)]
    )
    def test_behind_a_pooler_it_listens_only_if_notifications_arrive(
        self, postgres_url: str, mode: str, invents_ids: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if mode == "transaction":
            monkeypatch.setattr(listener, "POLL", 0.5)
        with SmallPooler(postgres_url, mode, 3, invents_ids=invents_ids) as pooler:
            parts = urlsplit(postgres_url)
            netloc = f"{parts.username}:{parts.password}@127.0.0.1:{pooler.port}"
            with opening(PostgreSQLUpstoxStorage, **OPTIONS) as open_one:
                store, another = (open_one(urlunsplit(parts._replace(netloc=netloc))) for _ in range(2))
                with following(store) as followed:
                    assert followed.token() is None
                    for _ in range(2):
                        token = another.store_token(USER)["token"]
                        assert followed.token() == token
                    assert len(bare(postgres_url, LISTENING)) == (1 if mode == "session" else 0)


class TestHybrid:
    @pytest.mark.usefixtures("own_servers", "no_polling")
    def test_a_copy_that_is_behind_is_not_taken_for_the_new_token_and_redis_may_be_down(
        self, postgres_url: str, redis_prefix: str
    ) -> None:
        with RedisServer() as redis, opening(HybridUpstoxStorage, redis_prefix=redis_prefix, **OPTIONS) as open_one:
            store = open_one(redis.url, postgres_url, believed=1.5)
            without_redis = open_one("redis://127.0.0.1:1/0", postgres_url, believed=1.5)
            with following(store) as followed, ThreadPoolExecutor(1) as thread:
                assert followed.token() is None
                assert store.store_token(USER)["token"] == followed.token()
                saving = thread.submit(without_redis.save_token, response(USER, f"opaque-{1:060}"))
                assert followed.token() == saving.result()["token"]
                redis.kill()
                assert without_redis.save_token(response(USER, f"opaque-{2:060}"))["token"] == followed.token()


class TestMongoDB:
    def test_a_user_who_may_not_use_change_streams_polls(self, mongo: MongoDatabase) -> None:
        with opening(MongoUpstoxStorage, **OPTIONS) as open_one:
            owner = open_one(*mongo)
            runtime = open_one(*another_user(mongo, RUNTIME_1))
            with following(runtime) as followed:
                assert followed.token() is None
                token = owner.store_token(USER)["token"]
                assert followed.token() == token


class TestSQLite:
    def test_a_file_that_is_moved_is_an_error(self, path: Path) -> None:
        with SQLiteUpstoxStorage(path, **OPTIONS) as store, store.watch(USER) as watching:
            assert next(watching) is None
            path.rename(path.with_suffix(".moved"))
            with pytest.raises(ConfigurationError, match="moved or deleted"):
                next(watching)
