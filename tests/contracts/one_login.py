"""What every store promises to callers that want a token at the same time, and about logins that fail."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    LoginError,
    LoginInterrupted,
    LoginRefused,
    LoginSuperseded,
    SdkLogin,
    StorageError,
    TokenNotStored,
    TokenStorage,
)
from upstox_db_examples.core.locks import ENTRIES_LOCK
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from ..support.clocks import Clock, ist
from ..support.leaks import shown_with_locals
from ..support.processes import USER, jwt, token_data
from ..support.stores import OnAStore, OpenStore, living


class OneLoginContract(OnAStore):
    """Only one login runs at a time, and a failed login leaves the right things behind."""

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

    def test_a_caller_that_names_no_user_finds_its_own_token_after_a_restart(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        token = store.get_or_create_token()["token"]
        assert open_store().get_or_create_token()["token"] == token
        assert upstox.logins() == 1

    def test_a_caller_that_names_no_user_never_gets_another_accounts_token(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        store.get_or_create_token()
        other = SdkLogin(upstox.add_account("XY9999").credentials(), base_domain=upstox.base_domain)
        assert open_store(login=other).get_or_create_token()["user_id"] == "XY9999"
        assert store.get_or_create_token()["user_id"] == USER

    def test_a_caller_that_changes_its_credentials_gets_the_new_accounts_token(
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

    def test_a_caller_that_waits_too_long_gets_a_clear_error(
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
            store.backend.lock(ENTRIES_LOCK),
            pytest.raises(StorageError, match="for another transfer"),
            impatient.backend.lock(ENTRIES_LOCK),
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

    def test_a_token_that_was_stored_meanwhile_stays(self, open_store: OpenStore, clock: Clock) -> None:
        other = open_store(login=lambda _: token_data(USER, jwt(USER, clock.now)))

        def slow_and_overtaken(_: str | None) -> AccessTokenData:
            minted = token_data(USER, jwt(USER, clock.now))
            clock.advance(seconds=3)
            overtaking.append(other.store_token(USER)["token"])  # This kills the token of the slow login.
            return minted

        overtaking: list[str] = []
        with pytest.raises(LoginSuperseded) as caught:
            open_store(login=slow_and_overtaken).store_token()
        assert caught.value.token is not None, "the token must be in the error"
        assert [living(other)["token"]] == overtaking

    @pytest.mark.parametrize("step", ["find_newest", "encrypt", "insert"])
    def test_a_token_is_not_lost_whatever_fails_after_the_login(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        store = open_store(login=lambda _: token_data(USER))

        def odd(*_: object, **__: object) -> None:
            raise ValueError("a driver's own error, as for a name that it cannot write")

        def login(_: str | None) -> AccessTokenData:
            monkeypatch.setattr(store.cipher if step == "encrypt" else store.backend, step, odd)
            return token_data(USER)

        store.login = login
        with pytest.raises(TokenNotStored) as caught:
            store.store_token()
        assert caught.value.token.reveal() == token_data(USER).access_token

    def test_an_opaque_token_is_kept_until_half_past_three(self, open_store: OpenStore, clock: Clock) -> None:
        store = open_store(login=lambda _: token_data(USER, "opaque-" * 9))
        result = store.store_token()
        assert datetime.fromisoformat(result["expires_at"]) == ist(7, 3, 30)
        assert clock.now < ist(7, 3, 30)
