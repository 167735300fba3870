"""What a store promises when its server fails. The test has its own server, which it can stop, kill and stall."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import StorageError, StoreUnavailable, TokenNotStored, TokenStorage
from upstox_db_examples.core import listener
from upstox_db_examples.local.processes import Server

from ..support.clocks import Clock
from ..support.leaks import shown_with_locals
from ..support.processes import KEY, USER, wait_until
from ..support.stores import CountsLogins, OpenStore, living, opening
from ..support.watching import following


@pytest.mark.usefixtures("own_servers")
class ServerContract(CountsLogins, ABC):
    """Promises for a store's test class to inherit.

    Attributes:
        kind: the class of the server.
        name: the name of the server in the status.
    """

    kind: type[Server]
    name: str

    @abstractmethod
    def connect(self, url: str, **options: Any) -> TokenStorage:
        """Open a store on the server."""

    @pytest.fixture
    def server(self) -> Iterator[Server]:
        with self.kind() as server:
            yield server

    @pytest.fixture
    def open_one(self, server: Server, clock: Clock) -> Iterator[OpenStore]:
        with opening(partial(self.connect, server.url), login=self.login, keys=KEY, clock=clock) as open_one:
            yield open_one

    @pytest.fixture
    def store(self, open_one: OpenStore) -> TokenStorage:
        return open_one(timeout=1)

    def start(self, server: Server, store: TokenStorage) -> None:
        server.start()
        wait_until(lambda: store.get_storage_status()[self.name] == "healthy")

    def test_that_is_restarted_between_two_calls_goes_unnoticed(self, server: Server, open_one: OpenStore) -> None:
        store = open_one()
        token = store.store_token(USER)["token"]
        for end in (server.stop, server.kill):
            end()
            server.start()
            assert living(store)["token"] == token
        assert self.logins == 1

    def test_that_is_restarted_costs_a_watch_no_change(
        self, server: Server, open_one: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "POLL", 1000)  # The server has to tell.
        another = open_one()
        with following(open_one()) as followed:
            assert followed.token() is None
            for restarts in (False, True):
                if restarts:
                    server.kill()
                    self.start(server, another)
                for _ in range(2):
                    token = another.store_token(USER)["token"]
                    assert followed.token() == token

    def test_that_is_down_is_a_clear_error_and_costs_no_login(self, server: Server, store: TokenStorage) -> None:
        token = store.store_token(USER)["token"]
        server.kill()
        for call in (store.get_valid_token, store.get_or_create_token, store.store_token):
            with pytest.raises(StoreUnavailable, match="cannot be reached") as caught:
                call(USER)
            assert str(urlsplit(server.url).password) not in shown_with_locals(caught.value)
        assert self.logins == 1
        assert store.get_storage_status()[self.name].startswith("error: ")
        self.start(server, store)
        assert living(store)["token"] == token

    def test_that_stalls_is_given_up_in_time_and_costs_no_login(self, server: Server, store: TokenStorage) -> None:
        token = store.store_token(USER)["token"]
        server.pause()
        # The last call has a new connection. The one before has the connection of the last lock, if the store has one.
        for call in (store.get_valid_token, store.store_token, store.store_token):
            begin = time.monotonic()
            with pytest.raises(StoreUnavailable, match="no answer for 1 s"):
                call(USER)
            assert time.monotonic() - begin < 2, "the call took too long, even for a slow machine"
        assert self.logins == 1
        server.resume()
        wait_until(lambda: store.get_storage_status()[self.name] == "healthy")
        assert living(store)["token"] == token

    def test_that_dies_during_the_login_gives_the_token_in_the_error(self, server: Server, store: TokenStorage) -> None:
        first = store.store_token(USER)["token"]

        def login_while_the_server_dies(user_id: str | None) -> AccessTokenData:
            server.kill()
            return self.login(user_id)

        store.login = login_while_the_server_dies
        with pytest.raises(TokenNotStored) as caught:
            store.store_token(USER)
        self.start(server, store)
        unsaved = caught.value.token.reveal()
        assert unsaved != first
        store.save_token({"user_id": USER, "access_token": unsaved})
        assert living(store)["token"] == unsaved

    def test_that_is_killed_again_and_again_loses_nothing_it_acknowledged(
        self, server: Server, store: TokenStorage
    ) -> None:
        acknowledged: list[Any] = []
        stop = threading.Event()

        def keep_storing() -> None:
            while not stop.is_set():
                try:
                    acknowledged.append(store.store_token(USER)["token_id"])
                except StorageError:
                    time.sleep(0.01)

        def some_more_are_stored() -> None:
            enough = len(acknowledged) + 5
            wait_until(lambda: len(acknowledged) >= enough)

        with ThreadPoolExecutor(1) as thread:
            writer = thread.submit(keep_storing)
            try:
                for _ in range(5):
                    some_more_are_stored()
                    server.kill()
                    server.start()
                some_more_are_stored()
            finally:
                stop.set()
            writer.result()
        newest_first = store.get_token_history(USER, limit=100_000)
        ids = [row["token_id"] for row in newest_first]
        active = [row["token_id"] for row in newest_first if row["is_active"]]
        assert set(acknowledged) <= set(ids)
        assert len(active) == 1
        assert ids.index(active[0]) <= ids.index(acknowledged[-1])

    def test_eight_threads_count_exactly_what_they_were_handed_through_a_stall(
        self, server: Server, open_one: OpenStore
    ) -> None:
        store = open_one(timeout=20)
        store.store_token(USER)
        with ThreadPoolExecutor(8) as threads:
            reads = [threads.submit(living, store) for _ in range(800)]
            time.sleep(0.05)
            server.pause()
            assert not all(read.done() for read in reads), "all reads were done before the server stalled"
            time.sleep(2.5)
            server.resume()
            counts = sorted(read.result()["usage_count"] for read in reads)
        assert counts == list(range(1, 801))
        assert store.get_user_statistics(USER)["total_usage"] == 800
        told = store.get_audit_trail(USER, limit=2000)
        assert len([entry for entry in told if entry["action"] == "used"]) == 800
