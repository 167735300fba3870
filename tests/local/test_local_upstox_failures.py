"""The local Upstox fails on demand: at which step, how often, what the caller gets, and whether a token was made."""

from __future__ import annotations

import json
import threading
import time

import pydantic
import pytest
from curl_cffi.requests.exceptions import RequestException, Timeout
from upstox_totp import UpstoxError, ValidationError

from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from ..support.upstox_logins import OTP, answer_to_login, ask, claims, code_in, log_in, profile, refusal


class TestFailures:
    @pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
    @pytest.mark.parametrize(
        ("kind", "code"), [(Failure.RATE_LIMIT, "UDAPI10005"), (Failure.SERVER_ERROR, "UDAPI100500")]
    )
    def test_an_error_happens_at_its_step_and_once(
        self, upstox: LocalUpstox, account: Account, kind: Failure, code: str, step: int
    ) -> None:
        upstox.fail(kind, step=step)
        assert refusal(upstox, account) == code
        assert upstox.attempts() == (step >= 2)
        assert upstox.logins() == 0
        log_in(upstox, account)

    @pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
    def test_a_dropped_connection_reaches_the_sdk_at_each_step(
        self, upstox: LocalUpstox, account: Account, step: int
    ) -> None:
        upstox.fail(Failure.DROP, step=step)
        with pytest.raises(RequestException):
            answer_to_login(upstox, account)
        assert upstox.logins() == 0
        log_in(upstox, account)

    @pytest.mark.parametrize(("kind", "status"), [(Failure.RATE_LIMIT, 429), (Failure.SERVER_ERROR, 500)])
    def test_an_error_has_its_status(self, upstox: LocalUpstox, kind: Failure, status: int) -> None:
        upstox.fail(kind)
        assert ask(upstox, "POST", OTP, data={})[0] == status

    def test_a_failure_lasts_as_many_times_as_was_said(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail("rate_limit", 3)
        assert [refusal(upstox, account) for _ in range(3)] == ["UDAPI10005"] * 3
        log_in(upstox, account)

    def test_a_page_instead_of_json_makes_the_sdk_stumble(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.HTML, step=1)
        with pytest.raises(ValidationError, match="Missing required parameters"):
            answer_to_login(upstox, account)
        upstox.fail(Failure.HTML, step=2)
        with pytest.raises(AttributeError):
            answer_to_login(upstox, account)
        upstox.fail(Failure.HTML, step=6)
        assert answer_to_login(upstox, account).headers["Content-Type"] == "text/html"
        assert upstox.logins() == 0

    def test_blocked_otps_are_refused_at_step_2(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.OTP_BLOCKED)
        assert refusal(upstox, account) == "1017069"
        assert upstox.attempts() == 1

    def test_a_missing_field_breaks_the_sdks_model(self, upstox: LocalUpstox, account: Account) -> None:
        earlier = log_in(upstox, account).access_token
        upstox.fail(Failure.MISSING_FIELD)
        with pytest.raises(pydantic.ValidationError, match="is_active"):
            answer_to_login(upstox, account)
        assert upstox.logins() == 2
        assert not upstox.is_living(earlier)

    def test_a_limit_of_otps_looks_like_a_fault_but_for_its_message(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        upstox.fail(Failure.OTP_LIMIT)
        with pytest.raises(UpstoxError, match="exceeded the maximum number of times you can generate an OTP"):
            answer_to_login(upstox, account)
        upstox.fail(Failure.OTP_LIMIT)
        status, body, _ = ask(upstox, "POST", OTP, data={})
        assert (status, code_in(body)) == (500, "UDAPI100500")
        assert (upstox.attempts(), upstox.logins()) == (2, 0)
        log_in(upstox, account)

    def test_a_lost_answer_is_a_token_made_for_nobody(self, upstox: LocalUpstox, account: Account) -> None:
        earlier = log_in(upstox, account).access_token
        upstox.fail(Failure.LOST)
        with pytest.raises(RequestException):
            answer_to_login(upstox, account)
        assert upstox.logins() == 2, "curl must not send the request again, so there is only one more login"
        assert not upstox.is_living(earlier)

    @pytest.mark.parametrize(
        ("kind", "lacks"),
        [(Failure.NO_TOKEN, "access_token"), (Failure.NO_USER, "user_id"), (Failure.ENVELOPE, "broker")],
    )
    def test_an_answer_that_the_sdk_cannot_read_made_a_token(
        self, upstox: LocalUpstox, account: Account, kind: Failure, lacks: str
    ) -> None:
        earlier = log_in(upstox, account).access_token
        upstox.fail(kind)
        with pytest.raises(pydantic.ValidationError, match=lacks):
            answer_to_login(upstox, account)
        assert upstox.logins() == 2
        assert not upstox.is_living(earlier)

    def test_an_answer_of_plain_text_is_handed_back_raw_by_the_sdk(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.PLAIN_TYPE)
        answer = answer_to_login(upstox, account)
        assert answer.headers["Content-Type"] == "text/plain"
        assert upstox.is_living(json.loads(answer.text)["access_token"])

    def test_another_users_name_comes_back(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.OTHER_USER)
        assert log_in(upstox, account).user_id == "ZZ9999"
        assert log_in(upstox, account).user_id == "AB1234"

    def test_a_dead_token_is_dead_on_arrival(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.DEAD_TOKEN)
        token = log_in(upstox, account).access_token
        assert claims(token)["exp"] < time.time()
        assert not upstox.is_living(token)
        assert profile(upstox, token)[0] == 401

    def test_a_stalled_answer_comes_late_though_its_work_is_done(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.stall_seconds = 0.3
        upstox.fail(Failure.STALL, step=6)
        start = time.perf_counter()
        token = log_in(upstox, account).access_token
        assert 0.3 <= time.perf_counter() - start < 2
        assert upstox.is_living(token)

    def test_without_waiting_for_a_stalled_answer_the_token_is_lost(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        upstox.fail(Failure.STALL, step=6)
        with pytest.raises(Timeout):
            answer_to_login(upstox, account, 0.2)
        assert upstox.logins() == 1

    def test_a_slow_login_lets_others_in_meanwhile(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.login_seconds = 0.5
        accounts = [account, upstox.add_account("CD5678"), upstox.add_account("EF9012")]
        threads = [threading.Thread(target=log_in, args=(upstox, account)) for account in accounts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0.5 <= time.perf_counter() - start < 1.4
        assert upstox.logins() == 3

    @pytest.mark.parametrize(
        ("kind", "step"),
        [
            ("unknown", None),
            (Failure.DROP, 8),
            (Failure.DROP, 0),
            (Failure.OTP_BLOCKED, 6),
            ("dead_token", 2),
            (Failure.LOST, 5),
            (Failure.OTP_LIMIT, 7),
        ],
    )
    def test_a_failure_that_cannot_happen_is_refused(self, upstox: LocalUpstox, kind: str, step: int | None) -> None:
        with pytest.raises(ValueError, match=r"unknown|cannot happen"):
            upstox.fail(kind, step=step)

    def test_failures_leave_the_profile_alone(self, upstox: LocalUpstox, account: Account) -> None:
        token = log_in(upstox, account).access_token
        upstox.fail(Failure.SERVER_ERROR)
        assert profile(upstox, token)[0] == 200
