"""What every store promises about logins: no new token is lost, and no dead one is handed out."""

from __future__ import annotations

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from upstox_db_examples import (
    LoginInterrupted,
    LoginRefused,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
    TokenStorage,
    TotpLogin,
)
from upstox_db_examples.core.interrupts import raise_pending
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.clocks import Clock
from ..support.processes import USER, jwt, made_up_login, response, token_data, wait_until
from ..support.stores import OnAStore, OpenStore, held
from .backend import made_up


class LoginContract(OnAStore):
    """No new token is lost, and no dead token is handed out."""

    # Answers

    def test_a_real_accounts_answer_is_kept_and_its_oddities_are_named(self, store: TokenStorage) -> None:
        store.store_token()
        (created,) = [entry for entry in store.get_audit_trail(USER) if entry["action"] == "created"]
        assert created["metadata"] == {
            "fields_missing": ["poa"],
            "fields_null": ["ddpi"],
            "fields_unknown": ["is_plus_plan"],
        }

    def test_an_answer_without_any_profile_is_kept(self, open_store: OpenStore, clock: Clock) -> None:
        token = jwt(USER, clock.now)
        store = open_store(login=lambda _: {"access_token": token, "user_id": USER})
        assert store.store_token()["user_name"] is None
        assert held(store) == token

    @pytest.mark.parametrize("value", ['"AB1234"', "AB1234\r", " AB1234", "\ufeffAB1234\u00a0"])
    def test_a_user_id_of_an_env_file_is_cleaned(
        self, store: TokenStorage, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("UPSTOX_USER_ID", value)
        assert store.store_token()["user_id"] == USER
        assert held(store)

    def test_what_is_no_user_id_costs_no_login(self, open_store: OpenStore) -> None:
        class Declares:
            user_id, calls = '"AB1234', 0

            def __call__(self, user_id: str | None) -> object:
                self.calls += 1
                return token_data(user_id or USER)

        login = Declares()
        with pytest.raises(LoginRefused, match="not a user id"):
            open_store(login=login).store_token()
        assert login.calls == 0

    def test_the_one_call_login_is_as_good(self, open_store: OpenStore, account: Account, clock: Clock) -> None:
        with LocalUpstox(clock=clock, totp_once=False, limits=False) as upstox:
            upstox.add_account(USER)
            names = ("client_id", "pin_code", "totp_secret")
            few = {name: account.credentials()[name] for name in names}
            store = open_store(login=TotpLogin(few, base_domain=upstox.base_domain))
            token = store.get_or_create_token()["token"]
            assert upstox.is_living(token)
            assert store.get_or_create_token()["token"] == held(store) == token
            assert upstox.logins() == 1

    @pytest.mark.parametrize("kind", ["missing_field", "envelope", "plain_type", "no_user"])
    def test_a_token_in_an_odd_answer_is_kept(self, store: TokenStorage, upstox: LocalUpstox, kind: str) -> None:
        upstox.fail(kind, step=6)
        assert upstox.is_living(store.store_token()["token"])

    def test_the_token_of_another_user_is_stored_under_that_ones_name(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda _: token_data("CD0001", "eyJ0eXAi" + "c" * 60))
        store.backend.insert(made_up(store, USER))
        with pytest.raises(LoginRefused, match=rf"was for {USER} but logged CD0001 in"):
            store.store_token(USER)
        assert held(store, "CD0001") == "eyJ0eXAi" + "c" * 60
        assert held(store) == f"a token of {USER}, number 1", "that token was not replaced"

    # Doubt

    def test_a_lost_answer_puts_the_earlier_token_in_doubt(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        store.store_token(USER)
        upstox.fail("lost", step=6)
        with pytest.raises(LoginInterrupted) as caught:
            store.store_token(USER)
        assert caught.value.token_may_exist
        assert held(store) is None, "Upstox has killed this token"
        new = store.get_or_create_token(USER)["token"]
        assert upstox.is_living(new)
        assert upstox.logins() == 3

    def test_a_token_in_doubt_is_kept_if_upstox_says_that_it_lives(
        self, store: TokenStorage, upstox: LocalUpstox
    ) -> None:
        first = store.store_token(USER)["token"]
        upstox.fail("drop", step=6)  # The request did nothing, but nobody here can know that.
        with pytest.raises(LoginInterrupted):
            store.store_token(USER)
        assert held(store) is None
        assert store.get_or_create_token(USER)["token"] == held(store) == first
        assert upstox.logins() == 1

    def test_where_upstox_cannot_be_asked_a_login_ends_the_doubt(self, open_store: OpenStore) -> None:
        outcomes: list[Any] = ["first", ConnectionError("gone"), "second"]

        def login(_: str | None) -> Any:
            outcome = outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return token_data(USER, f"eyJ0eXAi{outcome:060}")

        store = open_store(login=login)
        store.store_token(USER)
        with pytest.raises(ConnectionError):
            store.store_token(USER)
        assert held(store) is None
        assert str(store.get_or_create_token(USER)["token"]).startswith("eyJ0eXAisecond")

    @pytest.mark.parametrize("step", range(1, 6))
    def test_a_failure_before_the_last_step_leaves_the_earlier_token_in_use(
        self, store: TokenStorage, upstox: LocalUpstox, step: int
    ) -> None:
        first = store.store_token(USER)["token"]
        for kind in ("drop", "html", "rate_limit"):
            upstox.fail(kind, step=step)
            with pytest.raises(StorageError):
                store.store_token(USER)
            assert held(store) == first
            store.backend.erase_note("limit")

    def test_a_save_that_fails_puts_the_earlier_token_in_doubt(
        self, store: TokenStorage, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token(USER)

        def down(*_: object) -> None:
            raise StoreUnavailable("The disk is full.")

        with monkeypatch.context() as broken:
            broken.setattr(store.backend, "insert", down)
            with pytest.raises(TokenNotStored) as caught:
                store.store_token(USER)
        assert upstox.is_living(caught.value.token.reveal())
        wait_until(lambda: held(store) is None)  # A lease takes a moment to end.
        saved = store.save_token(response(USER, caught.value.token.reveal()))
        assert upstox.is_living(saved["token"])
        assert held(store) == saved["token"]

    def test_the_earlier_token_is_handed_out_while_a_login_is_under_way(
        self, store: TokenStorage, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        first = store.store_token(USER)["token"]
        other, reached, go_on = open_store(), threading.Event(), threading.Event()

        def wait(step: int, moment: str) -> None:
            if (step, moment) == (5, "request"):
                reached.set()
                go_on.wait(20)

        upstox.on_step = wait
        with ThreadPoolExecutor(1) as threads:
            login = threads.submit(store.store_token, USER)
            assert reached.wait(20)
            during = held(other)
            go_on.set()
            new = login.result()["token"]
        assert (during, held(other)) == (first, new)

    # Interrupts

    def test_ctrl_c_waits_until_the_token_is_stored(self, open_store: OpenStore) -> None:
        def login(_: str | None) -> Any:
            answer = made_up_login(USER)
            signal.raise_signal(signal.SIGINT)
            minted.append(answer.access_token)
            return answer

        minted: list[str] = []
        store = open_store(login=login)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            store.store_token(USER)
        assert [held(store)] == minted
        assert signal.getsignal(signal.SIGINT) is before

    def test_ctrl_c_before_a_token_can_exist_leaves_the_earlier_one_in_use(self, open_store: OpenStore) -> None:
        def login(_: str | None) -> Any:
            signal.raise_signal(signal.SIGINT)
            raise_pending()
            raise AssertionError("it went on")

        store = open_store(login=login)
        store.backend.insert(made_up(store, USER))
        with pytest.raises(KeyboardInterrupt):
            store.store_token(USER)
        assert held(store)

    def test_a_login_inside_a_login_does_not_speak_for_the_outer_one(self, open_store: OpenStore) -> None:
        """The inner login has no token yet and lets Ctrl-C through, but the outer one may have made a token already."""

        def inner(user_id: str | None) -> Any:
            raise_pending()
            return made_up_login(user_id)

        def outer(user_id: str | None) -> Any:
            minted.append(made_up_login(user_id).access_token)
            signal.raise_signal(signal.SIGINT)
            another.store_token("CD0001")
            return response(USER, minted[-1])

        minted: list[str] = []
        another, store = open_store(login=inner), open_store(login=outer)
        store.backend.insert(made_up(store, USER))
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            store.store_token(USER)
        assert [held(store)] == minted
        assert held(another, "CD0001")
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_login_that_went_on_after_ctrl_c_may_have_made_a_token(self, open_store: OpenStore) -> None:
        def login(_: str | None) -> Any:
            signal.raise_signal(signal.SIGINT)
            with contextlib.suppress(KeyboardInterrupt):
                raise_pending()
            raise ValueError("after a second try")

        store = open_store(login=login)
        store.backend.insert(made_up(store, USER))
        with pytest.raises(ValueError, match="second try"):
            store.store_token(USER)
        assert held(store) is None

    def test_ctrl_c_twice_breaks_the_login_off(self, open_store: OpenStore) -> None:
        def login(_: str | None) -> Any:
            for _press in range(2):
                signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")

        store = open_store(login=login)
        store.backend.insert(made_up(store, USER))
        with pytest.raises(KeyboardInterrupt):
            store.store_token(USER)
        assert held(store) is None, "nobody knows what that login did"

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_in_the_save_is_raised_when_the_token_is_stored(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
    ) -> None:
        store = open_store(login=made_up_login)
        insert, calls = store.backend.insert, []

        def interrupted(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 1:
                raise interrupt
            return insert(*arguments)

        monkeypatch.setattr(store.backend, "insert", interrupted)
        with pytest.raises(interrupt):
            store.store_token(USER)
        assert held(store)

    def test_an_interrupt_and_a_save_that_fails_give_the_token_in_the_error(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def login(_: str | None) -> Any:
            signal.raise_signal(signal.SIGINT)
            return made_up_login(USER)

        def down(*_: object) -> None:
            raise StoreUnavailable("The disk is full.")

        store = open_store(login=login)
        monkeypatch.setattr(store.backend, "insert", down)
        with pytest.raises(TokenNotStored) as caught:
            store.store_token(USER)
        assert caught.value.token.reveal().startswith("eyJ")
        assert isinstance(caught.value.__cause__, KeyboardInterrupt)
