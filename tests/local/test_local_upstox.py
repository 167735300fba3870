"""The local Upstox, driven by the bare SDK: what it lets in, what it refuses, its clock and its server."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pyotp
import pytest
from curl_cffi.requests.exceptions import RequestException
from upstox_totp import UpstoxError, UpstoxTOTP

from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from ..support.upstox_logins import (
    APPROVAL,
    OTP,
    PIN,
    TOTP,
    ByHand,
    answer_to_login,
    ask,
    claims,
    code_in,
    for_the_sdk,
    leave_a_second_of_this_totp,
    log_in,
    profile,
    refusal,
    until,
)

INDIA = timezone(timedelta(hours=5, minutes=30))


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False) as server:
        yield for_the_sdk(server)


@pytest.fixture
def account(upstox: LocalUpstox) -> Account:
    return upstox.add_account("AB1234")


@pytest.fixture
def by_hand(upstox: LocalUpstox, account: Account) -> ByHand:
    return ByHand(upstox, account)


class TestAccounts:
    def test_an_account_is_the_same_each_time_and_unlike_any_other(self, upstox: LocalUpstox) -> None:
        first, again, other = (upstox.add_account(user_id) for user_id in ("AB1234", "AB1234", "CD5678"))
        assert first == again
        assert not {first.mobile, first.pin, first.totp_secret, first.client_id, first.client_secret} & {
            *other.credentials().values()
        }
        assert (len(first.mobile), len(first.pin), len(first.totp_secret)) == (10, 6, 32)
        assert first.mobile.isdigit()
        assert first.pin.isdigit()

    def test_no_repr_shows_a_secret(self, upstox: LocalUpstox, account: Account) -> None:
        log_in(upstox, account)
        shown = repr(account) + repr(upstox) + repr(vars(upstox)["_service"].users)
        secrets = set(account.credentials().values()) - {account.redirect_uri}
        assert len(secrets) == 5
        assert not [secret for secret in secrets if secret in shown]
        assert "eyJ" not in shown

    def test_the_sdk_logs_in_from_its_environment_variables(
        self, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in account.environ().items():
            monkeypatch.setenv(name, value)
        with UpstoxTOTP() as client:
            client.base_domain, client.config.sleep_time = upstox.base_domain, 0
            assert client.app_token.get_access_token().success


class TestLogin:
    def test_a_login_gives_a_living_token_of_that_user(self, upstox: LocalUpstox, account: Account) -> None:
        data = log_in(upstox, account)
        assert (data.user_id, data.email, data.is_active) == ("AB1234", account.email, True)
        assert upstox.is_living(data.access_token)
        status, body = profile(upstox, data.access_token)
        assert (status, body["status"], body["data"]["user_id"]) == (200, "success", "AB1234")

    def test_the_token_is_a_jwt_with_the_claims_of_a_real_one(self, upstox: LocalUpstox, account: Account) -> None:
        token = log_in(upstox, account).access_token
        header = json.loads(base64.urlsafe_b64decode(token.split(".")[0] + "=="))
        assert header == {"typ": "JWT", "key_id": "sk_v1.0", "alg": "HS256"}
        assert set(claims(token)) == {"sub", "jti", "isMultiClient", "isPlusPlan", "iat", "iss", "exp"}
        assert (claims(token)["sub"], claims(token)["iss"]) == ("AB1234", "udapi-gateway-service")

    def test_the_extended_token_is_another_one_and_lives_a_year(self, upstox: LocalUpstox, account: Account) -> None:
        data = log_in(upstox, account)
        assert data.extended_token is not None
        extended = claims(data.extended_token)
        assert extended["exp"] - extended["iat"] == 365 * 24 * 60 * 60
        assert not upstox.is_living(data.extended_token)

    def test_it_takes_milliseconds(self, upstox: LocalUpstox, account: Account) -> None:
        log_in(upstox, account)  # loads what has to be loaded
        start = time.perf_counter()
        log_in(upstox, account)
        assert time.perf_counter() - start < 0.2  # Nagle's algorithm alone would take 6 x 40 ms

    def test_a_new_login_kills_the_earlier_token(self, upstox: LocalUpstox, account: Account) -> None:
        first, second = (log_in(upstox, account).access_token for _ in range(2))
        assert not upstox.is_living(first)
        assert upstox.is_living(second)
        assert profile(upstox, first)[0] == 401

    def test_a_login_leaves_the_tokens_of_others_alone(self, upstox: LocalUpstox, account: Account) -> None:
        token = log_in(upstox, account).access_token
        log_in(upstox, upstox.add_account("CD5678"))
        assert upstox.is_living(token)

    def test_a_logout_ends_the_token(self, upstox: LocalUpstox, account: Account) -> None:
        token = log_in(upstox, account).access_token
        status, body, _ = ask(upstox, "DELETE", "/api/v2/logout", headers={"Authorization": f"Bearer {token}"})
        assert (status, body) == (200, {"status": "success", "data": True})
        assert not upstox.is_living(token)
        assert ask(upstox, "DELETE", "/api/v2/logout", headers={"Authorization": f"Bearer {token}"})[0] == 401

    @pytest.mark.parametrize("token", ["", "made-up"])
    def test_a_token_it_did_not_make_is_refused(self, upstox: LocalUpstox, account: Account, token: str) -> None:
        log_in(upstox, account)
        status, body = profile(upstox, token)
        assert (status, code_in(body)) == (401, "UDAPI100050")

    def test_logins_and_attempts_are_counted_for_each_user(self, upstox: LocalUpstox, account: Account) -> None:
        log_in(upstox, account)
        log_in(upstox, upstox.add_account("CD5678"))
        refusal(upstox, account, pin_code="000000")
        assert (upstox.logins("AB1234"), upstox.logins("CD5678"), upstox.logins("EF9012"), upstox.logins()) == (
            1,
            1,
            0,
            2,
        )
        assert (upstox.attempts("AB1234"), upstox.attempts("CD5678"), upstox.attempts()) == (2, 1, 3)

    def test_many_log_in_at_once(self, upstox: LocalUpstox) -> None:
        accounts = [upstox.add_account(f"AB{number:04}") for number in range(24)]
        tokens: list[str] = []
        threads = [threading.Thread(target=lambda a=a: tokens.append(log_in(upstox, a).access_token)) for a in accounts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(tokens)) == len(accounts)
        assert all(map(upstox.is_living, tokens))

    def test_one_user_logs_in_from_many_places_and_one_token_lives(self, upstox: LocalUpstox, account: Account) -> None:
        tokens: list[str] = []
        threads = [
            threading.Thread(target=lambda: tokens.append(log_in(upstox, account).access_token)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(tokens)) == upstox.logins("AB1234") == 8
        assert sum(map(upstox.is_living, tokens)) == 1


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
        twice = base64.b64encode(account.pin.encode()).decode()  # as the SDK's from_env_file does it
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
            for _ in range(3):  # of three, at least two fall into one step of 30 s
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


class TestClock:
    @pytest.mark.parametrize(
        ("made", "dies"),
        [
            (datetime(2026, 1, 6, 20, 0, tzinfo=INDIA), datetime(2026, 1, 7, 3, 30, tzinfo=INDIA)),
            (datetime(2026, 1, 7, 2, 30, tzinfo=INDIA), datetime(2026, 1, 7, 3, 30, tzinfo=INDIA)),
            (datetime(2026, 1, 7, 3, 29, 59, tzinfo=INDIA), datetime(2026, 1, 7, 3, 30, tzinfo=INDIA)),
            (datetime(2026, 1, 7, 3, 30, tzinfo=INDIA), datetime(2026, 1, 8, 3, 30, tzinfo=INDIA)),
            (datetime(2026, 12, 31, 22, 0, tzinfo=UTC), datetime(2027, 1, 1, 22, 0, tzinfo=UTC)),
        ],
    )
    def test_a_token_dies_at_the_next_0330_in_india(
        self, upstox: LocalUpstox, account: Account, made: datetime, dies: datetime
    ) -> None:
        upstox.set_clock(made)
        token = log_in(upstox, account).access_token
        assert datetime.fromtimestamp(claims(token)["exp"], UTC) == dies
        assert datetime.fromtimestamp(claims(token)["iat"], UTC) == made

    def test_a_token_lives_until_032959_and_not_at_033000(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.set_clock(datetime(2026, 1, 6, 20, 0, tzinfo=INDIA))
        token = log_in(upstox, account).access_token
        upstox.set_clock(datetime(2026, 1, 7, 3, 29, 59, tzinfo=INDIA))
        assert upstox.is_living(token)
        upstox.move_clock(timedelta(seconds=1))
        assert not upstox.is_living(token)
        status, body = profile(upstox, token)
        assert (status, code_in(body)) == (401, "UDAPI100050")

    def test_the_clock_is_real_until_it_is_moved(self, upstox: LocalUpstox) -> None:
        assert abs(upstox.now() - datetime.now(UTC)) < timedelta(seconds=5)
        upstox.move_clock(timedelta(days=2))
        upstox.move_clock(timedelta(days=-1))
        assert abs(upstox.now() - datetime.now(UTC) - timedelta(days=1)) < timedelta(seconds=5)

    def test_a_clock_can_be_handed_in_and_moved(self) -> None:
        moment = datetime(2026, 1, 6, 12, 0, tzinfo=UTC)
        with for_the_sdk(LocalUpstox(clock=lambda: moment)) as upstox:
            token = log_in(upstox, upstox.add_account("AB1234")).access_token
            assert claims(token)["iat"] == moment.timestamp()
            upstox.move_clock(timedelta(hours=10))
            assert not upstox.is_living(token)

    def test_a_time_without_zone_is_refused(self, upstox: LocalUpstox) -> None:
        with pytest.raises(ValueError, match="time zone"):
            upstox.set_clock(datetime(2026, 1, 6, 12, 0))


class TestServer:
    def test_close_leaves_no_thread_and_no_socket(self) -> None:
        threads = set(threading.enumerate())
        upstox = for_the_sdk(LocalUpstox(totp_once=False).start())
        account = upstox.add_account("AB1234")
        client = UpstoxTOTP(**account.credentials())  # type: ignore[arg-type]
        client.base_domain, client.config.sleep_time = upstox.base_domain, 0
        client.app_token.get_access_token()  # its connection stays open
        assert set(threading.enumerate()) - threads
        upstox.close()
        upstox.close()
        assert not set(threading.enumerate()) - threads
        client.session.close()
        port = int(upstox.base_domain.split(":")[2].split("/")[0])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)

    def test_close_waits_for_no_stalled_answer(self) -> None:
        upstox = LocalUpstox().start()
        account = upstox.add_account("AB1234")
        upstox.fail(Failure.STALL, step=2)
        errors: list[BaseException] = []

        def try_to_log_in() -> None:
            try:
                answer_to_login(upstox, account)
            except RequestException as error:
                errors.append(error)

        thread = threading.Thread(target=try_to_log_in)
        thread.start()
        until(lambda: upstox.attempts() == 1)
        start = time.perf_counter()
        upstox.close()
        assert time.perf_counter() - start < 1
        thread.join()
        assert len(errors) == 1

    def test_it_starts_again_with_its_accounts_and_counts(self) -> None:
        upstox = for_the_sdk(LocalUpstox(totp_once=False))
        account = upstox.add_account("AB1234")
        for count in (1, 2):
            with upstox:
                log_in(upstox, account)
                assert upstox.logins() == count

    def test_a_client_that_hangs_up_is_nobodys_business(
        self, upstox: LocalUpstox, capfd: pytest.CaptureFixture[str]
    ) -> None:
        upstox.stall_seconds = 0.3
        upstox.fail(Failure.STALL, 3, step=2)
        port = int(upstox.base_domain.split(":")[2].split("/")[0])
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                # Closed with a reset, so that the server's write fails.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.sendall(f"POST {OTP} HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode())
                until(lambda: bool(upstox.attempts()))
        time.sleep(0.5)
        upstox.close()
        assert capfd.readouterr() == ("", "")

    def test_it_logs_nothing(self, upstox: LocalUpstox, account: Account, capfd: pytest.CaptureFixture[str]) -> None:
        log_in(upstox, account)
        refusal(upstox, account, client_secret="wrong")
        upstox.close()
        assert capfd.readouterr() == ("", "")
