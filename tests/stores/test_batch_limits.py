"""The pace of a batch: it keeps to Upstox's limits, and counts the logins of other programs on the same store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from upstox_db_examples import (
    Accounts,
    KeyRing,
    LoginLimited,
    Pace,
    PooledUpstoxStorage,
    Secret,
    TokenNotStored,
    TokenStorage,
)
from upstox_db_examples.core.batch import LIMITS
from upstox_db_examples.core.errors import StoreUnavailable
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.batches import IDS, batch, made_accounts
from ..support.clocks import Clock, FakeTime
from ..support.processes import KEY, token_data


@pytest.fixture
def accounts(upstox: LocalUpstox) -> Accounts:
    return made_accounts(upstox, IDS)


@pytest.fixture
def store(tmp_path: Path, accounts: Accounts, clock: Clock) -> Iterator[TokenStorage]:
    with PooledUpstoxStorage(tmp_path / "upstox.db", login=accounts, keys=KEY, clock=clock) as store:
        yield store


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


def follow(fake: FakeTime, store: TokenStorage) -> None:
    """Move the database's clock along with this time, because it times the limits that all programs share."""
    told = store.backend.read_notes

    def notes(names: Sequence[str]) -> tuple[float, dict[str, str]]:
        now, there = told(names)
        return now + fake.now, there

    store.backend.read_notes = notes  # type: ignore[method-assign]


def test_logins_keep_to_upstoxs_limits(fake: FakeTime) -> None:
    pace, begun = fake.pace(LIMITS), []
    for user_id in (f"U{number}" for number in range(200)):
        with pace.turn(user_id):
            begun.append(fake.now)
    for count, seconds in ((1, 1), (10, 60), (60, 1800)):
        assert all(later - earlier >= seconds for earlier, later in zip(begun, begun[count:], strict=False))
    assert begun[:11] == [*range(10), 60], "the pace must not be slower than the limits"
    assert begun[60] == 1800


def test_threads_share_the_limits() -> None:
    pace, begun = Pace(limits=[(1, 0.05)]), []

    def log_in(number: int) -> None:
        with pace.turn(f"U{number}"):
            begun.append(time.monotonic())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(log_in, range(8)))
    assert max(begun) - min(begun) >= 0.05 * 7 - 0.02


def test_after_a_limit_nobody_logs_in_until_it_is_over(
    store: TokenStorage, upstox: LocalUpstox, fake: FakeTime
) -> None:
    follow(fake, store)
    upstox.fail("rate_limit")
    results = batch(store, IDS[:3], pace=fake.pace())
    assert [result["success"] for result in results] == [True] * 3
    assert upstox.logins() == 3
    assert fake.slept == [60.0], "the batch must wait once, and not for each account"


def test_a_waiting_caller_also_waits_for_a_limit_that_comes_meanwhile(fake: FakeTime) -> None:
    def sleep(seconds: float) -> None:
        fake.sleep(seconds)
        if len(fake.slept) == 1:
            with contextlib.suppress(LoginLimited):
                first.__exit__(LoginLimited, LoginLimited("Wait", retry_after=600), None)

    pace = Pace([(1, 1.0)], clock=fake.clock, sleep=sleep)
    first = pace.turn("CD0000")
    first.__enter__()
    with pace.turn("CD0001"):
        assert fake.now == 601


def test_a_short_limit_does_not_end_a_longer_one(fake: FakeTime) -> None:
    pace = fake.pace()
    with contextlib.suppress(LoginLimited), pace.turn("CD0000"):
        with contextlib.suppress(LoginLimited), pace.turn("CD0001"):
            raise LoginLimited("Wait", retry_after=600)
        raise LoginLimited("Wait", retry_after=60)
    with pace.turn("CD0002"):
        assert fake.now == 600


def test_an_account_whose_one_time_passwords_are_blocked_holds_nobody_else_up(
    store: TokenStorage, upstox: LocalUpstox, fake: FakeTime
) -> None:
    follow(fake, store)
    order: list[tuple[str, float]] = []
    accounts = store.login

    def noted(user_id: str | None) -> object:
        order.append((str(user_id), fake.now))
        return accounts(user_id)

    store.login = noted
    upstox.fail("otp_blocked")
    assert all(result["success"] for result in batch(store, IDS[:3], pace=fake.pace()))
    assert order == [(IDS[0], 0), (IDS[1], 0), (IDS[2], 0), (IDS[0], 600)]


