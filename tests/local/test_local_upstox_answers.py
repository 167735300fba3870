"""The answer that carries a token, tokens that appear or die without a login by the test, and hooks at each step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pydantic
import pytest
from curl_cffi.requests.exceptions import RequestException

from upstox_db_examples.local.answers import TOKEN_FIELDS
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.upstox_logins import ByHand, answer_to_login, ask, claims, code_in, log_in, profile


@pytest.fixture
def upstox() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False) as server:
        yield server


@pytest.fixture
def answered(upstox: LocalUpstox, account: Account) -> Callable[[], dict[str, Any]]:
    def log_in_by_hand() -> dict[str, Any]:
        by_hand = ByHand(upstox, account)
        return by_hand.token(by_hand.code())[1]

    return log_in_by_hand


class TestShape:
    def test_is_by_default_that_of_a_real_account(self, answered: Callable[[], dict[str, Any]]) -> None:
        body = answered()
        assert "poa" not in body
        assert body["ddpi"] is None
        assert set(body) - TOKEN_FIELDS == {"is_plus_plan"}
        assert TOKEN_FIELDS - set(body) == {"poa"}

    def test_by_default_breaks_the_bare_sdk_after_the_token_was_made(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        with pytest.raises(pydantic.ValidationError, match="poa"):
            answer_to_login(upstox, account)
        assert upstox.logins() == 1

    def test_is_complete_when_nothing_else_is_asked_for(
        self, upstox: LocalUpstox, answered: Callable[[], dict[str, Any]]
    ) -> None:
        upstox.shape_answers()
        body = answered()
        assert set(body) == TOKEN_FIELDS
        assert None not in body.values()

    def test_can_lack_null_change_and_add(self, upstox: LocalUpstox, answered: Callable[[], dict[str, Any]]) -> None:
        upstox.shape_answers(
            missing=("email", "extended_token"), null=["is_active"], changed={"poa": "Y"}, added={"x": [1]}
        )
        body = answered()
        assert {"email", "extended_token"}.isdisjoint(body)
        assert (body["is_active"], body["poa"], body["ddpi"], body["x"]) == (None, "Y", False, [1])
        assert upstox.is_living(body["access_token"])

    def test_starts_afresh_at_each_call(self, upstox: LocalUpstox, answered: Callable[[], dict[str, Any]]) -> None:
        upstox.shape_answers(missing=("email",))
        upstox.shape_answers(missing=("broker",))
        assert TOKEN_FIELDS - set(answered()) == {"broker"}

    @pytest.mark.parametrize(
        ("shape", "error", "says"),
        [
            ({"missing": ("pao",)}, ValueError, "no pao"),
            ({"null": ("pao",)}, ValueError, "no pao"),
            ({"changed": {"pao": 1}}, ValueError, "no pao"),
            ({"added": {"poa": 1}}, ValueError, "already has poa"),
            ({"added": {"x": object()}}, TypeError, "JSON"),
        ],
    )
    def test_that_cannot_be_is_refused(
        self, upstox: LocalUpstox, shape: dict[str, Any], error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error, match=says):
            upstox.shape_answers(**shape)

    def test_leaves_the_profile_alone(self, upstox: LocalUpstox, answered: Callable[[], dict[str, Any]]) -> None:
        status, body = profile(upstox, answered()["access_token"])
        assert (status, body["status"], body["data"]["user_id"], body["data"]["poa"]) == (
            200,
            "success",
            "AB1234",
            False,
        )


class TestOtherTokens:
    def test_an_extended_token_is_refused_by_its_own_code(
        self, upstox: LocalUpstox, answered: Callable[[], dict[str, Any]]
    ) -> None:
        body = answered()
        for method, path in (("GET", "/api/v2/user/profile"), ("DELETE", "/api/v2/logout")):
            status, refused, _ = ask(
                upstox, method, path, headers={"Authorization": f"Bearer {body['extended_token']}"}
            )
            assert (status, code_in(refused)) == (401, "UDAPI100067")
        assert upstox.is_living(body["access_token"])

    def test_a_token_can_die_in_the_middle_of_the_day(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.shape_answers()
        token, other = (log_in(upstox, each).access_token for each in (account, upstox.add_account("CD5678")))
        upstox.kill_token("AB1234")
        status, body = profile(upstox, token)
        assert (status, code_in(body)) == (401, "UDAPI100050")
        assert upstox.is_living(other)
        assert upstox.is_living(log_in(upstox, account).access_token)


class Receiver(BaseHTTPRequestHandler):
    """A notifier URL that records what it receives. The path says which status it answers with."""

    got: list[tuple[dict[str, str], Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.got.append((dict(self.headers), body))
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[str]:
    Receiver.got = []
    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class TestNotify:
    def test_makes_a_token_and_the_documented_message(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.shape_answers()
        earlier = log_in(upstox, account).access_token
        upstox.set_clock(datetime(2026, 1, 6, 20, 0, tzinfo=UTC))
        message = upstox.notify("AB1234")
        token = message.pop("access_token")
        assert message == {
            "client_id": account.client_id,
            "user_id": "AB1234",
            "token_type": "Bearer",
            "expires_at": "1767736800000",  # 22:00 UTC, which is 03:30 in India
            "issued_at": "1767729600000",
            "message_type": "access_token",
        }
        assert claims(token)["exp"] == 1767736800
        assert upstox.is_living(token)
        assert not upstox.is_living(earlier)
        assert upstox.logins("AB1234") == 2

    def test_posts_it_without_authentication_and_past_any_proxy(
        self, upstox: LocalUpstox, account: Account, receiver: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("no_proxy")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        message = upstox.notify(account.user_id, f"{receiver}/200")
        ((headers, body),) = Receiver.got
        assert body == message
        assert headers["Content-Type"] == "application/json"
        assert {"authorization", "cookie", "x-api-key"}.isdisjoint(name.lower() for name in headers)

    def test_says_when_nobody_takes_it_though_the_token_was_made(
        self, upstox: LocalUpstox, account: Account, receiver: str
    ) -> None:
        for url in (f"{receiver}/500", "http://127.0.0.1:1/"):
            with pytest.raises(OSError, match=r"500|refused"):
                upstox.notify(account.user_id, url)
        assert upstox.logins() == 2

    def test_may_be_received_while_the_server_is_asked(
        self, upstox: LocalUpstox, account: Account, receiver: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[int] = []

        def ask_upstox(handler: Receiver) -> None:
            body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
            seen.append(profile(upstox, body["access_token"])[0])
            handler.send_response(200)
            handler.end_headers()

        monkeypatch.setattr(Receiver, "do_POST", ask_upstox)
        upstox.notify(account.user_id, receiver)
        assert seen == [200]


class TestOnStep:
    def test_is_called_before_and_after_each_step(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.shape_answers()
        calls: list[tuple[int, str, int]] = []
        upstox.on_step = lambda step, what: calls.append((step, what, upstox.logins()))  # needs the lock
        token = log_in(upstox, account).access_token
        profile(upstox, token)
        expected = [(step, what, 0) for step in range(1, 7) for what in ("request", "answer")]
        assert calls == [*expected[:-1], (6, "answer", 1)]

    def test_holds_up_its_own_request_and_no_other(self, upstox: LocalUpstox, account: Account) -> None:
        upstox.shape_answers()
        other, reached, go_on = upstox.add_account("CD5678"), threading.Event(), threading.Event()

        def hold(step: int, what: str) -> None:
            if (step, what) == (6, "answer") and not reached.is_set():
                reached.set()
                go_on.wait(10)

        upstox.on_step = hold
        tokens: list[str] = []
        thread = threading.Thread(target=lambda: tokens.append(log_in(upstox, account).access_token))
        thread.start()
        assert reached.wait(10)
        log_in(upstox, other)
        assert (upstox.logins("AB1234"), tokens) == (1, [])
        go_on.set()
        thread.join()
        assert upstox.is_living(tokens[0])

    @pytest.mark.parametrize(("stop_at", "made"), [((3, "request"), 0), ((6, "request"), 0), ((6, "answer"), 1)])
    def test_that_raises_is_printed_and_there_is_no_answer(
        self,
        upstox: LocalUpstox,
        account: Account,
        stop_at: tuple[int, str],
        made: int,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        def stop(*now: object) -> None:
            if now == stop_at:
                raise RuntimeError("stopped by the test")

        upstox.on_step = stop
        with pytest.raises(RequestException):
            answer_to_login(upstox, account)
        assert upstox.logins() == made
        upstox.close()
        # The error appears once. At step 3 the connection is already in use, and curl would repeat the request on a new
        # one.
        assert capfd.readouterr().err.count("RuntimeError: stopped by the test") == 1
