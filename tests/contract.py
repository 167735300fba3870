"""What every store promises, whatever its database. A store's tests subclass this and say how to open one."""

from __future__ import annotations

import json
import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    ExpiryPolicy,
    InvalidInput,
    KeyRing,
    KeyUnavailable,
    LoginError,
    LoginInterrupted,
    LoginRefused,
    LoginSuperseded,
    SdkLogin,
    Secret,
    StorageError,
    TokenNotStored,
    TokenRefused,
    TokenResult,
    TokenStorage,
)
from upstox_db_examples.core import store as storage
from upstox_db_examples.core.backend import ENTRIES_LOCK
from upstox_db_examples.core.cipher import Binding
from upstox_db_examples.core.token import IST
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from .backend_contract import BackendContract
from .conftest import YEAR, Clock, shown_with_locals
from .login_contract import LoginContract
from .processes import USER, jwt, token_data

OpenStore = Callable[..., TokenStorage]


def living(store: TokenStorage) -> TokenResult:
    result = store.get_valid_token(USER)
    assert result is not None
    return result


def ist(day: int, hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(YEAR, 1, day, hour, minute, second, tzinfo=IST)


class StoreContract(BackendContract, LoginContract, ABC):
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

    def test_each_user_has_a_token_of_his_own(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
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

    # The time of death

    def test_a_token_is_handed_out_until_it_dies_and_never_after(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        clock.set(7, 2, 30)
        assert store.get_valid_token(USER), "the guide's hour of margin would refuse it"
        clock.set(7, 3, 28, 59)
        assert store.get_valid_token(USER)
        clock.set(7, 3, 29, 30)
        assert store.get_valid_token(USER) is None, "inside the margin of a minute"
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
        # Inside the test, for hypothesis takes a method that several classes inherit for several tests.
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

    # One login at a time

    def test_of_many_threads_one_logs_in(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        upstox.login_seconds = 0.2
        with ThreadPoolExecutor(16) as threads:
            tokens = {result["token"] for result in threads.map(store.get_or_create_token, [USER] * 16)}
        assert upstox.logins() == 1
        assert len(tokens) == 1

    def test_of_many_threads_that_name_no_user_one_logs_in(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        upstox.login_seconds = 0.2
        with ThreadPoolExecutor(8) as threads:
            tokens = {result["token"] for result in threads.map(lambda _: store.get_or_create_token(), range(8))}
        assert upstox.logins() == 1
        assert len(tokens) == 1

    def test_who_names_no_user_finds_his_own_token_again_after_a_restart(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        token = store.get_or_create_token()["token"]
        assert open_store().get_or_create_token()["token"] == token
        assert upstox.logins() == 1

    def test_who_names_no_user_never_gets_another_accounts_token(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        store.get_or_create_token()
        other = SdkLogin(upstox.add_account("XY9999").credentials(), base_domain=upstox.base_domain)
        assert open_store(login=other).get_or_create_token()["user_id"] == "XY9999"
        assert store.get_or_create_token()["user_id"] == USER

    def test_who_changes_his_credentials_gets_the_new_accounts_token(
        self, open_store: OpenStore, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(login=SdkLogin(base_domain=upstox.base_domain))
        for each in (account, upstox.add_account("XY9999"), account):
            for name, value in each.environ().items():
                monkeypatch.setenv(name, value)
            assert store.get_or_create_token()["user_id"] == each.user_id
        assert upstox.logins() == 2

    def test_a_login_that_tells_no_account_is_remembered_as_long_as_the_store_is_open(
        self, open_store: OpenStore
    ) -> None:
        logins: list[str | None] = []

        def login(user_id: str | None) -> AccessTokenData:
            logins.append(user_id)
            return token_data(USER)

        store = open_store(login=login)
        assert [store.get_or_create_token()["user_id"] for _ in range(3)] == [USER] * 3
        assert logins == [None]

    def test_who_waits_longer_than_he_wants_gets_a_clear_error(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        upstox.login_seconds = 1.5
        impatient = open_store(login_wait=0.3)
        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(store.get_or_create_token, USER)
            while upstox.attempts() == 0:
                threading.Event().wait(0.01)
            with pytest.raises(StorageError, match=rf"Waited 0\.3 s for another login of {USER}"):
                impatient.get_or_create_token(USER)
            assert slow.result()["user_id"] == USER
        assert upstox.logins() == 1
        with (
            store._lock(ENTRIES_LOCK),
            pytest.raises(StorageError, match="for another transfer"),
            impatient._lock(ENTRIES_LOCK),
        ):
            pass

    # Logins that fail

    def test_a_failed_login_stores_nothing_and_stands_in_the_audit_trail(
        self, store: TokenStorage, upstox: LocalUpstox
    ) -> None:
        kept = store.store_token(USER)
        upstox.fail(Failure.RATE_LIMIT)
        with pytest.raises(StorageError):
            store.store_token(USER)
        assert [entry["action"] for entry in store.get_audit_trail(USER, limit=2)] == ["login_failed", "login"]
        assert store.get_audit_trail(USER)[0]["metadata"] == {"error": "LoginLimited"}
        assert living(store)["token"] == kept["token"]

    def test_a_login_of_another_user_is_refused_and_stored_nowhere(self, open_store: OpenStore) -> None:
        store = open_store()
        with pytest.raises(LoginRefused, match="was for ZZ0001, but these credentials belong to AB1234"):
            store.get_or_create_token("ZZ0001")
        assert store.get_token_history("ZZ0001") == []
        assert store.get_token_history(USER) == []

    @pytest.mark.parametrize("oddity", [None, "eyJ0eXAi" * 9, 7, object()])
    def test_a_login_that_returns_something_else_is_a_clear_error(self, open_store: OpenStore, oddity: Any) -> None:
        store = open_store(login=lambda _: oddity)
        with pytest.raises(LoginError, match=r"AccessTokenData|names no user|no token") as caught:
            store.store_token(USER)
        assert "eyJ0eXAi" not in shown_with_locals(caught.value)
        assert store.get_token_history(USER) == []

    @pytest.mark.parametrize("change", [{"access_token": ""}, {"user_id": ""}, {"user_id": "x" * 51}])
    def test_a_login_without_a_token_or_a_user_is_a_clear_error(
        self, open_store: OpenStore, change: dict[str, str]
    ) -> None:
        store = open_store(login=lambda _: token_data(USER).model_copy(update=change))
        with pytest.raises(LoginInterrupted) as caught:
            store.store_token()
        assert "eyJ0eXAi" not in shown_with_locals(caught.value)

    def test_an_error_of_ones_own_login_comes_through_as_it_is(self, open_store: OpenStore) -> None:
        def refuse(_: str | None) -> AccessTokenData:
            raise ConnectionError("the vault is shut")

        store = open_store(login=refuse)
        with pytest.raises(ConnectionError, match="the vault is shut"):
            store.get_or_create_token(USER)

    def test_who_was_logged_in_meanwhile_keeps_that_token(self, open_store: OpenStore, clock: Clock) -> None:
        other = open_store(login=lambda _: token_data(USER, jwt(USER, clock.now)))

        def slow_and_overtaken(_: str | None) -> AccessTokenData:
            minted = token_data(USER, jwt(USER, clock.now))
            clock.advance(seconds=3)
            overtaking.append(other.store_token(USER)["token"])  # This kills the token that the slow login gives.
            return minted

        overtaking: list[str] = []
        with pytest.raises(LoginSuperseded) as caught:
            open_store(login=slow_and_overtaken).store_token()
        assert caught.value.token is not None, "it is in the error"
        assert [living(other)["token"]] == overtaking

    @pytest.mark.parametrize("step", ["_newest", "_encrypt", "_insert"])
    def test_a_token_is_not_lost_whatever_fails_after_the_login(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        store = open_store(login=lambda _: token_data(USER))

        def odd(*_: object, **__: object) -> None:
            raise ValueError("a driver's own error, as for a name that it cannot write")

        def login(_: str | None) -> AccessTokenData:
            monkeypatch.setattr(store, step, odd)
            return token_data(USER)

        store._login = login
        with pytest.raises(TokenNotStored) as caught:
            store.store_token()
        assert caught.value.token.reveal() == token_data(USER).access_token

    def test_an_opaque_token_is_kept_until_half_past_three(self, open_store: OpenStore, clock: Clock) -> None:
        store = open_store(login=lambda _: token_data(USER, "opaque-" * 9))
        result = store.store_token()
        assert datetime.fromisoformat(result["expires_at"]) == ist(7, 3, 30)
        assert clock.now < ist(7, 3, 30)

    # What lies in the database

    def test_the_row_holds_ciphertext_and_nothing_of_the_token(self, store: TokenStorage, keys: KeyRing) -> None:
        stored = store.store_token()
        (row,) = self.raw_rows()
        assert row["access_token"].startswith(f"v2.{keys.key_ids[0]}.")
        assert stored["token"][:20] not in json.dumps(row, default=str)

    def test_a_replaced_or_revoked_token_is_erased(self, store: TokenStorage) -> None:
        store.store_token()
        store.store_token()
        assert [row["access_token"] is None for row in self.raw_rows()] == [True, False]
        assert store.revoke_token(USER) is True
        assert [row["access_token"] is None for row in self.raw_rows()] == [True, True]
        assert store.get_valid_token(USER) is None
        assert store.revoke_token(USER) is False

    def test_a_ciphertext_in_another_users_row_is_refused(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda user_id: token_data(user_id or USER))
        store.store_token("CD0001")
        store.store_token("CD0002")
        first, second = self.raw_rows()
        self.write_raw(second["id"], access_token=first["access_token"])
        with pytest.raises(TokenRefused):
            store.get_valid_token("CD0002")
        assert store.get_valid_token("CD0001")

    def test_a_ciphertext_from_another_kind_of_store_is_refused(self, store: TokenStorage, keys: KeyRing) -> None:
        store.store_token()
        (row,) = self.raw_rows()
        here = Binding(USER, ist(7, 3, 30), 1, type(store)._kind, row["account"])
        assert keys.decrypt(row["access_token"], here)
        for kind in {"access token in SQLite", "access token in PostgreSQL", "access token in MongoDB"} - {here.kind}:
            elsewhere = keys.encrypt(Secret("eyJ0eXAi" * 9), here._replace(kind=kind))
            self.write_raw(row["id"], access_token=elsewhere)
            with pytest.raises(TokenRefused):
                store.get_valid_token(USER)

    def test_a_prolonged_token_is_refused(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        (row,) = self.raw_rows()
        self.write_raw(row["id"], expires_at=ist(9, 3, 30))
        clock.set(8, 10)
        with pytest.raises(TokenRefused):
            store.get_or_create_token(USER)

    def test_plaintext_where_ciphertext_is_due_is_refused(self, store: TokenStorage) -> None:
        stored = store.store_token()
        (row,) = self.raw_rows()
        self.write_raw(row["id"], access_token=stored["token"])
        with pytest.raises(TokenRefused) as caught:
            store.get_valid_token(USER)
        assert stored["token"][:20] not in str(caught.value)

    def test_a_lost_key_is_named_and_destroys_nothing(self, store: TokenStorage, open_store: OpenStore) -> None:
        stored = store.store_token()
        before = self.raw_rows()
        stranger = open_store(keys=KeyRing(KeyRing.new_key()))
        for reading in (stranger.get_valid_token, stranger.get_or_create_token):
            with pytest.raises(KeyUnavailable, match=before[0]["key_id"]):
                reading(USER)
        assert [row["access_token"] for row in self.raw_rows()] == [row["access_token"] for row in before]
        read = living(store)
        assert read["token"] == stored["token"]

    def test_a_key_that_cannot_be_had_costs_no_login(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        def vault() -> KeyRing:
            raise ConfigurationError("the vault is shut")

        with pytest.raises(ConfigurationError, match="the vault is shut"):
            open_store(keys=vault).store_token()
        assert upstox.attempts() == 0

    def test_history_statistics_and_audit_hold_no_token_and_need_no_key(
        self, counting: TokenStorage, open_store: OpenStore
    ) -> None:
        def no_key() -> KeyRing:
            raise AssertionError("a key was asked for")

        stored = counting.store_token()
        counting.get_valid_token(USER)
        keyless = open_store(keys=no_key)
        told = json.dumps(
            [keyless.get_token_history(USER), keyless.get_user_statistics(USER), keyless.get_audit_trail(USER)]
        )
        assert "v2." not in told
        assert all(stored["token"][at : at + 16] not in told for at in range(0, len(stored["token"]) - 16))

    def test_keys_are_rotated_and_the_old_one_can_go(self, open_store: OpenStore) -> None:
        old, new = KeyRing.new_key(), KeyRing.new_key()
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        before = open_store(login=login, keys=KeyRing(old))
        tokens = {user_id: before.store_token(user_id)["token"] for user_id in (f"CD{n:04}" for n in range(7))}
        rotating = open_store(keys=lambda: KeyRing(new, old))
        assert rotating.rotate_keys() == 7
        assert rotating.rotate_keys() == 0
        assert rotating.keys_in_use() == {KeyRing(new).key_ids[0]: 7}
        after = open_store(keys=KeyRing(new))
        for user_id, token in tokens.items():
            read = after.get_valid_token(user_id)
            assert read is not None
            assert read["token"] == token

    def test_a_program_that_runs_since_before_the_new_key_rotates_to_it(self, open_store: OpenStore) -> None:
        old, new = KeyRing.new_key(), KeyRing.new_key()
        vault = [old]

        def keys() -> KeyRing:
            return KeyRing(*vault)

        def login(user_id: str | None) -> AccessTokenData:
            return token_data(user_id or USER)

        running = open_store(keys=keys, login=login)
        running.store_token(USER)
        vault[:] = [new, old]
        open_store(keys=keys, login=login).store_token("CD5678")
        assert running.rotate_keys() == 1
        assert running.keys_in_use() == {KeyRing(new).key_ids[0]: 2}

    def test_a_token_that_cannot_be_read_does_not_stop_a_rotation(self, open_store: OpenStore) -> None:
        lost, old, new = (KeyRing.new_key() for _ in range(3))
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        open_store(login=login, keys=KeyRing(lost)).store_token("CD0001")
        for user_id in ("CD0000", "CD0002"):
            open_store(login=login, keys=KeyRing(old)).store_token(user_id)
        rotating = open_store(keys=KeyRing(new, old))
        with pytest.raises(KeyUnavailable, match=r"^Re-encrypted 2, but not the tokens of CD0001") as caught:
            rotating.rotate_keys()
        assert caught.value.key_id == KeyRing(lost).key_ids[0]
        assert rotating.keys_in_use() == {KeyRing(new).key_ids[0]: 2, KeyRing(lost).key_ids[0]: 1}
        assert rotating.revoke_token("CD0001")
        assert rotating.rotate_keys() == 0

    def test_a_program_that_runs_for_long_learns_of_a_new_key(self, open_store: OpenStore) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        vault = [KeyRing.new_key()]
        long_running = open_store(login=login, keys=lambda: KeyRing(*vault))
        long_running.store_token(USER)
        vault.insert(0, KeyRing.new_key())
        assert open_store(keys=KeyRing(*vault)).rotate_keys() == 1
        assert living(long_running)

    # History, statistics, audit, cleanup

    def test_history_is_the_newest_first_and_not_longer_than_asked(self, store: TokenStorage, clock: Clock) -> None:
        for _ in range(3):
            store.store_token()
            clock.advance(hours=1)
        history = store.get_token_history(USER, limit=2)
        assert [row["created_at"] for row in history] == [
            ist(6, 22).astimezone(UTC).isoformat(),
            ist(6, 21).astimezone(UTC).isoformat(),
        ]
        assert {"created_at", "expires_at", "is_active", "user_name", "email", "broker"} <= set(history[0])

    def test_history_calls_a_dead_token_inactive(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        clock.set(7, 3, 30)
        assert store.get_token_history(USER)[0]["is_active"] is False
        assert store.get_user_statistics(USER)["active_tokens"] == 0

    def test_each_use_is_counted_and_audited(self, counting: TokenStorage, clock: Clock) -> None:
        stored = counting.store_token()
        clock.advance(minutes=5)
        counts = [living(counting)["usage_count"] for _ in range(3)]
        assert counts == [1, 2, 3]
        statistics = counting.get_user_statistics(USER)
        assert statistics["total_usage"] == 3
        assert statistics["avg_usage_per_token"] == 3.0
        assert statistics["last_usage"] == clock.now.astimezone(UTC).isoformat()
        used = [entry for entry in counting.get_audit_trail(USER) if entry["action"] == "used"]
        assert [entry["token_id"] for entry in used] == [stored["token_id"]] * 3
        assert {entry["actor"] for entry in used} == {"tests"}

    def test_uses_from_many_threads_are_all_counted(self, counting: TokenStorage) -> None:
        counting.store_token()
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda _: living(counting), range(200)))
        assert sorted(result["usage_count"] for result in results) == list(range(1, 201))
        assert counting.get_user_statistics(USER)["total_usage"] == 200

    def test_the_audit_trail_tells_the_whole_story(self, store: TokenStorage, clock: Clock) -> None:
        first = store.store_token()
        clock.advance(hours=1)
        second = store.store_token()
        clock.advance(hours=1)
        store.revoke_token(USER)
        told = [(entry["action"], entry["token_id"]) for entry in reversed(store.get_audit_trail(USER))]
        assert [entry for entry in told if entry[0] not in ("login",)] == [
            ("created", first["token_id"]),
            ("deactivated", first["token_id"]),
            ("created", second["token_id"]),
            ("revoked", second["token_id"]),
        ]
        newest = store.get_audit_trail(USER, limit=1)
        assert len(newest) == 1
        assert newest[0]["performed_at"] == clock.now.astimezone(UTC).isoformat()
        assert {"action", "performed_at", "metadata", "user_id", "token_created", "actor"} <= set(newest[0])

    def test_cleanup_erases_dead_tokens_and_keeps_their_history(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        assert store.cleanup_expired_tokens() == 0
        clock.set(7, 3, 30)
        assert store.cleanup_expired_tokens() == 1
        assert store.cleanup_expired_tokens() == 0
        assert [row["access_token"] for row in self.raw_rows()] == [None]
        assert len(store.get_token_history(USER)) == 1
        assert store.get_audit_trail(USER)[0]["action"] == "expired"

    def test_old_audit_entries_are_deleted_and_the_counts_stay(self, counting: TokenStorage, clock: Clock) -> None:
        counting.store_token()
        for _ in range(3):
            living(counting)
        clock.advance(days=89)
        assert counting.cleanup_old_audit_entries() == 0
        clock.advance(days=2)
        counting.store_token()
        assert counting.cleanup_old_audit_entries() == 5, "login, created and three uses"
        assert counting.cleanup_old_audit_entries() == 0
        assert counting.get_user_statistics(USER)["total_usage"] == 3
        assert [entry["action"] for entry in counting.get_audit_trail(USER)] == ["created", "deactivated", "login"]
        assert counting.cleanup_old_audit_entries(days_to_keep=0) == 0

    @pytest.mark.parametrize("cleanup", ["cleanup_expired_tokens", "cleanup_old_audit_entries"])
    def test_a_cleanup_leaves_others_their_turn_after_each_batch(
        self, open_store: OpenStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, cleanup: str
    ) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        cleaning, other = open_store(login=login), open_store(login=login)
        for number in range(7):
            other.store_token(f"CD{number:04}")
        clock.advance(days=100)
        other.store_token(USER)
        monkeypatch.setattr(storage, "BATCH", 2)
        step = "_expire" if cleanup == "cleanup_expired_tokens" else "_forget_entries"
        batch, turns = getattr(cleaning, step), []

        def others_turn_and_batch(*arguments: Any) -> int:
            turns.append(living(other)["token"] == other.store_token(USER)["token"])
            return int(batch(*arguments))

        monkeypatch.setattr(cleaning, step, others_turn_and_batch)
        assert getattr(cleaning, cleanup)() == (7 if step == "_expire" else 14), "and what is in use stays"
        assert len(turns) >= 4

    @pytest.mark.parametrize("days", [-1, 1.5, "90", None, True, 10**6])
    def test_an_odd_number_of_days_is_refused(self, store: TokenStorage, days: Any) -> None:
        with pytest.raises(InvalidInput, match="days_to_keep"):
            store.cleanup_old_audit_entries(days)

    def test_the_status_names_the_database_and_the_time(self, store: TokenStorage, clock: Clock) -> None:
        status = store.get_storage_status()
        assert status.pop("timestamp") == clock.now.astimezone(UTC).isoformat()
        status.pop("details", None)
        assert status
        assert set(status.values()) == {"healthy"}
        store.close()
        assert all(
            value.startswith("error: ")
            for key, value in store.get_storage_status().items()
            if key not in ("timestamp", "details")
        )

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

    # Out of sight

    def test_nothing_that_is_printed_or_logged_shows_a_secret(
        self, store: TokenStorage, account: Account, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        logging.getLogger("upstox-totp").setLevel(logging.DEBUG)
        try:
            result = store.store_token()
            read = store.get_valid_token(USER)
        finally:
            logging.getLogger("upstox-totp").setLevel(logging.INFO)
        text = f"{caplog.text} {result} {read!r} {store!r} {vars(store)!r}"
        assert caplog.text, "the store's own events are logged"
        for secret in (result["token"], account.totp_secret, account.client_secret):
            assert secret[:20] not in text
        # Six digits may stand in a random number as well.
        assert not re.search(rf"(?<![0-9A-Za-z]){account.pin}(?![0-9A-Za-z])", text)

    def test_a_closed_store_says_so_and_closes_twice(self, store: TokenStorage) -> None:
        store.close()
        store.close()
        with pytest.raises(StorageError, match="closed"):
            store.get_valid_token(USER)

    def test_it_is_a_context_manager(self, open_store: OpenStore) -> None:
        with open_store() as store:
            store.store_token()
        with pytest.raises(StorageError, match="closed"):
            store.store_token()
