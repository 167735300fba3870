"""Open a store on a test's own database, and look at its rows without the store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import KeyRing, SdkLogin, TokenResult, TokenStorage
from upstox_db_examples.local.upstox import Account, LocalUpstox

from .clocks import Clock
from .processes import USER, token_data

OpenStore = Callable[..., TokenStorage]


def living(store: TokenStorage) -> TokenResult:
    result = store.get_valid_token(USER)
    assert result is not None
    return result


def held(store: TokenStorage, user_id: str = USER) -> str | None:
    read = store.get_valid_token(user_id)
    return read["token"] if read else None


class Counts(NamedTuple):
    """Counts of the user's tokens, and of tokens without an audit entry and the reverse."""

    active: list[Any]
    """The ids of the active tokens."""
    generations: dict[Any, int]
    """The generation of each token, by its id."""
    orphans: int


@contextmanager
def opening[Store: TokenStorage](connect: Callable[..., Store], **common: Any) -> Iterator[Callable[..., Store]]:
    """Yield a function that opens stores with these options and its own, and close them all at the end."""
    with ExitStack() as stack:

        def open_one(*where: Any, **options: Any) -> Store:
            store = connect(*where, **{**common, **options})
            stack.callback(store.close)
            return store

        yield open_one


class CountsLogins:
    """A login that counts its calls and returns a different token each time."""

    logins = 0

    def login(self, user_id: str | None) -> AccessTokenData:
        self.logins += 1
        return token_data(user_id or USER, f"eyJ0eXAi{self.logins:060}")


class OnAStore(ABC):
    """Fixtures that open stores. The `On...` class of each database says how. Contracts and tests inherit from it."""

    counted: dict[str, Any] = {}
    """The options that make this store count and audit reads. Stores that always do so need none."""

    @abstractmethod
    def connect(self, **options: Any) -> TokenStorage:
        """Open a store on this test's own database. Another call opens another store on the same database."""

    @abstractmethod
    def raw_rows(self) -> list[dict[str, Any]]:
        """Return the token table, read with the bare driver, oldest row first."""

    @abstractmethod
    def write_raw(self, token_id: Any, **values: Any) -> None:
        """Change columns of a row with the bare driver. Names are as in `raw_rows`, and `expires_at` is a datetime."""

    @pytest.fixture
    def open_store(self, upstox: LocalUpstox, account: Account, keys: KeyRing, clock: Clock) -> Iterator[OpenStore]:
        login = SdkLogin(account.credentials(), base_domain=upstox.base_domain)
        with opening(self.connect, login=login, keys=keys, clock=clock, actor="tests") as open_one:
            yield open_one

    @pytest.fixture
    def store(self, open_store: OpenStore) -> TokenStorage:
        return open_store()

    @pytest.fixture
    def counting(self, open_store: OpenStore) -> TokenStorage:
        return open_store(**self.counted)

    def found(self, store: TokenStorage, user_id: str = USER, *, locked: bool = False) -> bool:
        return (
            store.backend.find(user_id, store.backend.context.now(), store.backend.context.now(), locked=locked)
            is not None
        )
