"""Batches of logins on every store: each account is independent, and the pace is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    Accounts,
    InvalidInput,
    KeyRing,
    LoginLimited,
    LoginRefused,
    Pace,
    PooledUpstoxStorage,
    SdkLogin,
    Secret,
    TokenNotStored,
    TokenStorage,
)
from upstox_db_examples.core.batch import LIMITS
from upstox_db_examples.core.errors import StoreUnavailable
from upstox_db_examples.local.upstox import LocalUpstox

from ..support import processes
from ..support.clocks import AT_ONCE, Clock, FakeTime
from ..support.processes import KEY, Address, token_data, wait_until
from ..support.project import ROOT

IDS = [f"CD{number:04}" for number in range(100)]


@pytest.fixture
def address(each_address: Address) -> Address:
    return each_address


@pytest.fixture
def accounts(upstox: LocalUpstox) -> Accounts:
    return made_accounts(upstox, IDS)


@pytest.fixture
def store(tmp_path: Path, accounts: Accounts, clock: Clock) -> Iterator[TokenStorage]:
    with PooledUpstoxStorage(tmp_path / "upstox.db", login=accounts, keys=KEY, clock=clock) as store:
        yield store


def made_accounts(upstox: LocalUpstox, user_ids: list[str], **wrong: str) -> Accounts:
    """Create these accounts at this Upstox. An account in `wrong`, given as `user_id=PIN`, gets that wrong PIN."""
    credentials = {user_id: upstox.add_account(user_id).credentials() for user_id in user_ids}
    for user_id, pin in wrong.items():
        credentials[user_id]["pin_code"] = pin
    return Accounts(credentials, base_domain=upstox.base_domain)


def batch(store: TokenStorage, user_ids: list[str], **options: Any) -> list[Any]:
    return list(store.store_token_batch(user_ids, **{"progress": False, "pace": AT_ONCE, **options}))


# Every store


def test_a_hundred_accounts_are_a_hundred_logins_and_again_none(
    address: Address, accounts: Accounts, upstox: LocalUpstox, clock: Clock
) -> None:
    with address.open(login=accounts, clock=clock) as store:
        results = batch(store, IDS)
        assert [result["user_id"] for result in results] == IDS
        assert {(result["success"], result["kept"]) for result in results} == {(True, False)}
        assert upstox.logins() == 100
        tokens = {user_id: store.get_valid_token(user_id) for user_id in IDS}
        assert all(token and upstox.is_living(token["token"]) for token in tokens.values())
        again = batch(store, IDS)
        assert {(result["success"], result["kept"]) for result in again} == {(True, True)}
        assert [result["token_id"] for result in again] == [result["token_id"] for result in results]
        assert upstox.logins() == upstox.attempts() == 100


def test_readers_are_answered_while_a_batch_writes(
    address: Address, accounts: Accounts, upstox: LocalUpstox, clock: Clock
) -> None:
    done = threading.Event()

    def read_on_and_on(store: TokenStorage) -> int:
        reads = 0
        # 32 threads without a pause would never let the batch run.
        while not done.wait(0.05):
            assert store.get_valid_token(IDS[reads % 5])
            reads += 1
        return reads

    with address.open(login=accounts, clock=clock) as store, ThreadPoolExecutor(32) as threads:
        batch(store, IDS[:5])
        reading = [threads.submit(read_on_and_on, store) for _ in range(32)]
        try:
            results = batch(store, IDS[:40])
        finally:
            done.set()
        assert all(reader.result() >= 5 for reader in reading), "every reader must get its turns, without an error"
    assert all(result["success"] for result in results)
    assert upstox.logins() == 40


def test_a_batch_that_was_killed_goes_on_where_it_was(
    address: Address, accounts: Accounts, upstox: LocalUpstox
) -> None:
    now = datetime.now(UTC)  # the real time, as in the other process
    upstox.clock = lambda: now
    credentials = {user_id: upstox.add_account(user_id).credentials() for user_id in IDS[:40]}
    process, _ = processes.start(processes.store_batch, address, upstox.base_domain, credentials)
    wait_until(lambda: upstox.logins() >= 15)
    processes.kill(process)
    before = upstox.logins()
    assert 15 <= before < 40
    with address.open(login=accounts) as store:
        results = batch(store, IDS[:40])
        kept = sum(result["kept"] for result in results)
        assert all(result["success"] for result in results)
        assert before - 1 <= kept <= before, "every login is kept except the one during which it was killed"
        assert upstox.logins() == before + 40 - kept


# Errors of one account


def test_a_wrong_pin_in_the_middle_stops_nobody_and_is_tried_once(
    tmp_path: Path, upstox: LocalUpstox, clock: Clock
) -> None:
    accounts = made_accounts(upstox, IDS[:5], CD0002="0000")
    with PooledUpstoxStorage(tmp_path / "upstox.db", login=accounts, keys=KEY, clock=clock) as store:
        results = batch(store, IDS[:5])
        assert [result["success"] for result in results] == [True, True, False, True, True]
        failed = results[2]
        assert set(failed) == {"user_id", "success", "error", "error_type"}
        assert failed["error_type"] == "LoginRefused"
        assert "PIN is wrong" in failed["error"]
        assert isinstance(failed.exception, LoginRefused)
        assert (upstox.attempts(IDS[2]), upstox.logins()) == (1, 4)
        again = batch(store, IDS[:5])
        assert (upstox.attempts(IDS[2]), upstox.logins()) == (1, 4), "the store remembers the refusal"
        batch(store, IDS[2:3], replace=True)
        assert upstox.attempts(IDS[2]) == 1, "even a batch that replaces all tokens respects the refusal"
        assert [result["success"] for result in again] == [True, True, False, True, True]


def test_unknown_and_impossible_accounts_are_results_too(store: TokenStorage, upstox: LocalUpstox) -> None:
    results = batch(store, ["XX0001", "not a user id", IDS[0]])
    assert [result.get("error_type") for result in results] == ["LoginRefused", "InvalidInput", None]
    assert upstox.attempts() == 1


@pytest.mark.parametrize("odd", ["AB1234", b"AB1234", [None], [["AB1234"]]])
def test_what_is_no_list_of_user_ids_is_refused(store: TokenStorage, odd: Any) -> None:
    with pytest.raises(InvalidInput, match="user_ids"):
        store.store_token_batch(odd)


def test_an_empty_batch_is_none(store: TokenStorage) -> None:
    assert store.store_token_batch([]) == []


def test_a_user_that_is_named_twice_is_logged_in_once(store: TokenStorage, upstox: LocalUpstox) -> None:
    given = [IDS[1], IDS[0], IDS[1], IDS[1]]
    results = batch(store, given)
    assert [result["user_id"] for result in results] == given
    assert upstox.logins() == 2
    assert batch(store, given, replace=True)[0]["kept"] is False
    assert upstox.logins() == 4


def test_living_tokens_are_replaced_where_that_is_asked(store: TokenStorage, upstox: LocalUpstox) -> None:
    first, second = batch(store, IDS[:3]), batch(store, IDS[:3], replace=True)
    assert not {result["token_id"] for result in first} & {result["token_id"] for result in second}
    assert upstox.logins() == 6


def test_one_accounts_credentials_are_not_tried_on_the_others(
    tmp_path: Path, upstox: LocalUpstox, clock: Clock
) -> None:
    credentials = upstox.add_account(IDS[0]).credentials()
    login = SdkLogin(credentials, base_domain=upstox.base_domain)
    with PooledUpstoxStorage(tmp_path / "upstox.db", login=login, keys=KEY, clock=clock) as store:
        results = batch(store, IDS[:3])
        assert all("use Accounts" in result["error"] for result in results)
        assert upstox.attempts() == 0
        store.store_token()
        results = batch(store, IDS[:3])
        assert [result["success"] for result in results] == [True, False, False]
        assert "Use Accounts" in results[1]["error"]
        assert upstox.attempts() == 1


def test_no_result_shows_a_secret(tmp_path: Path, clock: Clock) -> None:
    def login(user_id: str | None) -> AccessTokenData:
        if user_id == IDS[1]:
            raise ConnectionError("the password was hunter2")
        return token_data(user_id or "")

    with PooledUpstoxStorage(tmp_path / "upstox.db", login=login, keys=KEY, clock=clock) as store:
        results = batch(store, IDS[:2])
    assert "eyJ" not in repr(results)
    assert "hunter2" not in repr(results)
    assert results[1]["error_type"] == "ConnectionError"
    assert isinstance(results[1].exception, ConnectionError)


def test_a_token_that_could_not_be_stored_is_not_lost(
    store: TokenStorage, monkeypatch: pytest.MonkeyPatch, upstox: LocalUpstox
) -> None:
    real = type(store.backend).insert

    def refuse_one(self: Any, token: Any, *more: Any) -> Any:
        if token.user_id == IDS[1]:
            raise StoreUnavailable("the disk is full")
        return real(self, token, *more)

    monkeypatch.setattr(type(store.backend), "insert", refuse_one)
    results = batch(store, IDS[:3])
    assert [result["success"] for result in results] == [True, False, True]
    assert isinstance(results[1].exception, TokenNotStored)
    assert upstox.is_living(results[1].exception.token.reveal())
    assert "eyJ" not in repr(results)


# Limits


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


# The progress bar, and Ctrl-C


def test_a_bar_is_shown_unless_it_is_not_wanted(store: TokenStorage, capsys: pytest.CaptureFixture[str]) -> None:
    batch(store, IDS[:3], progress=True)
    assert "3/3" in capsys.readouterr().err
    batch(store, IDS[:3])
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_there_is_simply_no_bar(
    store: TokenStorage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert all(result["success"] for result in batch(store, IDS[:3], progress=True))
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_keeps_what_was_done_and_leaves_no_lock(tmp_path: Path, upstox: LocalUpstox) -> None:
    now = datetime.now(UTC)
    upstox.clock = lambda: now
    upstox.login_seconds = 0.3
    accounts = made_accounts(upstox, IDS[:30])
    code = (
        # A shell that runs the tests in the background leaves SIGINT ignored in all its child processes.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from upstox_db_examples import *; from tests.support.clocks import AT_ONCE\n"
        f"login = Accounts({ {user_id: upstox.add_account(user_id).credentials() for user_id in IDS[:30]} }, "
        f"base_domain={upstox.base_domain!r})\n"
        f"with PooledUpstoxStorage({str(tmp_path / 'upstox.db')!r}, login=login) as store:\n"
        f"    store.store_token_batch({IDS[:30]}, pace=AT_ONCE)"
    )
    interrupted = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: upstox.logins() >= 5)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=10)
    assert "KeyboardInterrupt" in said
    before = upstox.logins()
    assert 5 <= before < 30
    with PooledUpstoxStorage(tmp_path / "upstox.db", login=accounts, login_wait=1) as store:
        results = batch(store, IDS[:30])
        assert all(result["success"] for result in results)
        assert before - 1 <= sum(result["kept"] for result in results) <= before
        with store.get_connection() as conn:
            assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
