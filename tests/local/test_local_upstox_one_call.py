"""The official one-call login at the local Upstox: what it returns, what it refuses, its limits and its failures."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pyotp
import pytest

from upstox_db_examples.local.answers import TOKEN_FIELDS
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from ..support.clocks import FakeTime
from ..support.upstox_logins import ONE_CALL, ByHand, ask, claims, code_in, leave_a_second_of_this_totp, profile


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False, limits=False) as server:
        yield server


def one_call(upstox: LocalUpstox, account: Account, *, headers: dict[str, str] | None = None, **changed: object) -> Any:
    """Log in with one call, and return status and JSON."""
    body = {"totp": pyotp.TOTP(account.totp_secret).now(), "pin": account.pin, **changed}
    return ask(upstox, "POST", ONE_CALL, whole=body, headers=headers or {"x-api-key": account.client_id})[:2]


def refusal(upstox: LocalUpstox, account: Account, **changed: Any) -> tuple[int, str]:
    status, body = one_call(upstox, account, **changed)
    assert body["status"] == "error"
    return status, code_in(body)


class TestLogin:
    def test_gives_the_flat_answer_of_step_6(self, upstox: LocalUpstox, account: Account) -> None:
        status, body = one_call(upstox, account)
        assert (status, body["user_id"]) == (200, "AB1234")
        assert TOKEN_FIELDS - set(body) == {"poa"}
        assert profile(upstox, body["access_token"])[0] == 200
        assert profile(upstox, body["extended_token"])[0] == 401

    def test_has_the_shape_that_was_asked_for(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.shape_answers(missing=("email",))
        assert TOKEN_FIELDS - set(one_call(upstox, account)[1]) == {"email"}

    def test_kills_the_earlier_token_and_is_counted_with_the_others(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        by_hand = ByHand(upstox, account)
        earlier = by_hand.token(by_hand.code())[1]["access_token"]
        assert (upstox.logins("AB1234"), upstox.attempts("AB1234")) == (1, 1)
        token = one_call(upstox, account)[1]["access_token"]
        refusal(upstox, account, pin="000000")
        assert (upstox.is_living(earlier), upstox.is_living(token)) == (False, True)
        assert (upstox.logins("AB1234"), upstox.attempts("AB1234"), upstox.attempts()) == (2, 3, 3)

    def test_takes_as_long_as_was_said_though_its_token_is_made_at_once(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        upstox.login_seconds = 0.4
        made: list[int] = []
        upstox.on_step = lambda step, what: made.append(upstox.logins()) if (step, what) == (7, "answer") else None
        start = time.perf_counter()
        one_call(upstox, account)
        assert 0.4 <= time.perf_counter() - start < 2
        assert made == [1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changed", "refused"),
        [
            ({"headers": {"x-api-key": "unknown"}}, (401, "UDAPI100016")),
            ({"headers": {"accept": "application/json"}}, (401, "UDAPI100016")),
            ({"totp": None}, (400, "UDAPI100036")),
            ({"totp": 123456}, (400, "UDAPI100036")),
            ({"totp": "12345"}, (400, "UDAPI100036")),
            ({"pin": None}, (400, "UDAPI100036")),
            ({"pin": "1234567"}, (400, "UDAPI100036")),
            ({"pin": ["123456"]}, (400, "UDAPI100036")),
            ({"pin": "000000"}, (401, "1017106")),
        ],
    )
    def test_make_no_token_and_leave_the_earlier_one(
        self, upstox: LocalUpstox, account: Account, changed: dict[str, Any], refused: tuple[int, str]
    ) -> None:
        living = one_call(upstox, account)[1]["access_token"]
        assert refusal(upstox, account, **changed) == refused
        assert upstox.logins() == 1
        assert upstox.is_living(living)

    def test_of_a_body_that_is_not_the_documented_one(self, upstox: LocalUpstox, account: Account) -> None:
        right = {"totp": pyotp.TOTP(account.totp_secret).now(), "pin": account.pin}
        key = {"x-api-key": account.client_id}
        wrong: list[dict[str, Any]] = [
            {"data": right},
            {"whole": [right]},
            {"whole": right, "headers": key | {"Content-Type": "text/plain"}},
            {"form": {**right, "client_id": account.client_id}},
            {"form": {**right, "body": "made up"}},
            {},
        ]
        for each in wrong:
            status, body, _ = ask(upstox, "POST", ONE_CALL, **({"headers": key} | each))
            assert (status, code_in(body)) == (400, "UDAPI100036"), each
        assert ask(upstox, "POST", ONE_CALL, whole=right, headers=key)[0] == 200

    def test_of_an_inactive_app(self, upstox: LocalUpstox) -> None:
        assert refusal(upstox, upstox.add_account("AB1234", client_active=False)) == (401, "UDAPI100073")

    def test_of_an_account_without_totp_which_can_log_in_by_the_six_steps(self, upstox: LocalUpstox) -> None:
        account = upstox.add_account("AB1234", totp_login=False)
        assert refusal(upstox, account) == (401, "UDAPI100016")
        by_hand = ByHand(upstox, account)
        assert by_hand.token(by_hand.code())[0] == 200

    def test_of_a_wrong_totp_costs_no_pin(self, upstox: LocalUpstox, account: Account) -> None:
        leave_a_second_of_this_totp()
        wrong = pyotp.TOTP(account.totp_secret).at(int(time.time()) + 3000)
        for _ in range(6):
            assert refusal(upstox, account, totp=wrong, pin="000000") == (401, "1017070")
        assert one_call(upstox, account)[0] == 200

    def test_of_a_totp_that_has_served_whichever_login_it_served(self) -> None:
        with LocalUpstox(limits=False) as upstox:
            account = upstox.add_account("AB1234")
            leave_a_second_of_this_totp()
            by_hand = ByHand(upstox, account).to_session()
            assert by_hand.pin()["success"]
            assert refusal(upstox, account) == (401, "1017076")
            other = upstox.add_account("CD5678")
            code = pyotp.TOTP(other.totp_secret).now()
            assert refusal(upstox, other, totp=code, pin="000000") == (401, "1017106")
            assert refusal(upstox, other, totp=code) == (401, "1017076")

    def test_of_a_pin_count_to_the_lock_of_both_logins(self, upstox: LocalUpstox, account: Account) -> None:
        by_hand = ByHand(upstox, account).to_session()
        assert code_in(by_hand.pin("000000")) == "1017106"
        assert [refusal(upstox, account, pin="000000")[1] for _ in range(4)] == ["1017106"] * 3 + ["1017108"]
        assert refusal(upstox, account) == (401, "1017108")
        assert code_in(by_hand.pin()) == "1017108"
        upstox.unlock("AB1234")
        assert one_call(upstox, account)[0] == 200


class TestLimits:
    @pytest.fixture
    def time(self) -> FakeTime:
        return FakeTime()

    @pytest.fixture
    def limited(self, time: FakeTime) -> Iterator[LocalUpstox]:
        with LocalUpstox(totp_once=False, monotonic=time.clock) as server:
            yield server

    @pytest.mark.parametrize(
        ("taken", "refused", "again"),
        [
            ([0.0], [0.5, 0.99], 1.0),
            ([*range(10)], [10, 59.9], 60.0),
            ([*range(0, 360, 6)], [360, 1799], 1800.0),
        ],
        ids=["second", "minute", "half hour"],
    )
    def test_let_through_as_many_as_is_documented(
        self, limited: LocalUpstox, time: FakeTime, taken: list[float], refused: list[float], again: float
    ) -> None:
        account = limited.add_account("AB1234")
        for moment, status in [*((t, 200) for t in taken), *((t, 429) for t in refused), (again, 200)]:
            time.now = moment
            assert one_call(limited, account)[0] == status, moment
        assert refusal(limited, account) == (429, "UDAPI10005")

    def test_of_one_second_hold_without_any_setting(self) -> None:
        with LocalUpstox(totp_once=False) as upstox:
            account, other = upstox.add_account("AB1234"), upstox.add_account("CD5678")
            assert one_call(upstox, account)[0] == 200
            assert refusal(upstox, account) == (429, "UDAPI10005")
            assert one_call(upstox, other)[0] == 200, "each app has its own limit"
            assert (upstox.logins("AB1234"), upstox.attempts("AB1234")) == (1, 2)

    def test_leave_the_six_steps_alone(self, limited: LocalUpstox) -> None:
        by_hand = ByHand(limited, limited.add_account("AB1234"))
        assert [by_hand.token(by_hand.code())[0] for _ in range(3)] == [200] * 3

    def test_are_asked_before_a_planned_failure_is_used_up(self, limited: LocalUpstox, time: FakeTime) -> None:
        account = limited.add_account("AB1234")
        limited.fail(Failure.SERVER_ERROR, 2, step=7)
        assert refusal(limited, account) == (500, "UDAPI100500")
        assert refusal(limited, account) == (429, "UDAPI10005")
        time.now += 1
        assert refusal(limited, account) == (500, "UDAPI100500")


class TestFailures:
    @pytest.mark.parametrize(
        ("kind", "refused"),
        [(Failure.RATE_LIMIT, (429, "UDAPI10005")), (Failure.SERVER_ERROR, (500, "UDAPI100500"))],
    )
    def test_an_error_happens_once_and_makes_no_token(
        self, upstox: LocalUpstox, account: Account, kind: Failure, refused: tuple[int, str]
    ) -> None:
        upstox.fail(kind, step=7)
        assert refusal(upstox, account) == refused
        assert (upstox.logins(), upstox.attempts()) == (0, 1)
        assert one_call(upstox, account)[0] == 200

    @pytest.mark.parametrize(("kind", "made"), [(Failure.DROP, 0), (Failure.LOST, 1)])
    def test_a_connection_ends_before_or_after_the_work(
        self, upstox: LocalUpstox, account: Account, kind: Failure, made: int
    ) -> None:
        upstox.fail(kind, step=7)
        with pytest.raises((http.client.IncompleteRead, json.JSONDecodeError)):
            one_call(upstox, account)
        assert upstox.logins() == made

    def test_a_page_comes_instead_of_json(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.HTML, step=7)
        with pytest.raises(json.JSONDecodeError):
            one_call(upstox, account)
        assert upstox.logins() == 0

    def test_a_stalled_answer_comes_late_though_its_work_is_done(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.stall_seconds = 0.3
        upstox.fail(Failure.STALL, step=7)
        start = time.perf_counter()
        token = one_call(upstox, account)[1]["access_token"]
        assert 0.3 <= time.perf_counter() - start < 2
        assert upstox.is_living(token)

    @pytest.mark.parametrize(
        ("kind", "lacks"),
        [(Failure.NO_TOKEN, "access_token"), (Failure.NO_USER, "user_id"), (Failure.MISSING_FIELD, "is_active")],
    )
    def test_a_field_is_missing_though_a_token_was_made(
        self, upstox: LocalUpstox, account: Account, kind: Failure, lacks: str
    ) -> None:
        earlier = one_call(upstox, account)[1]["access_token"]
        upstox.fail(kind)
        status, body = one_call(upstox, account)
        assert (status, TOKEN_FIELDS - set(body)) == (200, {"poa", lacks})
        assert upstox.logins() == 2
        assert not upstox.is_living(earlier)

    def test_a_token_comes_with_another_name_or_dead(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.OTHER_USER, step=7)
        assert one_call(upstox, account)[1]["user_id"] == "ZZ9999"
        upstox.fail(Failure.DEAD_TOKEN, step=7)
        token = one_call(upstox, account)[1]["access_token"]
        assert claims(token)["exp"] < time.time()
        assert not upstox.is_living(token)

    def test_a_token_comes_in_an_envelope(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.ENVELOPE, step=7)
        _, body = one_call(upstox, account)
        assert (set(body), body["status"]) == ({"status", "data"}, "success")
        assert upstox.is_living(body["data"]["access_token"])

    def test_a_token_comes_as_plain_text(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.PLAIN_TYPE, step=7)
        body = {"totp": pyotp.TOTP(account.totp_secret).now(), "pin": account.pin}
        _, answer, headers = ask(upstox, "POST", ONE_CALL, whole=body, headers={"x-api-key": account.client_id})
        assert headers.get_all("Content-Type") == ["text/plain"]
        assert upstox.is_living(answer["access_token"])

    def test_a_failure_of_a_token_waits_for_whichever_login_makes_one(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        upstox.fail(Failure.NO_USER, 2)
        by_hand = ByHand(upstox, account)
        assert "user_id" not in by_hand.token(by_hand.code())[1]
        assert "user_id" not in one_call(upstox, account)[1]
        assert "user_id" in one_call(upstox, account)[1]

    def test_a_failure_at_another_step_leaves_it_alone(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.fail(Failure.LOST, step=6)
        assert one_call(upstox, account)[0] == 200
