"""Batches of logins on every store: each account is independent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    Accounts,
    InvalidInput,
    LoginRefused,
    PooledUpstoxStorage,
    SdkLogin,
    TokenNotStored,
    TokenStorage,
)
from upstox_db_examples.core.errors import StoreUnavailable
from upstox_db_examples.local.upstox import LocalUpstox

from ..support import processes
from ..support.batches import IDS, batch, made_accounts
from ..support.clocks import Clock
from ..support.processes import KEY, Address, token_data, wait_until
from ..support.project import ROOT


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
