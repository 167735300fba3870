"""The recipes without a web server: the daily login, Upstox's SDK, a bot and a collector."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import anyio
import pytest
import redis
import upstox_client
from apscheduler.events import EVENT_JOB_EXECUTED
from apscheduler.schedulers.background import BackgroundScheduler
from prometheus_client import CollectorRegistry, generate_latest
from upstox_client.rest import ApiException

from recipes.apscheduler_job import add_daily_login
from recipes.bot import Refused, run_bot
from recipes.playground import USER, Playground
from recipes.prometheus_collector import TokenCollector
from recipes.upstox_sdk import StoredTokenClient
from upstox_db_examples import (
    AsyncTokenStorage,
    LoginRefused,
    SdkLogin,
    SQLiteUpstoxStorage,
    TokenResult,
    TokenStorage,
)
from upstox_db_examples.local.playground import Playground as LocalPlayground
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.processes import wait_until

INDIA = ZoneInfo("Asia/Kolkata")
FRIDAY = datetime(2026, 1, 9, 9, 0, tzinfo=INDIA)
MONDAY = datetime(2026, 1, 12, 8, 45, tzinfo=INDIA)


def test_upstoxs_sdk_survives_a_401_in_the_middle_of_the_day(here: Playground, store: TokenStorage) -> None:
    client = StoredTokenClient(store, USER, here.api)
    user = upstox_client.UserApi(client)
    assert user.get_profile("2.0").data.user_id == USER
    here.upstox.kill_token(USER)
    assert user.get_profile("2.0").data.user_id == USER
    assert here.upstox.logins() == 2
    assert user.get_profile("2.0").data.user_id == USER
    assert here.upstox.logins() == 2


def test_upstoxs_sdk_renews_and_does_not_repeat_an_order(here: Playground, store: TokenStorage) -> None:
    client = StoredTokenClient(store, USER, here.api)
    orders = upstox_client.OrderApiV3(client)
    body = upstox_client.PlaceOrderV3Request(
        quantity=1,
        product="D",
        validity="DAY",
        price=0,
        instrument_token="NSE_EQ|INE848E01016",
        order_type="MARKET",
        transaction_type="BUY",
        disclosed_quantity=0,
        trigger_price=0,
        is_amo=False,
    )
    here.upstox.kill_token(USER)
    with pytest.raises(ApiException) as caught:
        orders.place_order(body)
    assert caught.value.status == 401
    assert (here.upstox.logins(), here.upstox.orders(USER)) == (2, 0)
    orders.place_order(body)
    assert (here.upstox.logins(), here.upstox.orders(USER)) == (2, 1)


def test_upstoxs_sdk_sends_the_first_order_of_the_next_day_with_its_token() -> None:
    with LocalPlayground() as day:
        store = day.keep(SQLiteUpstoxStorage(day.folder / "upstox.db", clock=day.clock))
        client = StoredTokenClient(store, USER, day.upstox.base_domain.format(stage="api"))
        order = {"body": {}, "response_type": "object", "auth_settings": ["OAUTH2"]}
        assert client.call_api("/v3/order/place", "POST", **order)
        day.set_time("2026-01-07 08:45")
        store.get_or_create_token(USER)  # The morning's login, by another program.
        assert client.call_api("/v3/order/place", "POST", **order)
        day.set_time("2026-01-08 03:29:30")  # In its last half minute, a new token would live no longer.
        assert client.call_api("/v3/order/place", "POST", **order)
        assert day.upstox.logins() == 2


def test_apscheduler_logs_in_at_a_quarter_to_nine_in_india(here: Playground, store: TokenStorage) -> None:
    results: list[Any] = []
    scheduler = BackgroundScheduler()
    scheduler.add_listener(lambda event: results.append(event.retval), EVENT_JOB_EXECUTED)
    scheduler.start()
    try:
        job = add_daily_login(scheduler, store, USER)
        assert job.trigger.get_next_fire_time(None, FRIDAY) == MONDAY
        for count in (1, 2):
            job.modify(next_run_time=datetime.now(INDIA))
            wait_until(lambda count=count: len(results) == count)  # type: ignore[misc]
    finally:
        scheduler.shutdown()
    assert results == [USER, USER], "not the token"
    assert here.upstox.logins() == 1


@pytest.fixture
def broker(here: Playground, redis_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:  # noqa: ARG001
    monkeypatch.setenv("CELERY_BROKER_URL", redis_server)
    with redis.Redis.from_url(redis_server) as client:
        client.flushdb()
        yield client
        client.flushdb()


def test_celery_logs_in_and_no_token_reaches_the_broker(
    here: Playground, store: TokenStorage, broker: redis.Redis
) -> None:
    module = importlib.import_module("recipes.celery_app")
    (entry,) = module.app.conf.beat_schedule.values()
    schedule = entry["schedule"]
    schedule.nowfun = lambda: FRIDAY
    start, left, _ = schedule.remaining_delta(FRIDAY)
    assert (start + left).astimezone(INDIA) == MONDAY
    seen: set[bytes] = set()
    queued = [module.log_in.delay(*entry["args"]) for _ in range(3)]
    seen.update(content(broker))
    here.start("celery", "--app", "recipes.celery_app", "worker", "--pool", "prefork", "--concurrency", "2")
    assert [each.get(timeout=60) for each in queued] == [USER] * 3
    seen.update(content(broker))
    assert here.upstox.logins() == 1
    result = store.get_valid_token(USER)
    assert result is not None
    assert any(USER.encode() in each for each in seen)
    assert not any(result["token"][8:24].encode() in each for each in seen)
    assert result["token"][8:24] not in here.printed()
    module.app.close()


@pytest.mark.usefixtures("broker")
def test_celery_does_not_repeat_a_refused_login(here: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("recipes.celery_app")
    monkeypatch.setenv("UPSTOX_PIN_CODE", "000000")
    try:
        result = module.log_in.apply(args=[USER])
    finally:
        module.store().close()
        module.store.cache_clear()
    assert isinstance(result.result, LoginRefused)
    assert here.upstox.attempts() == 1


def content(broker: redis.Redis) -> set[bytes]:
    return {broker.dump(key) or b"" for key in broker.keys("*")}


def test_a_bot_reconnects_when_anybody_logs_in_and_renews_what_upstox_refuses(
    here: Playground, store: TokenStorage
) -> None:
    connections: list[str] = []
    ended: list[str] = []

    async def connect(token: TokenResult) -> None:
        connections.append(token["token"])
        try:
            while here.upstox.is_living(token["token"]):
                await anyio.sleep(0.01)
            if len(connections) == 2:
                raise Refused
            await anyio.sleep_forever()
        finally:
            ended.append(token["token"])

    async def until(count: int) -> None:
        with anyio.fail_after(20):
            while len(connections) < count:
                await anyio.sleep(0.01)

    async def main() -> None:
        tokens = AsyncTokenStorage(store)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_bot, tokens, USER, connect)
            await until(1)
            await tokens.store_token(USER)  # Somebody else logs in.
            await until(2)
            here.upstox.kill_token(USER)  # Nobody tells the store.
            await until(3)
            await tokens.revoke_token(USER)
            with anyio.fail_after(20):
                while len(ended) < 3:
                    await anyio.sleep(0.01)
            await tokens.store_token(USER)
            await until(4)
            tasks.cancel_scope.cancel()

    anyio.run(main)
    assert here.upstox.logins() == 4
    assert len(set(connections)) == 4
    assert ended == connections, "no connection is left, and none is there twice"


def test_the_collector_counts_logins_and_refusals(here: Playground, store: TokenStorage) -> None:
    registry = CollectorRegistry()
    registry.register(TokenCollector(store, [USER]))
    assert 'upstox_token_seconds_to_live{user="AB1234"} 0.0' in generate_latest(registry).decode()
    token = store.store_token(USER)["token"]
    store.store_token(USER)
    wrong = {**LocalUpstox().add_account(USER).credentials(), "pin_code": "000000"}
    store.login = SdkLogin(wrong, base_domain=here.upstox.base_domain)
    with pytest.raises(LoginRefused):
        store.store_token(USER)
    text = generate_latest(registry).decode()
    assert 'upstox_logins_total{user="AB1234"} 2.0' in text
    assert '# TYPE upstox_refusals gauge\nupstox_refusals{user="AB1234"} 1.0' in text
    (left,) = [line.split()[1] for line in text.splitlines() if line.startswith("upstox_token_seconds_to_live{")]
    assert 0 < float(left) <= 86_400
    assert token[8:24] not in text


def test_the_count_of_logins_does_not_fall_when_reads_fill_the_audit_trail(here: Playground) -> None:
    registry = CollectorRegistry()
    with SQLiteUpstoxStorage(here.folder / "read.db", audit_reads=True) as store:
        registry.register(TokenCollector(store, [USER]))
        store.store_token(USER)
        for _ in range(1000):
            store.get_valid_token(USER)
        assert {entry["action"] for entry in store.get_audit_trail(USER, limit=1000)} == {"used"}
        assert 'upstox_logins_total{user="AB1234"} 1.0' in generate_latest(registry).decode()
