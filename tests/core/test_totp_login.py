"""Upstox's login in a single call."""

from __future__ import annotations

import json
import pickle
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from upstox_db_examples import LoginError, LoginInterrupted, LoginLimited, LoginRefused, SdkLogin, Secret, TotpLogin
from upstox_db_examples.core import totp_login as module
from upstox_db_examples.core.login import TOTP_FIELDS, read_answer
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox
from upstox_db_examples.local.web import Answer, Shown, WebServer

from ..support.leaks import shown_with_locals

USER = "AB1234"


@pytest.fixture
def upstox(clock: Any) -> Iterator[LocalUpstox]:
    with LocalUpstox(clock=clock, totp_once=False, limits=False) as server:
        yield server


@pytest.fixture
def values(account: Account) -> dict[str, str]:
    return {name: account.credentials()[name] for name in TOTP_FIELDS}


@pytest.fixture
def login(upstox: LocalUpstox, values: dict[str, str]) -> TotpLogin:
    return TotpLogin(values, base_domain=upstox.base_domain)


def assert_shows_nothing(error: BaseException, values: dict[str, str]) -> None:
    shown = shown_with_locals(error)
    assert [name for name, value in values.items() if value in shown] == []
    assert "eyJ" not in shown
    assert (error.__cause__, error.__context__) == (None, None)


def test_one_request_is_a_login(login: TotpLogin, upstox: LocalUpstox) -> None:
    answer = login(USER)
    minted = read_answer(answer)
    assert minted.user_id == answer.user_id == USER
    assert upstox.is_living(minted.token.reveal())
    assert minted.profile["metadata"] == {"is_active_user": True, "generation_method": "upstox_totp_login"}
    assert (upstox.attempts(), upstox.logins()) == (1, 1)


def test_it_ends_the_token_of_the_other_login(login: TotpLogin, upstox: LocalUpstox, account: Account) -> None:
    earlier = SdkLogin(account.credentials(), base_domain=upstox.base_domain)()
    login()
    assert not upstox.is_living(earlier.access_token)


def test_the_variables_are_read_when_a_login_is_due(
    upstox: LocalUpstox, values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    login = TotpLogin()
    with pytest.raises(LoginRefused, match=r"UPSTOX_CLIENT_ID .*UPSTOX_PIN_CODE .*UPSTOX_TOTP_SECRET .* not set"):
        login()
    for name, value in values.items():
        monkeypatch.setenv(f"UPSTOX_{name.upper()}", value)
    monkeypatch.setenv("UPSTOX_BASE_DOMAIN", upstox.base_domain)
    monkeypatch.setenv("UPSTOX_USER_ID", USER)
    assert login.user_id == USER
    assert login().user_id == USER


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        *((field, "", f"UPSTOX_{field.upper()} .* not set") for field in TOTP_FIELDS),
        ("pin_code", "12a456", "4 to 8 digits"),
        ("totp_secret", "ABCDEFGHIJKLMNOP1890ABCDEFGHIJKL", "not base32"),
        ("totp_secret", "ABCDEFGHIJKLMNOP", "80 bits and needs at least 112"),
        ("client_id", "an app", "does not fit into a header"),
        ("password", "secret", "Unknown credentials: password"),
    ],
)
def test_credentials_that_cannot_work_cost_no_request(
    upstox: LocalUpstox, values: dict[str, str], field: str, value: str, says: str
) -> None:
    with pytest.raises(LoginRefused, match=says) as caught:
        TotpLogin({**values, field: value}, base_domain=upstox.base_domain)()
    assert upstox.attempts() == 0
    assert_shows_nothing(caught.value, values)


def test_characters_that_only_the_sdk_cannot_send_are_taken(values: dict[str, str]) -> None:
    TotpLogin({**values, "client_id": "a+b&c%d"}).check(USER)


def test_a_secret_travels_only_by_https_or_on_this_machine(values: dict[str, str]) -> None:
    with pytest.raises(LoginRefused, match="must be https"):
        TotpLogin(values, base_domain="http://upstox.example/{stage}")()


def test_another_user_is_refused_before_any_request(upstox: LocalUpstox, values: dict[str, str]) -> None:
    with pytest.raises(LoginRefused, match="belong to AB1234, not XY9999"):
        TotpLogin(values, user_id=USER, base_domain=upstox.base_domain)("XY9999")
    assert upstox.attempts() == 0


@pytest.mark.parametrize(
    ("failure", "raises", "may_exist"),
    [
        (Failure.RATE_LIMIT, LoginLimited, False),
        (Failure.SERVER_ERROR, LoginInterrupted, True),
        (Failure.HTML, LoginInterrupted, True),
        (Failure.DROP, LoginInterrupted, True),
        (Failure.STALL, LoginInterrupted, True),
        (Failure.LOST, LoginInterrupted, True),
        (Failure.NO_TOKEN, LoginInterrupted, True),
    ],
)
def test_a_failure_says_what_to_do_and_whether_a_token_may_exist(
    login: TotpLogin,
    upstox: LocalUpstox,
    values: dict[str, str],
    failure: Failure,
    raises: type[LoginError],
    may_exist: bool,
) -> None:
    if failure is Failure.STALL:
        login = TotpLogin(values, base_domain=upstox.base_domain, timeout=0.3)
    upstox.fail(failure, step=7)
    with pytest.raises(raises) as caught:
        login()
    assert (caught.value.token_may_exist, caught.value.token) == (may_exist, None)
    assert_shows_nothing(caught.value, values)