def test_a_store_that_is_down_says_so_for_all_at_once(
    store: TokenStorage, upstox: LocalUpstox, fake: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(store.backend, "begin_login", down)
    results = batch(store, IDS, replace=True, pace=fake.pace(LIMITS))
    assert {result["error_type"] for result in results} == {"StoreUnavailable"}
    assert (upstox.attempts(), fake.slept) == (0, [])


def test_a_limit_that_stays_is_given_up(store: TokenStorage, upstox: LocalUpstox, fake: FakeTime) -> None:
    follow(fake, store)
    upstox.fail("otp_blocked", times=9)
    (result,) = batch(store, IDS[:1], pace=fake.pace())
    assert isinstance(result.exception, LoginLimited)
    assert upstox.attempts() == 3
    assert fake.slept == [600.0, 600.0]


def test_other_accounts_get_their_turn_while_one_waits_for_its_next_code(
    store: TokenStorage, upstox: LocalUpstox, fake: FakeTime
) -> None:
    order: list[str] = []
    accounts = store.login

    def noted(user_id: str | None) -> object:
        order.append(str(user_id))
        return accounts(user_id)

    store.login = noted
    upstox.fail("drop", step=5)
    results = batch(store, IDS[:3], pace=fake.pace())
    assert all(result["success"] for result in results)
    assert order == [*IDS[:3], IDS[0]]
    assert len(fake.slept) == 1
    assert 0 < fake.slept[0] <= 30, "it must wait for the next one-time password"


def test_an_account_that_may_have_a_token_is_not_logged_in_again(
    store: TokenStorage, upstox: LocalUpstox, fake: FakeTime
) -> None:
    upstox.fail("lost", step=6)
    results = batch(store, IDS[:2], pace=fake.pace())
    assert [result["success"] for result in results] == [False, True]
    assert results[0].exception.token_may_exist
    assert upstox.logins(IDS[0]) == 1
    assert batch(store, IDS[:1], pace=fake.pace())[0]["success"], "nobody has that token, so the next call logs in"


def test_the_logins_of_other_programs_count(tmp_path: Path, fake: FakeTime, clock: Clock) -> None:
    login = lambda user_id: token_data(user_id or "")  # noqa: E731
    with (
        PooledUpstoxStorage(tmp_path / "upstox.db", login=login, keys=KEY, clock=clock) as store,
        PooledUpstoxStorage(tmp_path / "upstox.db", login=login, keys=KEY, clock=clock) as other,
    ):
        for _ in range(10):
            other.backend.begin_login(
                "XX0001", "XX0001", other.backend.context.now(), {"process": "of another program"}
            )
        clock.advance(seconds=20)
        begun = fake.now

        def sleep(seconds: float) -> None:
            fake.sleep(seconds)
            clock.advance(seconds=seconds)

        pace = Pace(LIMITS, clock=fake.clock, sleep=sleep)
        assert batch(store, IDS[:1], pace=pace)[0]["success"]
        assert fake.now - begun == 40, "ten logins a minute are allowed, counting those of other programs"


def test_a_token_that_was_not_stored_counts_as_a_login(fake: FakeTime) -> None:
    pace = fake.pace([(1, 60.0)])
    with contextlib.suppress(TokenNotStored), pace.turn("CD0000"):
        raise TokenNotStored(Secret("eyJ0eXAi"), "CD0000", StoreUnavailable("the disk is full"))
    with pace.turn("CD0001"):
        assert fake.now == 60
    with contextlib.suppress(StoreUnavailable), pace.turn("CD0002"):
        raise StoreUnavailable("down")
    with pace.turn("CD0003"):
        assert fake.now == 120, "no login had begun"


def test_a_one_time_password_is_used_once(tmp_path: Path, keys: KeyRing) -> None:
    with LocalUpstox() as strict:  # like Upstox, it accepts each code only once
        accounts = made_accounts(strict, IDS[:2])
        with PooledUpstoxStorage(tmp_path / "upstox.db", login=accounts, keys=keys) as store:
            pace = Pace(limits=())
            for _ in range(2):
                results = batch(store, IDS[:2], replace=True, pace=pace)
                assert all(result["success"] for result in results)
            assert strict.attempts() == strict.logins() == 4, "no login may be refused and repeated"
