"""A store on a test's own database: how to open it, and how to look at its rows without it."""

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
    """What lies in a database: of the user's tokens, and of audit entries without a token or the reverse."""

    active: list[Any]
    """The ids of the active tokens."""
    generations: dict[Any, int]
    """Of each token, by its id."""
    orphans: int


@contextmanager
def opening[Store: TokenStorage](connect: Callable[..., Store], **common: Any) -> Iterator[Callable[..., Store]]:
    """Give a function that opens stores, with these options and its own, and close them all at the end."""
    with ExitStack() as stack:

        def open_one(*where: Any, **options: Any) -> Store:
            store = connect(*where, **{**common, **options})
            stack.callback(store.close)
            return store

        yield open_one


class CountsLogins:
    """A login of a test's own, which counts how often it is asked and gives another token each time."""

    logins = 0

    def login(self, user_id: str | None) -> AccessTokenData:
        self.logins += 1
        return token_data(user_id or USER, f"eyJ0eXAi{self.logins:060}")


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
