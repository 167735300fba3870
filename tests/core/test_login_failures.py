"""Logins that fail at a step, are interrupted, or log another user in."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest

from upstox_db_examples import (
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    SdkLogin,
)
from upstox_db_examples.core import sdk_login
from upstox_db_examples.core.login import Credentials
from upstox_db_examples.local import web
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from ..support.leaks import assert_shows_nothing, shown_with_locals
from ..support.processes import USER

JWT = "eyJ0eXAiOiJKV1QifQ.eyJzdWIiOiJYWTk5OTkifQ.c2lnbmF0dXJl"
ANY_STEP = (Failure.RATE_LIMIT, Failure.SERVER_ERROR, Failure.HTML, Failure.DROP, Failure.STALL)


class TestAFailure:
    @pytest.mark.parametrize("step", range(1, 7))
    @pytest.mark.parametrize("failure", ANY_STEP)
    def test_at_any_step_becomes_an_error_that_says_what_to_do_and_shows_nothing(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account, failure: Failure, step: int
    ) -> None:
        if failure is Failure.STALL:  # Only here, because any request may take this long on a busy machine.
            login = SdkLogin(account.credentials(), base_domain=upstox.base_domain, timeout=0.3)
        upstox.fail(failure, step=step)
        with pytest.raises(LoginLimited if failure is Failure.RATE_LIMIT else LoginInterrupted) as caught:
            login()
        assert_shows_nothing(caught.value, account)
        if failure is not Failure.STALL:  # the server may still be answering the abandoned request
            assert login().user_id == USER

    @pytest.mark.parametrize(("step", "may_exist"), [(step, step == 6) for step in range(1, 7)])
    @pytest.mark.parametrize("failure", [Failure.SERVER_ERROR, Failure.HTML, Failure.DROP])
    def test_leaves_a_token_in_doubt_only_if_the_last_request_was_sent(
        self, login: SdkLogin, upstox: LocalUpstox, failure: Failure, step: int, may_exist: bool
    ) -> None:
        upstox.fail(failure, step=step)
        with pytest.raises(LoginInterrupted) as caught:
            login()
        assert (caught.value.token_may_exist, caught.value.token) == (may_exist, None)

    @pytest.mark.parametrize("failure", [Failure.LOST, Failure.NO_TOKEN])
    def test_that_loses_the_token_says_so_and_does_not_take_the_extended_one(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account, failure: Failure
    ) -> None:
        upstox.fail(failure)
        with pytest.raises(LoginInterrupted) as caught:
            login()
        assert upstox.logins() == 1
        assert (caught.value.token_may_exist, caught.value.token) == (True, None)
        assert_shows_nothing(caught.value, account)

    def test_that_loses_the_token_is_not_hidden_by_curl_that_sends_the_request_again(
        self, login: SdkLogin, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def without_a_byte(handler: Any) -> None:
            handler.close_connection = True

        # On a reused connection curl believes that the server closed it long ago, and repeats the request. By then the
        # code is used up, and a definite refusal would hide the token that was made.
        monkeypatch.setattr(web.Handler, "hang_up", without_a_byte)
        upstox.fail(Failure.LOST, step=6)
        with pytest.raises(LoginInterrupted, match="broke off") as caught:
            login()
        assert (upstox.logins(), caught.value.token_may_exist) == (1, True)

    @pytest.mark.parametrize(("field", "wrong"), [("client_secret", "not-the-secret"), ("pin_code", "000001")])
    def test_that_is_a_definite_refusal_leaves_no_token_in_doubt(
        self, upstox: LocalUpstox, account: Account, field: str, wrong: str
    ) -> None:
        login = SdkLogin({**account.credentials(), field: wrong}, base_domain=upstox.base_domain)
        with pytest.raises(LoginRefused) as caught:
            login()
        assert not caught.value.token_may_exist

    def test_by_a_limit_in_the_last_step_leaves_no_token_in_doubt(self, login: SdkLogin, upstox: LocalUpstox) -> None:
        upstox.fail(Failure.RATE_LIMIT, step=6)
        with pytest.raises(LoginLimited) as caught:
            login()
        assert not caught.value.token_may_exist

    def test_by_the_limit_of_one_time_passwords_is_known_by_its_text(
        self, login: SdkLogin, upstox: LocalUpstox
    ) -> None:
        upstox.fail(Failure.OTP_LIMIT)
        with pytest.raises(LoginLimited, match="Wait 1800 s") as caught:
            login()
        assert (caught.value.code, caught.value.retry_after, caught.value.account_only) == ("UDAPI100500", 1800.0, True)

    def test_by_a_code_that_nobody_knows_is_a_refusal_with_its_code(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        login = SdkLogin({**account.credentials(), "username": "9999999999"}, base_domain=upstox.base_domain)
        with pytest.raises(LoginRefused) as caught:
            login()
        assert caught.value.code == "1017001"

    def test_by_a_block_says_how_long_to_wait(self, login: SdkLogin, upstox: LocalUpstox) -> None:
        upstox.fail(Failure.OTP_BLOCKED)
        with pytest.raises(LoginLimited, match="Wait 600 s") as caught:
            login()
        assert (caught.value.code, caught.value.retry_after) == ("1017069", 600.0)

    @pytest.mark.parametrize(
        ("field", "wrong", "says"),
        [
            ("username", "9999999999", "mobile number"),
            ("pin_code", "000001", "the PIN is wrong; five wrong ones lock the account"),
            ("totp_secret", "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP", "refused"),
            ("client_id", "somebody-elses", "the client id or the redirect URI does not match"),
            ("client_secret", "not-the-secret", "the client id or secret is wrong"),
            ("redirect_uri", "https://example.com/elsewhere", "the client id or the redirect URI does not match"),
        ],
    )
    def test_by_a_wrong_credential_says_which_and_is_never_to_be_tried_again(
        self, upstox: LocalUpstox, account: Account, field: str, wrong: str, says: str
    ) -> None:
        login = SdkLogin({**account.credentials(), field: wrong}, base_domain=upstox.base_domain)
        with pytest.raises(LoginRefused, match=says) as caught:
            login()
        assert_shows_nothing(caught.value, account)
        assert wrong not in shown_with_locals(caught.value)

    def test_by_a_code_that_was_used_up_is_to_be_tried_again(self, clock: Any) -> None:
        with LocalUpstox(clock=clock) as strict:
            again = strict.add_account(USER)
            login = SdkLogin(again.credentials(), base_domain=strict.base_domain)
            login()
            with pytest.raises(LoginInterrupted, match="a new one comes every 30 seconds"):
                login()

    def test_by_nobody_at_home_is_to_be_tried_again(self, account: Account) -> None:
        login = SdkLogin(account.credentials(), base_domain="http://127.0.0.1:9/{stage}")
        with pytest.raises(LoginInterrupted, match="could not be reached") as caught:
            login()
        assert_shows_nothing(caught.value, account)

    @pytest.mark.parametrize(
        ("oddity", "carried"),
        [
            (None, None),
            (object(), None),
            ({"access_token": "eyJ0eXAi" * 9}, "eyJ0eXAi" * 9),
            ({"token": JWT}, JWT),
            (JWT, JWT),
            (Exception("eyJ0eXAi" * 9), None),
        ],
    )
    def test_of_the_sdk_to_return_what_it_promised_is_explained_and_carries_the_token(
        self,
        login: SdkLogin,
        account: Account,
        oddity: Any,
        carried: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from upstox_totp._api.app_token import AppTokenAPI

        def odd(_: AppTokenAPI) -> Any:
            if isinstance(oddity, Exception):
                raise oddity
            return oddity

        monkeypatch.setattr(AppTokenAPI, "get_access_token", odd)
        with pytest.raises(LoginInterrupted) as caught:
            login()
        assert (caught.value.token.reveal() if caught.value.token else None) == carried
        assert caught.value.token_may_exist, "nobody saw which requests were made"
        assert_shows_nothing(caught.value, account)

    def test_that_repeats_a_credential_has_it_blacked_out(self, account: Account) -> None:
        pin = b64encode(account.pin.encode()).decode()
        says = f"PIN {account.pin} ({pin}) of {account.mobile}: eyJ0eXAi.abc-_x"
        assert Credentials(account.credentials()).redact(says) == "PIN … (…) of …: …"


class TestAnInterrupt:
    def test_is_raised_between_requests_and_shows_nothing(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def pending() -> None:
            calls.append(upstox.attempts())
            if len(calls) == 6:
                raise KeyboardInterrupt

        monkeypatch.setattr(sdk_login, "raise_pending", pending)
        with pytest.raises(KeyboardInterrupt) as caught:
            login()
        assert (len(calls), upstox.logins()) == (6, 0)
        assert_shows_nothing(caught.value, account)
        assert caught.value.token_may_exist is False  # type: ignore[attr-defined]

    def test_that_comes_after_the_answer_carries_the_token(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from upstox_totp import UpstoxTOTP

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(UpstoxTOTP, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            login()
        assert upstox.is_living(caught.value.token.reveal())  # type: ignore[attr-defined]
        assert caught.value.token_may_exist is True  # type: ignore[attr-defined]
        assert_shows_nothing(caught.value, account)


class TestCredentialsOfAnotherUser:
    @pytest.mark.parametrize("declared", [True, False])
    def test_are_found_out_before_a_one_time_password_is_asked_for(
        self, upstox: LocalUpstox, account: Account, declared: bool
    ) -> None:
        login = SdkLogin(account.credentials(), user_id="XY9999" if declared else None, base_domain=upstox.base_domain)
        with pytest.raises(LoginRefused, match=r"for XY9999.*belong to AB1234.*no token was made") as caught:
            login(None if declared else "XY9999")
        assert (upstox.attempts(), caught.value.token_may_exist, caught.value.token) == (0, False, None)
        assert_shows_nothing(caught.value, account)

    def test_are_not_those_of_the_same_user_in_lower_case(self, upstox: LocalUpstox, account: Account) -> None:
        login = SdkLogin(account.credentials(), user_id="ab1234", base_domain=upstox.base_domain)
        assert login("Ab1234").user_id == USER
