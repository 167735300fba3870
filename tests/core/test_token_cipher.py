"""Where a store gets its keys from, and what happens if that source gives something else or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import ConfigurationError, KeyRing, KeyUnavailable, SQLiteUpstoxStorage

from ..support.leaks import shown_with_locals
from ..support.processes import USER, made_up_login

OTHER = "CD5678"
RAW = KeyRing.new_key()


@pytest.mark.parametrize("source", [lambda: RAW, lambda: None, lambda: RAW.hex()])
def test_a_source_of_something_else_than_a_ring_costs_no_login(source: Callable[[], Any], tmp_path: Path) -> None:
    logins: list[str | None] = []

    def login(user_id: str | None) -> Any:
        logins.append(user_id)
        return made_up_login(user_id)

    with SQLiteUpstoxStorage(tmp_path / "upstox.db", keys=source, login=login) as store:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="must return a KeyRing") as caught:
                store.get_or_create_token(USER)
    assert logins == []
    shown = shown_with_locals(caught.value)
    assert RAW.hex()[:16] not in shown
    assert repr(RAW)[2:12] not in shown


def test_a_source_that_is_down_does_not_cost_the_ring_that_works(tmp_path: Path) -> None:
    """A row under another key makes the store ask for newer keys."""
    file, ring = tmp_path / "upstox.db", KeyRing(RAW)
    with SQLiteUpstoxStorage(file, keys=KeyRing(KeyRing.new_key()), login=made_up_login) as store:
        store.store_token(OTHER)
    asked = 0

    def vault() -> KeyRing:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise ConnectionError("the vault is down")
        return ring

    with SQLiteUpstoxStorage(file, keys=vault, login=made_up_login) as store:
        token = store.store_token(USER)["token"]
        with pytest.raises(KeyUnavailable) as caught:
            store.get_valid_token(OTHER)
        assert isinstance(caught.value.__cause__, ConnectionError)
        found = store.get_valid_token(USER)
        assert found
        assert found["token"] == token
        assert asked == 2
