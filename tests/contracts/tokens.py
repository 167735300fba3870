"""What every store promises about a token: it is read back whole, and handed out until it expires."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upstox_db_examples import (
    ExpiryPolicy,
    InvalidInput,
    LoginInterrupted,
    SdkLogin,
    TokenStorage,
)
from upstox_db_examples.local.upstox import Failure, LocalUpstox

from ..support.clocks import Clock, ist
from ..support.processes import USER
from ..support.stores import OnAStore, OpenStore, living


class TokenContract(OnAStore):
    """A stored token is read back until it expires."""

    # Storing and reading

    def test_a_stored_token_is_read_back_whole(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        stored = store.store_token()
        read = living(store)
        assert read["token"] == stored["token"]
        assert upstox.is_living(read["token"])
        assert {"token", "user_id", "user_name", "token_id", "expires_at"} <= set(stored)
        assert {"token", "user_id", "user_name", "token_id", "expires_at"} <= set(read)
        assert read["user_id"] == USER
        assert datetime.fromisoformat(read["expires_at"]) == ist(7, 3, 30)
        assert datetime.fromisoformat(read["expires_at"]).utcoffset() is not None

    def test_an_unknown_user_has_no_token_no_history_and_zeros(self, store: TokenStorage) -> None:
        assert store.get_valid_token("NOBODY") is None
        assert store.get_token_history("NOBODY") == []
        assert store.get_audit_trail("NOBODY") == []
        assert store.get_user_statistics("NOBODY") == {
            "total_tokens": 0,
            "active_tokens": 0,
            "total_usage": 0,
            "avg_usage_per_token": 0.0,
            "last_generation": None,
            "last_usage": None,
        }
        assert store.revoke_token("NOBODY") is False
        assert store.keys_in_use() == {}

    def test_a_new_token_replaces_the_one_before(self, store: TokenStorage) -> None:
        first, second = store.store_token(), store.store_token()
        read = living(store)
        assert read["token"] == second["token"] != first["token"]
        assert [row["is_active"] for row in store.get_token_history(USER)] == [True, False]

    def test_reading_needs_neither_credentials_nor_a_login(self, store: TokenStorage, open_store: OpenStore) -> None:
        stored = store.store_token()
        reader = open_store(login=SdkLogin())
        read = living(reader)
        assert read["token"] == stored["token"]
        assert reader.get_or_create_token(USER)["token"] == stored["token"]

    def test_a_restart_keeps_everything(self, store: TokenStorage, open_store: OpenStore) -> None:
        stored, history, audit = store.store_token(), store.get_token_history(USER), store.get_audit_trail(USER)
        store.close()
        again = open_store()
        assert again.get_token_history(USER) == history
        assert again.get_audit_trail(USER) == audit
        assert living(again)["token"] == stored["token"]

    def test_each_user_has_a_separate_token(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        logins = {
            user_id: SdkLogin(upstox.add_account(user_id).credentials(), base_domain=upstox.base_domain)
            for user_id in ("CD0001", "CD0002")
        }
        store = open_store(login=lambda user_id: logins[user_id](user_id))
        first, second = store.get_or_create_token("CD0001"), store.get_or_create_token("CD0002")
        assert first["token"] != second["token"]
        assert upstox.is_living(first["token"])
        assert upstox.is_living(second["token"])
        assert store.get_or_create_token("CD0001")["token"] == first["token"]

    # Expiry

    def test_a_token_is_handed_out_until_it_dies_and_never_after(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        clock.set(7, 2, 30)
        assert store.get_valid_token(USER), "the guide's margin of an hour would refuse this token"
        clock.set(7, 3, 28, 59)
        assert store.get_valid_token(USER)
        clock.set(7, 3, 29, 30)
        assert store.get_valid_token(USER) is None, "the token is inside the margin of one minute"
        clock.set(7, 3, 30)
        assert store.get_valid_token(USER) is None

    def test_the_margin_can_be_set(self, open_store: OpenStore, clock: Clock) -> None:
        store = open_store(policy=ExpiryPolicy(margin=timedelta(0)))
        store.store_token()
        clock.set(7, 3, 29, 59)
        assert store.get_valid_token(USER)
        clock.set(7, 3, 30)
        assert store.get_valid_token(USER) is None

    def test_a_living_token_never_causes_a_login(self, store: TokenStorage, clock: Clock, upstox: LocalUpstox) -> None:
        token = store.get_or_create_token(USER)["token"]
        for moment in ((6, 20, 1), (7, 2, 30), (7, 3, 0), (7, 3, 29), (7, 3, 29, 59)):
            clock.set(*moment)
            assert store.get_or_create_token(USER)["token"] == token
        assert upstox.logins(USER) == 1
        clock.set(7, 3, 30)
        assert store.get_or_create_token(USER)["token"] != token
        assert upstox.logins(USER) == 2

    def test_a_token_made_just_before_its_death_is_not_made_again_and_again(
        self, store: TokenStorage, clock: Clock, upstox: LocalUpstox
    ) -> None:
        for second in range(0, 60, 10):
            clock.set(7, 3, 29, second)
            store.get_or_create_token(USER)
        assert upstox.logins(USER) == 1

    def test_at_any_time_what_is_handed_out_is_alive_and_a_living_token_is_kept(
        self, store: TokenStorage, clock: Clock, upstox: LocalUpstox
    ) -> None:
        # This function is inside the test because hypothesis takes a method that several classes inherit for several
        # tests.
        @settings(max_examples=10, deadline=None)
        @given(steps=st.lists(st.integers(1, 40_000), min_size=1, max_size=12))
        def holds(steps: list[int]) -> None:
            clock.set(6, 20)
            store.revoke_token(USER)
            dies = clock.now
            for step in steps:
                clock.advance(seconds=step)
                before = upstox.logins(USER)
                result = store.get_or_create_token(USER)
                assert upstox.is_living(result["token"])
                assert upstox.logins(USER) - before == (1 if clock.now >= dies else 0)
                dies = datetime.fromisoformat(result["expires_at"])
                assert dies > clock.now

        holds()

    def test_a_login_that_gives_a_dead_token_stores_nothing(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        upstox.fail(Failure.DEAD_TOKEN)
        with pytest.raises(LoginInterrupted, match="already expired"):
            store.get_or_create_token(USER)
        assert store.get_token_history(USER) == []
        assert store.get_or_create_token(USER)

    def test_a_clock_without_a_time_zone_is_refused(self, open_store: OpenStore) -> None:
        store = open_store(clock=lambda: datetime(2026, 1, 6))
        with pytest.raises(InvalidInput, match="time zone"):
            store.get_valid_token(USER)

    # Bad input

    @pytest.mark.parametrize(
        "user_id",
        [
            "",
            " ",
            " AB1234",
            "AB1234\n",
            "x" * 51,
            "x" * 10_240,
            "AB'; DROP TABLE x",
            'AB"1',
            "AB\0CD",
            "🦇",
            "../AB",
            7,
            b"A",
        ],
    )
    def test_an_odd_user_id_is_refused_everywhere_and_leaves_nothing(self, store: TokenStorage, user_id: Any) -> None:
        calls: list[Callable[[Any], object]] = [
            store.store_token,
            store.get_valid_token,
            store.get_or_create_token,
            store.get_token_history,
            store.get_user_statistics,
            store.get_audit_trail,
            store.revoke_token,
        ]
        for call in calls:
            with pytest.raises(InvalidInput, match="user id"):
                call(user_id)
        assert self.raw_rows() == []

    def test_none_is_no_user_to_read(self, store: TokenStorage) -> None:
        with pytest.raises(InvalidInput):
            store.get_valid_token(None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("limit", [0, -1, "10", 1.0, None, True, 2**31])
    def test_an_odd_limit_is_refused(self, store: TokenStorage, limit: Any) -> None:
        for call in (store.get_token_history, store.get_audit_trail):
            with pytest.raises(InvalidInput, match="limit"):
                call(USER, limit)

    def test_an_unknown_option_is_refused(self) -> None:
        with pytest.raises(TypeError, match="does not take logn"):
            self.connect(logn=None)