@pytest.mark.parametrize(
    ("field", "wrong", "says"),
    [
        ("pin_code", "000001", "the PIN is wrong"),
        ("totp_secret", "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP", "refused"),
        ("client_id", "somebody-elses", "the client id or secret is wrong"),
    ],
)
def test_a_wrong_credential_is_a_definite_refusal(
    upstox: LocalUpstox, values: dict[str, str], field: str, wrong: str, says: str
) -> None:
    with pytest.raises(LoginRefused, match=says) as caught:
        TotpLogin({**values, field: wrong}, base_domain=upstox.base_domain)()
    assert caught.value.code
    assert not caught.value.token_may_exist
    assert_shows_nothing(caught.value, {**values, field: wrong})


def test_nobody_at_home_leaves_no_token_in_doubt(values: dict[str, str]) -> None:
    with pytest.raises(LoginInterrupted, match="could not be reached") as caught:
        TotpLogin(values, base_domain="http://127.0.0.1:9/{stage}")()
    assert not caught.value.token_may_exist, "the request was never sent"
    assert_shows_nothing(caught.value, values)


def test_no_redirect_is_followed_with_the_secrets(values: dict[str, str]) -> None:
    seen: list[str] = []

    def answer(route: str, _: Shown) -> Answer:
        seen.append(route)
        return Answer("", 307, Location="/elsewhere")

    server = WebServer(answer, "127.0.0.1")
    try:
        with pytest.raises(LoginInterrupted) as caught:
            TotpLogin(values, base_domain=f"http://127.0.0.1:{server.server_address[1]}/{{stage}}")()
    finally:
        server.close()
    assert seen == ["POST /api/v2/totp-login/authorization/token"]
    assert caught.value.token_may_exist


class TestAnAnswerThatBreaksOff:
    @pytest.fixture
    def breaks_off_after(self, values: dict[str, str]) -> Iterator[Any]:
        listener = socket.create_server(("127.0.0.1", 0))
        threads = []

        def login_at(body: bytes) -> TotpLogin:
            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + body)

            threads.append(threading.Thread(target=serve))
            threads[-1].start()
            return TotpLogin(values, base_domain=f"http://127.0.0.1:{listener.getsockname()[1]}/{{stage}}", timeout=2)

        yield login_at
        for thread in threads:
            thread.join()
        listener.close()

    TOKEN = "eyJ0eXAiOiJKV1QifQ.eyJzdWIiOiJBQjEyMzQifQ.c2lnbmF0dXJl"

    def test_after_its_last_field_is_an_answer(self, breaks_off_after: Any) -> None:
        login = breaks_off_after(json.dumps({"access_token": self.TOKEN, "user_id": USER}).encode())
        assert read_answer(login()).token.reveal() == self.TOKEN

    def test_behind_the_token_carries_it(self, breaks_off_after: Any) -> None:
        login = breaks_off_after(b'{"access_token": "%s", "user' % self.TOKEN.encode())
        with pytest.raises(LoginInterrupted) as caught:
            login()
        assert caught.value.token is not None
        assert caught.value.token.reveal() == self.TOKEN
        assert caught.value.user_id == USER

    def test_within_the_token_gives_no_part_of_it(self, breaks_off_after: Any) -> None:
        login = breaks_off_after(b'{"access_token": "%s' % self.TOKEN[:-4].encode())
        with pytest.raises(LoginInterrupted) as caught:
            login()
        assert (caught.value.token, caught.value.token_may_exist) == (None, True)


def test_another_form_of_the_request_is_one_method_away(values: dict[str, str]) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    class FormLogin(TotpLogin):
        path = "/v3/elsewhere"

        @staticmethod
        def form(client_id: Secret, pin_code: Secret, totp: Secret) -> tuple[dict[str, str | Secret], Secret]:
            body = f"client_id={client_id.reveal()}&password={pin_code.reveal()}&totp={totp.reveal()}"
            return {"Content-Type": "application/x-www-form-urlencoded"}, Secret(body)

    def answer(route: str, shown: Shown) -> Answer:
        seen.append((route, dict(shown)))
        return Answer({"access_token": "opaque", "user_id": USER})

    server = WebServer(answer, "127.0.0.1")
    try:
        FormLogin(values, base_domain=f"http://127.0.0.1:{server.server_address[1]}/{{stage}}")()
    finally:
        server.close()
    [(route, shown)] = seen
    assert route == "POST /api/v3/elsewhere"
    assert (shown["client_id"], shown["password"]) == (values["client_id"], values["pin_code"])


def test_an_interrupt_that_was_put_off_is_raised_before_the_request(
    login: TotpLogin, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pending() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "raise_pending", pending)
    with pytest.raises(KeyboardInterrupt):
        login()
    assert upstox.attempts() == 0


def test_it_shows_nothing_and_is_not_pickled(login: TotpLogin, values: dict[str, str]) -> None:
    shown = f"{login} {login!r} {vars(login)}"
    assert [name for name, value in values.items() if value in shown] == []
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(login)
