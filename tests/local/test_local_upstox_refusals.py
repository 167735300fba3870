"""What the local Upstox refuses, and with which code."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import pyotp
import pytest
from upstox_totp import UpstoxError

from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.upstox_logins import (
    APPROVAL,
    OTP,
    PIN,
    TOTP,
    ByHand,
    answer_to_login,
    ask,
    code_in,
    for_the_sdk,
    leave_a_second_of_this_totp,
    log_in,
    refusal,
)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changed", "code"),
        [
            ({"username": "5000000000"}, "1017001"),
            ({"totp_secret": "A" * 32}, "1017070"),
            ({"pin_code": "000000"}, "1017106"),
            ({"client_id": "unknown"}, "UDAPI100068"),
            ({"redirect_uri": "https://127.0.0.1/other"}, "UDAPI100068"),
            ({"client_secret": "wrong"}, "UDAPI100069"),
        ],
    )
    def test_wrong_credentials_give_no_token(
        self, upstox: LocalUpstox, account: Account, changed: dict[str, str], code: str
    ) -> None:
        living = log_in(upstox, account).access_token
        assert refusal(upstox, account, **changed) == code
        assert upstox.logins() == 1
        assert upstox.is_living(living)

    def test_an_unknown_mobile_number_is_named(self, upstox: LocalUpstox, account: Account) -> None:
        with pytest.raises(UpstoxError, match="mobile number"):
            answer_to_login(upstox, account, username="5000000000")

    def test_another_users_mobile_number_is_refused(self, upstox: LocalUpstox, account: Account) -> None:
        assert refusal(upstox, account, username=upstox.add_account("CD5678").mobile) == "1017001"

    def test_an_inactive_app_is_refused(self, upstox: LocalUpstox) -> None:
        assert refusal(upstox, upstox.add_account("AB1234", client_active=False)) == "UDAPI100073"

    def test_a_wrong_pin_says_how_many_attempts_are_left(self, upstox: LocalUpstox, account: Account) -> None:
        for left in (4, 3):
            with pytest.raises(UpstoxError, match=f"{left} attempts left"):
                answer_to_login(upstox, account, pin_code="000000")

    def test_a_pin_that_is_encoded_twice_is_wrong(self, upstox: LocalUpstox, account: Account) -> None:
        twice = base64.b64encode(account.pin.encode()).decode()  # as the SDK's from_env_file does
        assert refusal(upstox, account, pin_code=twice) == "1017106"

    def test_five_wrong_pins_lock_the_account_until_it_is_unlocked(self, upstox: LocalUpstox, account: Account) -> None:
        codes = [refusal(upstox, account, pin_code="000000") for _ in range(5)]
        assert codes == ["1017106"] * 4 + ["1017108"]
        assert refusal(upstox, account) == "1017108"
        log_in(upstox, upstox.add_account("CD5678"))
        upstox.unlock("AB1234")
        log_in(upstox, account)

    def test_a_right_pin_forgets_the_wrong_ones(self, upstox: LocalUpstox, account: Account) -> None:
        for _ in range(2):
            for _ in range(4):
                assert refusal(upstox, account, pin_code="000000") == "1017106"
            log_in(upstox, account)

    def test_a_totp_serves_once(self, account: Account) -> None:
        with LocalUpstox() as upstox:
            by_hand = ByHand(upstox, upstox.add_account(account.user_id))
            code = pyotp.TOTP(account.totp_secret).now()
            assert by_hand.verify(by_hand.otp_token(), code)["success"]
            assert code_in(by_hand.verify(by_hand.otp_token(), code)) == "1017076"
            other = ByHand(upstox, upstox.add_account("CD5678"))
            assert other.verify(other.otp_token())["success"]

    def test_two_sdk_logins_within_one_totp_are_refused(self) -> None:
        with for_the_sdk(LocalUpstox()) as upstox:
            account = upstox.add_account("AB1234")
            codes = []
            for _ in range(3):  # at least two of three fall into the same step of 30 s
                try:
                    log_in(upstox, account)
                except UpstoxError as error:
                    codes.append(code_in(error.details or {}))
            assert "1017076" in codes

    @pytest.mark.parametrize(("drift", "taken"), [(-2, False), (-1, True), (0, True), (1, True), (2, False)])
    def test_a_totp_may_be_one_step_off(self, by_hand: ByHand, drift: int, taken: bool) -> None:
        otp_token = by_hand.otp_token()
        leave_a_second_of_this_totp()
        totp = pyotp.TOTP(by_hand.account.totp_secret)
        assert by_hand.verify(otp_token, totp.at(int(time.time()) + 30 * drift))["success"] is taken

    def test_an_otp_token_serves_once(self, by_hand: ByHand) -> None:
        otp_token = by_hand.otp_token()
        assert by_hand.verify(otp_token)["success"]
        assert code_in(by_hand.verify(otp_token)) == "1017076"
        assert code_in(by_hand.verify("made-up")) == "1017076"

    @pytest.mark.parametrize("step", [ByHand.pin, ByHand.approve])
    @pytest.mark.parametrize("cookie", ["", "session=made-up"])
    def test_pin_and_approval_need_the_session_cookie(
        self, by_hand: ByHand, step: Callable[[ByHand], dict[str, Any]], cookie: str
    ) -> None:
        by_hand.to_session()
        by_hand.pin()
        by_hand.cookie = cookie
        assert code_in(step(by_hand)) == "1017076"

    @pytest.mark.parametrize("step", [ByHand.pin, ByHand.approve])
    def test_pin_and_approval_need_this_logins_own_client_id(
        self, by_hand: ByHand, step: Callable[[ByHand], dict[str, Any]]
    ) -> None:
        by_hand.to_session()
        by_hand.pin()
        by_hand.where["client_id"] = by_hand.account.client_id
        assert code_in(step(by_hand)) == "1017076"

    def test_a_session_does_not_serve_another_users_login(self, by_hand: ByHand) -> None:
        other = ByHand(by_hand.upstox, by_hand.upstox.add_account("CD5678")).to_session()
        by_hand.to_session().where["client_id"] = other.where["client_id"]
        assert code_in(by_hand.pin()) == "1017076"

    def test_pin_and_approval_need_the_inner_redirect_uri(self, by_hand: ByHand) -> None:
        by_hand.to_session().where["redirect_uri"] = by_hand.account.redirect_uri
        assert code_in(by_hand.pin()) == "UDAPI100068"

    def test_an_approval_needs_the_pin_first(self, by_hand: ByHand) -> None:
        assert code_in(by_hand.to_session().approve()) == "1017076"
        by_hand.pin("000000")
        assert code_in(by_hand.approve()) == "1017076"
        by_hand.pin()
        assert by_hand.approve()["success"]

    def test_an_approval_must_be_one(self, by_hand: ByHand) -> None:
        by_hand.to_session().pin()
        assert code_in(by_hand.in_session(APPROVAL, userOAuthApproval=False)) == "UDAPI100036"

    def test_a_session_serves_for_one_code(self, by_hand: ByHand) -> None:
        by_hand.code()
        assert code_in(by_hand.approve()) == "1017076"
        assert code_in(by_hand.pin()) == "1017076"

    def test_a_code_serves_once(self, by_hand: ByHand) -> None:
        code = by_hand.code()
        assert by_hand.token(code)[0] == 200
        status, body = by_hand.token(code)
        assert (status, code_in(body)) == (401, "UDAPI100057")
        assert by_hand.upstox.logins() == 1

    def test_a_code_is_used_up_by_a_wrong_secret(self, by_hand: ByHand) -> None:
        code = by_hand.code()
        assert code_in(by_hand.token(code, client_secret="wrong")[1]) == "UDAPI100069"
        assert code_in(by_hand.token(code)[1]) == "UDAPI100057"

    def test_a_code_of_another_user_is_refused(self, by_hand: ByHand) -> None:
        other = ByHand(by_hand.upstox, by_hand.upstox.add_account("CD5678"))
        assert code_in(other.token(by_hand.code())[1]) == "UDAPI100057"

    @pytest.mark.parametrize(
        ("changed", "code"),
        [
            ({"client_id": "unknown"}, "UDAPI100069"),
            ({"redirect_uri": "https://127.0.0.1/other"}, "UDAPI100068"),
            ({"grant_type": "password"}, "UDAPI100036"),
        ],
    )
    def test_the_last_step_checks_all_it_is_shown(self, by_hand: ByHand, changed: dict[str, str], code: str) -> None:
        assert code_in(by_hand.token(by_hand.code(), **changed)[1]) == code

    def test_what_it_does_not_know_it_says_so(self, upstox: LocalUpstox) -> None:
        status, body, headers = ask(upstox, "GET", "/api/v2/orders")
        assert (status, code_in(body), headers["Content-Type"]) == (404, "UDAPI10000", "application/json")

    @pytest.mark.parametrize("data", [{}, {"userId": ["AB1234"], "validateOtpToken": {}, "inputText": None}])
    def test_a_request_without_its_fields_is_refused(self, upstox: LocalUpstox, data: dict[str, Any]) -> None:
        for path in (OTP, TOTP, PIN, APPROVAL):
            assert ask(upstox, "POST", path, data=data)[1]["success"] is False
