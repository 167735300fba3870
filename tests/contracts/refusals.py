"""What every store promises about accounts: each caller gets the right token, and a refusal stops all programs."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from upstox_db_examples import (
    Accounts,
    KeyRing,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    SdkLogin,
    Secret,
    StorageError,
    TokenStorage,
)
from upstox_db_examples.core.cipher import Binding
from upstox_db_examples.core.notes import EPOCH, LONGEST_LIMIT, UNKNOWN_REFUSAL, applicant_of
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.clocks import Clock, Passing
from ..support.processes import USER, jwt, made_up_login, response, token_data
from ..support.stores import OnAStore, OpenStore, held
from .backend import made_up


class RefusalContract(OnAStore):
    """Each account gets its own token, and does not log in again after a refusal."""

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
        """A login may spell the user as the caller did. Then the token under the other spelling would be a dead one."""
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
            assert asked == ["ab1234", named], "the login gets the user id that the caller gave"
        assert held(store) == held(store, "ab1234") == answers[1]["access_token"]
        assert [token.generation for token in store.backend.read_tokens(USER)] == [1, 2]
        assert store.backend.read_tokens("ab1234") == []
        assert store.get_audit_trail("ab1234") == store.get_audit_trail(USER) != []

    def test_a_row_that_only_names_the_account_is_passed_over(
        self, store: TokenStorage, open_store: OpenStore, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        mine = store.store_token()["token"]
        clock.advance(seconds=1)
        account = store.login.account  # type: ignore[attr-defined]
        forged = replace(made_up(store, "CD5678"), account=account)  # its ciphertext is not bound to an account
        store.backend.insert(forged)
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
        assert upstox.attempts() == 3, "store_token logs in deliberately, despite the refusal"
        assert open_store(login=of()).get_or_create_token(USER), "changed credentials count as different credentials"
        open_store().revoke_token(USER)
        upstox.unlock(USER)
        with pytest.raises(LoginRefused):
            programs[2].get_or_create_token(USER)
        assert upstox.attempts() == 5, "a successful login ends the refusal"

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
        applicant = applicant_of(store.login, USER)
        note = json.dumps({"credentials": applicant.credentials, "code": "1", "seconds": None, "why": "", "at": 0})
        name = f"refusal {applicant.who}"
        place = Binding(name, EPOCH, 0, f"login note of {store.backend.store_kind}")
        others = KeyRing(KeyRing.new_key()).encrypt(Secret(note), place)
        moved = store.cipher.ring.encrypt(Secret(note), place._replace(user_id="refusal user CD0001"))
        for forged in ("", note, others, moved):
            store.backend.write_note(name, forged)
            assert store.get_or_create_token(USER)
            store.revoke_token(USER)
        store.backend.write_note(name, store.cipher.ring.encrypt(Secret(note), place))
        with pytest.raises(LoginRefused):
            open_store().get_or_create_token(USER)

    def test_a_log_out_ends_the_token_here_and_at_upstox(self, store: TokenStorage, upstox: LocalUpstox) -> None:
        token = store.store_token(USER)["token"]
        assert store.log_out(USER) is True
        assert not upstox.is_living(token)
        assert held(store) is None
        assert store.log_out(USER) is False
