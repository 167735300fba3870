"""What every store promises about watch: the present token at once, then each change, and no login."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from upstox_db_examples import InvalidInput, KeyRing, KeyUnavailable, StoreUnavailable, TokenStorage
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.clocks import Clock
from ..support.processes import USER, jwt, made_up_login, response, wait_until
from ..support.stores import OnAStore, OpenStore, held
from ..support.watching import following, lookouts


class WatchContract(OnAStore):
    """A watch gives the present token and then each new one, whoever stored it."""

    @pytest.fixture(autouse=True)
    def _no_lookout_is_left(self) -> Iterator[None]:
        yield
        wait_until(lambda: not lookouts(), seconds=5)

    def test_a_watch_gives_the_present_token_at_once_and_then_each_change(
        self, counting: TokenStorage, open_store: OpenStore, upstox: LocalUpstox, clock: Clock
    ) -> None:
        another = open_store()
        with following(counting, USER.lower()) as followed:
            assert followed.token() is None
            tokens = [counting.store_token(USER)["token"]]
            assert followed.token() == tokens[-1]
            with following(counting) as later:
                assert later.token() == tokens[-1], "it is there already"
            clock.advance(seconds=1)
            tokens.append(another.save_token(response(USER, jwt(USER, clock.now)))["token"])
            assert followed.token() == tokens[-1]
            assert another.revoke_token(USER)
            assert followed.token() is None
            assert not another.revoke_token(USER)
            tokens.append(another.store_token(USER)["token"])
            assert followed.token() == tokens[-1]
            assert followed.is_quiet(0.7)
        assert upstox.logins() == 2, "a watch never logs in"
        used = [entry for entry in counting.get_audit_trail(USER) if entry["action"] == "used"]
        assert len(used) == 4, "each token that is given is a use, and nothing else is"

    def test_closing_the_watch_or_the_store_ends_the_iteration_at_once(
        self, store: TokenStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        for close in ("watch", "store"):
            with following(other) as followed:
                assert followed.token() is None
                begin = time.monotonic()
                followed.watch.close() if close == "watch" else other.close()
                assert followed.ended_within() + time.monotonic() - begin < 2
                assert next(followed.watch, "the end") == "the end"
                followed.watch.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            other.watch(USER)
        with pytest.raises(InvalidInput):
            store.watch("no user")

    def test_an_expired_token_gives_none(self, store: TokenStorage, clock: Clock) -> None:
        clock.set(7, 3, 28, 58)
        token = store.store_token(USER)["token"]
        with following(store) as followed:
            assert followed.token() == token
            clock.advance(seconds=1)
            assert followed.is_quiet(0.3)
            clock.advance(seconds=1)
            assert followed.token() is None
            clock.advance(seconds=60)
            assert store.cleanup_expired_tokens() == 1
            assert followed.is_quiet(0.7), "there still is none"

    def test_a_login_that_marks_an_expired_token_does_not_give_none_again(
        self, store: TokenStorage, open_store: OpenStore, clock: Clock, upstox: LocalUpstox
    ) -> None:
        clock.set(7, 3, 28)
        store.store_token(USER)
        clock.set(7, 3, 31)
        with following(store) as followed:
            assert followed.token() is None
            upstox.login_seconds = 0.4  # Long enough for a store that polls to see the mark.
            assert open_store().store_token(USER)["token"] == followed.token()

    def test_a_token_in_doubt_gives_none_until_the_doubt_is_over(self, open_store: OpenStore) -> None:
        def login(_: str | None) -> None:
            raise ConnectionError  # after which nobody knows whether there is a new token

        store = open_store()
        token = store.store_token(USER)["token"]
        with pytest.raises(ConnectionError):
            open_store(login=login).store_token(USER)
        with following(store) as followed:
            assert followed.token() is None
            assert store.get_or_create_token(USER)["token"] == token, "Upstox says that it lives"
            assert followed.token() == token

    def test_fifty_watches_share_one_thread_and_all_see_the_change(self, open_store: OpenStore) -> None:
        store, another = open_store(), open_store(login=made_up_login)
        with ExitStack() as stack:
            all_followed = [stack.enter_context(following(store)) for _ in range(50)]
            assert [followed.token() for followed in all_followed] == [None] * 50
            assert len(lookouts()) == 1
            token = another.store_token(USER)["token"]
            assert [followed.token() for followed in all_followed] == [token] * 50

    def test_what_cannot_be_read_is_an_error_and_the_next_call_goes_on(
        self, store: TokenStorage, open_store: OpenStore
    ) -> None:
        with store.watch(USER) as watch:
            assert next(watch) is None
            open_store(keys=KeyRing(KeyRing.new_key())).store_token(USER)
            for _ in range(2):
                with pytest.raises(KeyUnavailable):
                    next(watch)
            token = store.store_token(USER)["token"]
            result = next(watch)
            assert result is not None
            assert result["token"] == token == held(store)
