"""The local Upstox, driven by the bare SDK: its login, its clock and its server."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from curl_cffi.requests.exceptions import RequestException
from upstox_totp import UpstoxTOTP

from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox

from ..support.upstox_logins import (
    OTP,
    answer_to_login,
    ask,
    claims,
    code_in,
    for_the_sdk,
    log_in,
    profile,
    refusal,
    until,
)

INDIA = timezone(timedelta(hours=5, minutes=30))


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
        log_in(upstox, account)  # the first login loads some modules
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

    def test_an_order_needs_a_living_token(self, upstox: LocalUpstox, account: Account) -> None:
        headers = {"Authorization": f"Bearer {log_in(for_the_sdk(upstox), account).access_token}"}
        for number in (1, 2):
            status, body, _ = ask(upstox, "POST", "/api/v3/order/place", whole={}, headers=headers)
            assert (status, body["data"]) == (200, {"order_ids": [f"AB1234-{number}"]})
        upstox.kill_token("AB1234")
        status, body, _ = ask(upstox, "POST", "/api/v3/order/place", whole={}, headers=headers)
        assert (status, code_in(body), upstox.orders("AB1234")) == (401, "UDAPI100050", 2)

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
                # Close the connection with a reset, so that the server's write fails.
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
