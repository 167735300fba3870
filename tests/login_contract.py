"""What every store promises of logins: no minted token is lost, and no dead one is handed out."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from upstox_db_examples import (
    Accounts,
    InvalidInput,
    KeyRing,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    LoginSuperseded,
    SdkLogin,
    Secret,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
    TokenStorage,
    TotpLogin,
)
from upstox_db_examples.core.cipher import Binding
from upstox_db_examples.core.interrupts import raise_pending
from upstox_db_examples.core.notes import EPOCH, LONGEST_LIMIT, UNKNOWN_REFUSAL
from upstox_db_examples.local.upstox import Account, LocalUpstox

from .backend_contract import made_up
from .conftest import Clock, shown_with_locals
from .processes import USER, jwt, made_up_login, token_data, wait_until

OpenStore = Callable[..., TokenStorage]


def held(store: TokenStorage, user_id: str = USER) -> str | None:
    read = store.get_valid_token(user_id)
    return read["token"] if read else None


def response(user_id: str, token: str, **more: Any) -> dict[str, Any]:
    return {"user_id": user_id, "access_token": token, **more}


class Passing:
    """Lets a store's notes believe that so many seconds have passed in the database."""

    def __init__(self, *stores: TokenStorage) -> None:
        self.seconds = 0.0
        for store in stores:
            store._notes = self._later(store._notes)  # type: ignore[method-assign]

    def _later(self, told: Any) -> Any:
        def notes(names: list[str]) -> tuple[float, dict[str, str]]:
            now, there = told(names)
            return now + self.seconds, there

        return notes


