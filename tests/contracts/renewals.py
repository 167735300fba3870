"""What every store promises about save_token and renew_token: the newer token stays, and a crowd logs in once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from upstox_db_examples import (
    InvalidInput,
    LoginLimited,
    LoginSuperseded,
    TokenStorage,
)
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.clocks import Clock, Passing
from ..support.leaks import shown_with_locals
from ..support.processes import USER, jwt, response
from ..support.stores import OnAStore, OpenStore, held


class RenewalContract(OnAStore):
    """A store keeps a token from another login, and renews a refused token only once."""

    # save_token

    def test_a_token_of_another_login_is_adopted(
        self, store: TokenStorage, upstox: LocalUpstox, account: Account
    ) -> None:
        payload = upstox.notify(account.user_id)
        assert store.save_token(payload, verify=True)["token"] == held(store) == payload["access_token"]
        (entry,) = [entry for entry in store.get_audit_trail(USER) if entry["action"] != "used"]
        assert entry["action"] == "adopted"
        assert store.get_or_create_token(USER)["token"] == payload["access_token"]
        assert upstox.logins() == 1

    def test_of_two_tokens_the_one_issued_later_stays(self, store: TokenStorage, clock: Clock) -> None:
        older = response(USER, jwt(USER, clock.now - timedelta(minutes=2)))
        newer = response(USER, jwt(USER, clock.now - timedelta(minutes=1)))
        assert store.save_token(older)["token"] == older["access_token"]
        for _ in range(2):
            assert store.save_token(newer)["token"] == newer["access_token"]
            assert store.save_token(older)["token"] == newer["access_token"]
        assert len(store.get_token_history(USER)) == 2, "an older token, or one that is stored already, changes nothing"
        store.revoke_token(USER)
        for late in (older, newer):
            with pytest.raises(LoginSuperseded):
                store.save_token(late)
        assert held(store) is None
        newest = response(USER, jwt(USER, clock.now))
        assert store.save_token(newest)["token"] == held(store) == newest["access_token"]

    def test_of_two_tokens_that_tell_no_time_the_one_that_arrives_later_stays(self, store: TokenStorage) -> None:
        for name in ("first", "second"):
            store.save_token(response(USER, f"opaque-{name:060}"))
            assert str(held(store)).startswith(f"opaque-{name}")

    def test_what_is_no_living_token_of_that_user_is_not_saved(self, store: TokenStorage, clock: Clock) -> None:
        now = clock.now
        refused = {
            "expired": jwt(USER, now - timedelta(days=1)),
            "another user": jwt("CD0001", now),
            "future": jwt(USER, now + timedelta(minutes=2)),
            "another kind": jwt(USER, now, exp=int((now + timedelta(days=365)).timestamp())),
        }
        for why, token in refused.items():
            with pytest.raises(InvalidInput) as caught:
                store.save_token(response(USER, token))
            assert why in str(caught.value)
            assert token[-20:] not in shown_with_locals(caught.value)
        for odd in (None, "eyJ0eXAi", {"user_id": USER}, response(USER, "")):
            with pytest.raises(InvalidInput):
                store.save_token(odd)
        assert self.raw_rows() == []
        store.save_token(response(USER, jwt(USER, now + timedelta(seconds=50))))

    def test_upstox_is_asked_where_that_is_wanted(
        self, store: TokenStorage, upstox: LocalUpstox, account: Account, clock: Clock
    ) -> None:
        payload = upstox.notify(account.user_id)
        clock.advance(seconds=1)
        upstox.notify(account.user_id)
        with pytest.raises(InvalidInput, match="does not accept this"):
            store.save_token(payload, verify=True)
        assert store.save_token(payload), "without verify, the caller vouches for the token"

    # renew_token

    def test_a_refused_token_is_renewed_once(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        refused = store.store_token(USER)
        upstox.kill_token(USER)
        renewed = store.renew_token(USER, refused)
        assert upstox.is_living(renewed["token"])
        assert store.renew_token(USER, refused["token"])["token"] == renewed["token"], "a newer token is already stored"
        assert upstox.logins() == 2

    def test_a_token_that_is_refused_again_at_once_starts_no_other_login(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        first = store.renew_token(USER, store.store_token(USER))
        with pytest.raises(LoginLimited, match="renewed less than 600 s ago") as caught:
            store.renew_token(USER, first)
        assert 590 < caught.value.retry_after <= 600
        other = open_store(renew_pause=300)
        passing = Passing(other)
        assert upstox.logins() == 2
        passing.seconds = 299
        with pytest.raises(LoginLimited):
            other.renew_token(USER, first)
        passing.seconds = 301
        assert other.renew_token(USER, first)["token"] != first["token"]
        with pytest.raises(LoginLimited):
            other.renew_token(USER, str(held(other)))
        assert store.store_token(USER), "a deliberate login ignores that limit"

    def test_without_a_token_there_is_nothing_to_renew_but_a_login_to_make(
        self, store: TokenStorage, upstox: LocalUpstox
    ) -> None:
        assert store.renew_token(USER, "eyJ0eXAi" * 9)["user_id"] == USER
        assert store.renew_token(USER, "eyJ0eXAi" * 9)["token"] == held(store)
        assert upstox.logins() == 1
        odd_ones: list[Any] = [None, "", 7, {}]
        for odd in odd_ones:
            with pytest.raises(InvalidInput, match="refused_token"):
                store.renew_token(USER, odd)
        secret = "eyJ0eXAi" + "s" * 60
        for user_id, shown in [("-", secret), *((USER, it) for it in ([secret], secret.encode(), secret + "\ud800"))]:
            with pytest.raises(InvalidInput) as caught:
                store.renew_token(user_id, shown)  # type: ignore[arg-type]
            assert secret not in shown_with_locals(caught.value)
        with pytest.raises(InvalidInput, match="half a character") as caught:
            store.save_token(response(USER, secret + "\ud800"))
        assert secret not in shown_with_locals(caught.value)

    def test_a_crowd_whose_token_is_refused_makes_one_login(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        refused = store.store_token(USER)["token"]
        upstox.kill_token(USER)
        upstox.login_seconds = 0.2
        with ThreadPoolExecutor(16) as threads:
            renewed = {result["token"] for result in threads.map(store.renew_token, [USER] * 64, [refused] * 64)}
        assert [upstox.is_living(token) for token in renewed] == [True]
        assert upstox.logins() == 2
