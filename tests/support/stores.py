"""A store on a test's own database: how to open it, and how to look at its rows without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from upstox_db_examples import KeyRing, SdkLogin, TokenResult, TokenStorage
from upstox_db_examples.local.upstox import Account, LocalUpstox

from .clocks import Clock
from .processes import USER

OpenStore = Callable[..., TokenStorage]


def living(store: TokenStorage) -> TokenResult:
    result = store.get_valid_token(USER)
    assert result is not None
    return result


def held(store: TokenStorage, user_id: str = USER) -> str | None:
    read = store.get_valid_token(user_id)
    return read["token"] if read else None


class Counts(NamedTuple):
    """What lies in a database: of the user's tokens, and of audit entries without a token or the reverse."""

    active: list[Any]
    """The ids of the active tokens."""
    generations: dict[Any, int]
    """Of each token, by its id."""
    orphans: int


class OnAStore(ABC):
    """The fixtures that open stores. The classes `On...` of the databases say how; contracts and tests inherit them."""

    counted: dict[str, Any] = {}
    """The options with which this store counts and audits reads; empty where it always does."""

    @abstractmethod
    def connect(self, **options: Any) -> TokenStorage:
        """A store on this test's own database; called again, another store on the same one."""

    @abstractmethod
    def raw_rows(self) -> list[dict[str, Any]]:
        """The token table as it lies in the database, by means of the bare driver, the oldest first."""

    @abstractmethod
    def write_raw(self, token_id: Any, **values: Any) -> None:
        """Change columns of a row by the bare driver. Names as in `raw_rows`, `expires_at` as a datetime."""

    @pytest.fixture
    def open_store(self, upstox: LocalUpstox, account: Account, keys: KeyRing, clock: Clock) -> Iterator[OpenStore]:
        opened: list[TokenStorage] = []
        login = SdkLogin(account.credentials(), base_domain=upstox.base_domain)

        def open_one(**options: Any) -> TokenStorage:
            opened.append(self.connect(**{"login": login, "keys": keys, "clock": clock, "actor": "tests", **options}))
            return opened[-1]

        yield open_one
        for store in opened:
            store.close()

    @pytest.fixture
    def store(self, open_store: OpenStore) -> TokenStorage:
        return open_store()

    @pytest.fixture
    def counting(self, open_store: OpenStore) -> TokenStorage:
        return open_store(**self.counted)