class LoginContract:
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
        store._insert(made_up(store, USER))
        with pytest.raises(LoginRefused, match=rf"was for {USER} but logged CD0001 in"):
            store.store_token(USER)
        assert held(store, "CD0001") == "eyJ0eXAi" + "c" * 60
        assert held(store) == f"a token of {USER}, number 1", "that one was not replaced"

    # Doubt

    def test_a_lost_answer_puts_the_earlier_token_in_doubt(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        store.store_token(USER)
        upstox.fail("lost", step=6)
        with pytest.raises(LoginInterrupted) as caught:
            store.store_token(USER)
        assert caught.value.token_may_exist
        assert held(store) is None, "Upstox has killed it"
        new = store.get_or_create_token(USER)["token"]
        assert upstox.is_living(new)
        assert upstox.logins() == 3

    def test_a_token_in_doubt_is_kept_if_upstox_says_that_it_lives(
        self, store: TokenStorage, upstox: LocalUpstox
    ) -> None:
        first = store.store_token(USER)["token"]
        upstox.fail("drop", step=6)  # The request did nothing, which nobody here can know.
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
            store._erase_note("limit")

    def test_a_save_that_fails_puts_the_earlier_token_in_doubt(
        self, store: TokenStorage, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token(USER)

        def down(*_: object) -> None:
            raise StoreUnavailable("The disk is full.")

        with monkeypatch.context() as broken:
            broken.setattr(store, "_insert", down)
            with pytest.raises(TokenNotStored) as caught:
                store.store_token(USER)
        assert upstox.is_living(caught.value.token.reveal())
        wait_until(lambda: held(store) is None)  # A lease is not over in the same moment.
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
        store._insert(made_up(store, USER))
        with pytest.raises(KeyboardInterrupt):
            store.store_token(USER)
        assert held(store)

    def test_a_login_inside_a_login_does_not_speak_for_the_outer_one(self, open_store: OpenStore) -> None:
        """The inner one has no token yet and lets Ctrl-C through; the outer one may have minted its own."""

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
        store._insert(made_up(store, USER))
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
        store._insert(made_up(store, USER))
        with pytest.raises(ValueError, match="second try"):
            store.store_token(USER)
        assert held(store) is None

    def test_ctrl_c_twice_breaks_the_login_off(self, open_store: OpenStore) -> None:
        def login(_: str | None) -> Any:
            for _press in range(2):
                signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")

        store = open_store(login=login)
        store._insert(made_up(store, USER))
        with pytest.raises(KeyboardInterrupt):
            store.store_token(USER)
        assert held(store) is None, "nobody knows what that login did"

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_in_the_save_is_raised_when_the_token_is_stored(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
    ) -> None:
        store = open_store(login=made_up_login)
        insert, calls = store._insert, []

        def interrupted(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 1:
                raise interrupt
            return insert(*arguments)

        monkeypatch.setattr(store, "_insert", interrupted)
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
        monkeypatch.setattr(store, "_insert", down)
        with pytest.raises(TokenNotStored) as caught:
            store.store_token(USER)
        assert caught.value.token.reveal().startswith("eyJ")
        assert isinstance(caught.value.__cause__, KeyboardInterrupt)

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
        assert len(store.get_token_history(USER)) == 2, "what loses, and what is there, changes nothing"
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
            "died": jwt(USER, now - timedelta(days=1)),
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

    def raw_rows(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def test_upstox_is_asked_where_that_is_wanted(
        self, store: TokenStorage, upstox: LocalUpstox, account: Account, clock: Clock
    ) -> None:
        payload = upstox.notify(account.user_id)
        clock.advance(seconds=1)
        upstox.notify(account.user_id)
        with pytest.raises(InvalidInput, match="does not accept this"):
            store.save_token(payload, verify=True)
        assert store.save_token(payload), "the caller vouches for it"

    # renew_token

    def test_a_refused_token_is_renewed_once(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        refused = store.store_token(USER)
        upstox.kill_token(USER)
        renewed = store.renew_token(USER, refused)
        assert upstox.is_living(renewed["token"])
        assert store.renew_token(USER, refused["token"])["token"] == renewed["token"], "a newer one is stored"
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
        assert store.store_token(USER), "a deliberate login goes past that"

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

    # Whose token

    def test_another_user_than_the_known_one_is_refused_before_a_request(
        self, store: TokenStorage, upstox: LocalUpstox
    ) -> None:
        store.store_token()
        for call in (store.store_token, store.get_or_create_token, lambda user: store.renew_token(user, "eyJ0eXAi")):
            with pytest.raises(LoginRefused, match=f"belong to {USER}, not CD5678"):
                call("CD5678")
        (result,) = store.store_token_batch(["CD5678"], progress=False)
        assert not result["success"]
        assert upstox.attempts() == 1

    def test_an_id_in_lower_case_is_the_same_user(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        token = store.store_token("ab1234")["token"]
        assert held(store, "ab1234") == held(store, USER) == token
        assert store.get_or_create_token("Ab1234")["token"] == token
        assert store.get_token_history("ab1234") == store.get_token_history(USER)
        assert store.get_audit_trail("ab1234", limit=1)
        assert store.get_user_statistics("ab1234")["total_tokens"] == 1
        assert store.renew_token("ab1234", token)["user_id"] == USER
        assert store.revoke_token("ab1234")
        assert upstox.logins() == 2

    @pytest.mark.parametrize("named", ["ab1234", "AB1234", None, "save_token"])
    def test_a_user_in_two_spellings_has_one_token(
        self, open_store: OpenStore, clock: Clock, named: str | None
    ) -> None:
        """A login may name its user as the caller did; the token under the other spelling would be a dead one."""
        answers = [response("ab1234", "eyJ0eXAi" + "a" * 60), response("AB1234", jwt("AB1234", clock.now))]
        asked: list[str | None] = []

        def login(user_id: str | None) -> Any:
            asked.append(user_id)
            return answers[len(asked) - 1]

        store = open_store(login=login)
        assert store.store_token("ab1234")["user_id"] == USER
        if named == "save_token":
            store.save_token(answers[1])
        else:
            store.store_token(named)
            assert asked == ["ab1234", named], "a login is asked as the caller asked"
        assert held(store) == held(store, "ab1234") == answers[1]["access_token"]
        assert [token.generation for token in store._tokens_of(USER)] == [1, 2]
        assert store._tokens_of("ab1234") == []
        assert store.get_audit_trail("ab1234") == store.get_audit_trail(USER) != []

    def test_a_row_that_only_names_the_account_is_passed_over(
        self, store: TokenStorage, open_store: OpenStore, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        mine = store.store_token()["token"]
        clock.advance(seconds=1)
        account = store._login.account  # type: ignore[attr-defined]
        forged = replace(made_up(store, "CD5678"), account=account)  # its ciphertext is bound to no account
        store._insert(forged)
        with caplog.at_level(logging.WARNING):
            assert open_store().get_or_create_token()["token"] == mine
        assert "CD5678 names this account" in caplog.text

    def test_a_deliberate_login_is_not_bound_to_whom_the_last_one_logged_in(self, open_store: OpenStore) -> None:
        asked: list[str | None] = []

        def login(user_id: str | None) -> Any:
            asked.append(user_id)
            return token_data(["AB1234", "CD5678"][len(asked) - 1], f"eyJ0eXAi{len(asked):060}")

        store = open_store(login=login)
        assert [store.store_token()["user_id"] for _ in range(2)] == ["AB1234", "CD5678"]
        assert asked == [None, None]

    # Refusals

    def test_wrong_credentials_cost_one_attempt_for_all_programs(
        self, open_store: OpenStore, upstox: LocalUpstox, account: Account
    ) -> None:
        def of(**changed: str) -> SdkLogin:
            return SdkLogin({**account.credentials(), **changed}, base_domain=upstox.base_domain)

        kept = open_store().store_token(USER)["token"]
        open_store().revoke_token(USER)
        programs = [open_store(login=of(pin_code="000000")) for _ in range(6)]
        for program in programs:
            for call in (program.get_or_create_token, lambda user, p=program: p.renew_token(user, kept)):
                with pytest.raises(LoginRefused, match="PIN") as caught:
                    call(USER)
                assert caught.value.code == "1017106"
        assert upstox.attempts() == 2
        assert "upstox-db login" in str(caught.value)
        (result,) = programs[0].store_token_batch([USER], progress=False, replace=True)
        assert not result["success"]
        with pytest.raises(LoginRefused):
            programs[1].store_token(USER)
        assert upstox.attempts() == 3, "the deliberate way past it"
        assert open_store(login=of()).get_or_create_token(USER), "changed credentials are other ones"
        open_store().revoke_token(USER)
        upstox.unlock(USER)
        with pytest.raises(LoginRefused):
            programs[2].get_or_create_token(USER)
        assert upstox.attempts() == 5, "and a success is the end of the refusal"

    def test_each_account_is_refused_for_itself(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        tables = {user_id: upstox.add_account(user_id).credentials() for user_id in ("CD0001", "CD0002")}
        tables["CD0001"]["pin_code"] = "000000"
        store = open_store(login=Accounts(tables, base_domain=upstox.base_domain))
        for _ in range(2):
            with pytest.raises(LoginRefused):
                store.get_or_create_token("CD0001")
        assert store.get_or_create_token("CD0002")
        assert upstox.attempts("CD0001") == 1

    def test_a_login_that_tells_no_account_waits_per_user(self, open_store: OpenStore) -> None:
        asked: list[str | None] = []

        def login(user_id: str | None) -> Any:
            asked.append(user_id)
            if user_id == "CD0001":
                raise LoginRefused("The PIN is wrong.", "1017106")
            return made_up_login(user_id)

        store = open_store(login=login)
        for _ in range(2):
            with pytest.raises(LoginRefused):
                store.get_or_create_token("CD0001")
            store.get_or_create_token("CD0002")
        assert asked == ["CD0001", "CD0002"]

    @pytest.mark.parametrize(
        ("error", "pause"),
        [
            (LoginRefused("A code that nobody knows.", "UDAPI999999"), UNKNOWN_REFUSAL),
            (LoginLimited("Wait.", "UDAPI10005", 60.0), 60),
            (LoginLimited("Wait.", "1017069", 600.0, account_only=True), 600),
            (LoginLimited("Wait.", "UDAPI10005", 9e9), LONGEST_LIMIT),
            (LoginRefused("It was refused before a request."), 0),
            (LoginInterrupted("It broke off.", "UDAPI100500"), 0),
        ],
    )
    def test_what_passes_by_itself_is_waited_for_and_no_longer(
        self, open_store: OpenStore, error: StorageError, pause: float
    ) -> None:
        asked: list[str | None] = []

        def login(user_id: str | None) -> Any:
            asked.append(user_id)
            if len(asked) == 1:
                raise error
            return made_up_login(user_id)

        store, other = open_store(login=login), open_store(login=login)
        passing = Passing(store, other)
        with pytest.raises(type(error)):
            store.get_or_create_token(USER)
        if pause:
            passing.seconds = pause - 5
            with pytest.raises(type(error)) as caught:
                other.get_or_create_token(USER)
            if isinstance(caught.value, LoginLimited):
                assert 0 < caught.value.retry_after <= 5
                with pytest.raises(LoginLimited):
                    other.store_token(USER)
        assert len(asked) == 1
        passing.seconds = pause + 0.1
        assert other.get_or_create_token(USER)

    def test_a_forged_note_stops_nobody(self, store: TokenStorage, open_store: OpenStore) -> None:
        applicant = store._applicant(USER)
        note = json.dumps({"credentials": applicant.credentials, "code": "1", "seconds": None, "why": "", "at": 0})
        name = f"refusal {applicant.who}"
        place = Binding(name, EPOCH, 0, f"login note of {store._kind}")
        others = KeyRing(KeyRing.new_key()).encrypt(Secret(note), place)
        moved = store._ring.encrypt(Secret(note), place._replace(user_id="refusal user CD0001"))
        for forged in ("", note, others, moved):
            store._write_note(name, forged)
            assert store.get_or_create_token(USER)
            store.revoke_token(USER)
        store._write_note(name, store._ring.encrypt(Secret(note), place))
        with pytest.raises(LoginRefused):
            open_store().get_or_create_token(USER)

    def test_a_log_out_ends_the_token_here_and_at_upstox(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        token = store.store_token(USER)["token"]
        assert store.log_out(USER) is True
        assert not upstox.is_living(token)
        assert held(store) is None
        assert store.log_out(USER) is False
