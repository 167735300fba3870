"""Batches that are interrupted: each new token is in the store or in the error. And what counts as a login."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import (
    Accounts,
    AsyncTokenStorage,
    LoginRefused,
    Pace,
    PooledUpstoxStorage,
    StorageError,
    TokenNotStored,
)
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.clocks import AT_ONCE, Clock, FakeTime
from ..support.processes import KEY

FIRST, SECOND, THIRD = IDS = ("CD0000", "CD0001", "CD0002")
REFUSE = """
CREATE TRIGGER full BEFORE INSERT ON upstox_tokens WHEN NEW.user_id IN ('CD0000', 'CD0001')
BEGIN SELECT RAISE(ABORT, 'no room'); END
"""


@pytest.fixture
def credentials(upstox: LocalUpstox) -> dict[str, dict[str, str]]:
    return {user_id: upstox.add_account(user_id).credentials() for user_id in IDS}


@pytest.fixture
def store(
    tmp_path: Path, upstox: LocalUpstox, credentials: dict[str, dict[str, str]], clock: Clock
) -> Iterator[PooledUpstoxStorage]:
    """A store whose database refuses the tokens of the first two accounts."""
    login = Accounts(credentials, base_domain=upstox.base_domain)
    with PooledUpstoxStorage(tmp_path / "upstox.db", login=login, keys=KEY, clock=clock) as store:
        with store.get_connection() as conn:
            conn.execute(REFUSE)
        yield store


def works(upstox: LocalUpstox, error: StorageError, user_id: str) -> bool:
    return error.user_id == user_id and error.token is not None and upstox.is_living(error.token.reveal())


def test_ctrl_c_during_a_wait_hands_out_the_tokens_that_are_nowhere_else(
    store: PooledUpstoxStorage, upstox: LocalUpstox
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    pace = Pace([(2, 60.0)], sleep=interrupt)
    with pytest.raises(TokenNotStored) as caught:
        store.store_token_batch(IDS, progress=False, pace=pace)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    assert works(upstox, caught.value, FIRST)
    assert [works(upstox, other, SECOND) for other in caught.value.others] == [True]
    assert upstox.logins() == 2


def test_so_does_the_cancellation_of_a_task(store: PooledUpstoxStorage, upstox: LocalUpstox) -> None:
    async def cancel() -> None:
        batch = AsyncTokenStorage(store).store_token_batch(IDS, progress=False, pace=Pace([(1, 60.0)]))
        task = asyncio.create_task(batch)
        while not upstox.logins():
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(TokenNotStored) as caught:
        asyncio.run(cancel())
    assert works(upstox, caught.value, FIRST)


def test_where_all_tokens_are_stored_ctrl_c_stays_what_it_is(store: PooledUpstoxStorage, upstox: LocalUpstox) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.store_token_batch([THIRD, FIRST], progress=False, pace=Pace([(1, 60.0)], sleep=interrupt))
    assert upstox.logins() == 1


def test_ctrl_c_during_a_login_whose_token_cannot_be_stored_ends_the_batch(
    store: PooledUpstoxStorage, upstox: LocalUpstox
) -> None:
    accounts = store.login

    def interrupted(user_id: str | None) -> Any:
        answer = accounts(user_id)
        os.kill(os.getpid(), signal.SIGINT)
        return answer

    store.login = interrupted
    with pytest.raises(TokenNotStored) as caught:
        store.store_token_batch(IDS, progress=False, pace=AT_ONCE)
    assert works(upstox, caught.value, FIRST)
    assert upstox.logins() == 1, "the batch went on"


def test_what_is_refused_without_a_request_does_not_count_as_a_login(
    store: PooledUpstoxStorage, credentials: dict[str, dict[str, str]], upstox: LocalUpstox
) -> None:
    fake = FakeTime()
    results = store.store_token_batch(["NO0001", "NO0002", THIRD], progress=False, pace=fake.pace([(1, 60.0)]))
    assert [result["success"] for result in results] == [False, False, True]
    assert fake.slept == []
    store.login = Accounts({FIRST: credentials[FIRST] | {"pin_code": "0000"}}, base_domain=upstox.base_domain)
    with pytest.raises(LoginRefused) as caught:
        store.store_token(FIRST)
    refused = [result.exception for result in results[:2]] + [caught.value]
    assert [isinstance(error, LoginRefused) and error.login_began for error in refused] == [False, False, True]
