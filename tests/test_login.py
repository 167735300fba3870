"""Logging in: the real SDK against the local Upstox, and all the ways in which that can go wrong."""

from __future__ import annotations

import copy
import logging
import pickle
import pprint
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import pytest

from upstox_db_examples import (
    Accounts,
    ConfigurationError,
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    SdkLogin,
    TotpLogin,
)
from upstox_db_examples.core import sdk_login
from upstox_db_examples.core.login import FIELDS, TOTP_FIELDS, Credentials, read_answer
from upstox_db_examples.local import web
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox
from upstox_db_examples.local.web import Answer, Shown

from .conftest import shown_with_locals

USER = "AB1234"
JWT = "eyJ0eXAiOiJKV1QifQ.eyJzdWIiOiJYWTk5OTkifQ.c2lnbmF0dXJl"
ANY_STEP = (Failure.RATE_LIMIT, Failure.SERVER_ERROR, Failure.HTML, Failure.DROP, Failure.STALL)


@pytest.fixture
def login(upstox: LocalUpstox, account: Account) -> SdkLogin:
    return SdkLogin(account.credentials(), base_domain=upstox.base_domain)


def secrets_of(account: Account) -> list[str]:
    return [value for name, value in account.credentials().items() if name not in ("redirect_uri",)]


def assert_shows_nothing(error: BaseException, account: Account) -> None:
    shown = shown_with_locals(error)
    assert [secret for secret in secrets_of(account) if secret in shown] == []
    assert "eyJ" not in shown
    assert error.__cause__ is None
    assert error.__context__ is None


class TestALogin:
    def test_goes_through_all_six_requests_of_the_real_sdk(self, login: SdkLogin, upstox: LocalUpstox) -> None:
        data = login()
        assert data.user_id == USER
        assert upstox.is_living(data.access_token)
        assert (upstox.attempts(), upstox.logins()) == (1, 1)

    def test_takes_the_sdks_variables_when_it_is_due_and_not_before(
        self, upstox: LocalUpstox, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        login = SdkLogin()
        with pytest.raises(LoginRefused, match=r"UPSTOX_USERNAME \(username\).*UPSTOX_REDIRECT_URI .* not set"):
            login()
        for name, value in account.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("UPSTOX_BASE_DOMAIN", upstox.base_domain)
        assert login().user_id == USER

    def test_never_reads_a_dotenv_file(self, login: SdkLogin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".env").write_text("UPSTOX_PIN_CODE=999999\nUPSTOX_USERNAME=0000000000\n")
        monkeypatch.chdir(tmp_path)
        assert login().user_id == USER
        with pytest.raises(LoginRefused, match="not set"):
            SdkLogin()()

    def test_has_a_client_of_its_own_so_that_accounts_log_in_side_by_side(self, upstox: LocalUpstox) -> None:
        users = [f"CD000{n}" for n in range(8)]
        accounts = Accounts(
            {user: upstox.add_account(user).credentials() for user in users}, base_domain=upstox.base_domain
        )
        with ThreadPoolExecutor(8) as threads:
            data = list(threads.map(accounts, users))
        assert [each.user_id for each in data] == users
        assert all(upstox.is_living(each.access_token) for each in data)

    def test_is_not_sent_through_a_proxy_when_upstox_is_on_this_machine(
        self, login: SdkLogin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        assert login().user_id == USER

    def test_of_another_user_than_these_credentials_are_for_is_refused_before_any_request(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        login = SdkLogin(account.credentials(), user_id=USER, base_domain=upstox.base_domain)
        with pytest.raises(LoginRefused, match="belong to AB1234, not XY9999"):
            login("XY9999")
        assert upstox.attempts() == 0

    def test_keeps_the_sdks_debug_log_silent(
        self, login: SdkLogin, account: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UPSTOX_DEBUG", "true")
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, "upstox-totp")
        token = login().access_token
        logging.getLogger("upstox-totp").info("others may still speak")
        assert "others may still speak" in caplog.text
        assert [secret for secret in [*secrets_of(account), token] if secret in caplog.text] == []


class OddUpstox(LocalUpstox):
    """Changes the answer that has the token, and the page that tells whose credentials these are."""

    change: Callable[[dict[str, Any]], Answer] = Answer

    def _answer(self, route: str, shown: Shown) -> Answer:
        answer = super()._answer(route, shown)
        return self.change(answer.body) if route.endswith("/token") and isinstance(answer.body, dict) else answer


@pytest.fixture
def odd(clock: Any) -> Iterator[OddUpstox]:
    with OddUpstox(clock=clock, totp_once=False, limits=False) as server:
        yield server


@pytest.fixture(params=["sdk", "totp"])
def odd_login(request: pytest.FixtureRequest, odd: OddUpstox) -> SdkLogin | TotpLogin:
    """Either login at this server: both read an answer in the same way."""
    made = odd.add_account(USER).credentials()
    if request.param == "sdk":
        return SdkLogin(made, base_domain=odd.base_domain)
    return TotpLogin({name: made[name] for name in TOTP_FIELDS}, base_domain=odd.base_domain)


PROFILE = [
    "email",
    "user_name",
    "broker",
    "user_type",
    "poa",
    "ddpi",
    "is_active",
    "exchanges",
    "products",
    "order_types",
]


class TestAnAnswer:
    def test_without_the_fields_that_the_sdk_demands_is_a_login(self, login: SdkLogin, upstox: LocalUpstox) -> None:
        answer = login()
        assert "poa" not in answer
        assert answer["ddpi"] is None
        assert upstox.is_living(answer["access_token"])
        with pytest.raises(AttributeError):
            answer.poa  # noqa: B018

    @pytest.mark.parametrize("field", PROFILE)
    @pytest.mark.parametrize("how", ["missing", "null", "changed"])
    def test_lacks_no_token_whatever_its_profile_is(
        self, odd_login: SdkLogin | TotpLogin, odd: OddUpstox, field: str, how: str
    ) -> None:
        odd.shape_answers(**{how: {field: {"odd": 1}} if how == "changed" else [field]}, added={"new": 1})  # type: ignore[arg-type]
        minted = read_answer(odd_login())
        assert minted.user_id == USER
        assert odd.is_living(minted.token.reveal())
        kind = "of_another_type" if how == "changed" else how
        assert minted.odd_fields == {f"fields_{kind}": [field], "fields_unknown": ["new"]}
        if field not in ("poa", "ddpi", "is_active", "order_types"):
            assert minted.profile[field] == ([] if field in ("exchanges", "products") else None)
        assert minted.profile["metadata"]["is_active_user"] is (None if field == "is_active" else True)

    def test_that_is_as_documented_is_read_as_the_sdk_would_read_it(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account
    ) -> None:
        upstox.shape_answers()
        minted = read_answer(login())
        assert minted.profile == {
            "user_name": account.user_name,
            "email": account.email,
            "broker": "UPSTOX",
            "user_type": "individual",
            "products": ["D", "CO", "I"],
            "exchanges": ["NSE", "NFO", "BSE", "CDS", "BFO", "BCD"],
            "metadata": {"is_active_user": True, "generation_method": "upstox_totp_sdk"},
        }
        assert minted.odd_fields == {}

    def test_is_read_without_any_change_for_other_users_of_the_sdk(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account
    ) -> None:
        from upstox_totp import UpstoxTOTP
        from upstox_totp.models import AccessTokenResponse

        def other_user() -> AccessTokenResponse:
            with UpstoxTOTP(**account.credentials()) as client:  # type: ignore[arg-type]
                client.base_domain = upstox.base_domain
                client.config.sleep_time = 0
                return client.app_token.get_access_token()

        assert login().user_id == USER
        with pytest.raises(pydantic.ValidationError):
            other_user()
        with pytest.raises(pydantic.ValidationError):
            AccessTokenResponse.model_validate({"success": True, "data": {"access_token": "x", "user_id": USER}})
        upstox.shape_answers()
        assert isinstance(other_user(), AccessTokenResponse)

    @pytest.mark.parametrize("failure", [Failure.ENVELOPE, Failure.PLAIN_TYPE, Failure.NO_USER, Failure.MISSING_FIELD])
    def test_in_an_unexpected_form_still_gives_its_token(
        self, odd_login: SdkLogin | TotpLogin, odd: OddUpstox, failure: Failure
    ) -> None:
        odd.fail(failure)
        minted = read_answer(odd_login())
        assert minted.user_id == USER, "the token itself names its user"
        assert odd.is_living(minted.token.reveal())

    @pytest.mark.parametrize(
        ("change", "raises"),
        [
            (lambda b: Answer(f"<p>Your token: {b['access_token']}.</p>"), LoginInterrupted),
            (lambda b: Answer(b["access_token"]), LoginInterrupted),
            (
                lambda b: Answer(f"extended_token={b['extended_token']}&access_token={b['access_token']}"),
                LoginInterrupted,
            ),
            (lambda b: Answer({"access_token": [b["access_token"]], "user_id": USER}), LoginInterrupted),
            (lambda b: Answer({"token": b["access_token"], "extended_token": b["extended_token"]}), LoginInterrupted),
            (lambda b: Answer({"a": {"b": [b["access_token"]]}}), LoginInterrupted),
            (lambda b: Answer(b, 500), LoginInterrupted),
            (lambda b: Answer(b | {"errors": [{"errorCode": "UDAPI100069", "message": "no"}]}, 401), LoginRefused),
            (lambda b: Answer(f"try {b['access_token']} again", 429), LoginLimited),
        ],
    )
    def test_that_cannot_be_used_carries_its_token_in_the_error_and_shows_nothing(
        self,
        odd_login: SdkLogin | TotpLogin,
        odd: OddUpstox,
        change: Callable[[dict[str, Any]], Answer],
        raises: type[LoginError],
    ) -> None:
        odd.change = change
        with pytest.raises(raises, match=r"error\.token\.reveal\(\)") as caught:
            odd_login()
        assert caught.value.token is not None
        assert odd.is_living(caught.value.token.reveal())
        assert (caught.value.user_id, caught.value.token_may_exist) == (USER, True)
        assert_shows_nothing(caught.value, odd.add_account(USER))

    def test_with_an_opaque_token_and_no_user_carries_it_in_the_error(
        self, odd_login: SdkLogin | TotpLogin, odd: OddUpstox
    ) -> None:
        odd.change = lambda _: Answer({"access_token": "opaque-token"})
        with pytest.raises(LoginInterrupted, match="no usable user id") as caught:
            odd_login()
        assert caught.value.token is not None
        assert caught.value.token.reveal() == "opaque-token"
        assert "opaque-token" not in shown_with_locals(caught.value)

    def test_shows_and_pickles_no_token(self, login: SdkLogin) -> None:
        answer = login()
        for shown in (repr(answer), str(answer), f"{answer.items()}", pprint.pformat(answer), repr([answer])):
            assert "access_token" in shown
            assert answer.access_token[4:] not in shown
            assert answer["extended_token"][4:] not in shown
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled"):
                attempt(answer)
        with pytest.raises(TypeError):
            answer["user_id"] = "XY9999"
        assert dict(answer)["access_token"] == answer.access_token


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


class TestAFailure:
    @pytest.mark.parametrize("step", range(1, 7))
    @pytest.mark.parametrize("failure", ANY_STEP)
    def test_at_any_step_becomes_an_error_that_says_what_to_do_and_shows_nothing(
        self, login: SdkLogin, upstox: LocalUpstox, account: Account, failure: Failure, step: int
    ) -> None:
        if failure is Failure.STALL:  # Only here: on a busy machine, any request may take this long.
            login = SdkLogin(account.credentials(), base_domain=upstox.base_domain, timeout=0.3)
        upstox.fail(failure, step=step)
        with pytest.raises(LoginLimited if failure is Failure.RATE_LIMIT else LoginInterrupted) as caught:
            login()
        assert_shows_nothing(caught.value, account)
        if failure is not Failure.STALL:  # a request that was given up is still being answered
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

        # On a kept connection curl takes this for a connection that was closed long ago, and repeats the request.
        # The code is used up by then, and a definite refusal would hide the token that was made.
        monkeypatch.setattr(web._Handler, "_hang_up", without_a_byte)
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


class TestCredentials:
    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            *((field, "", f"UPSTOX_{field.upper()} .* not set") for field in FIELDS),
            ("username", "+919876543210", "10 digits"),
            ("username", "trader@example.com", "10 digits"),
            ("pin_code", "12a456", "4 to 8 digits"),
            ("totp_secret", "ABCD EFGH IJKL MNOP QRST UVWX", "not base32"),
            ("totp_secret", "ABCDEFGHIJKLMNOP1890ABCDEFGHIJKL", "not base32"),
            ("totp_secret", "ABCDEFGHIJKLMNOP", "80 bits and needs at least 112"),
            ("redirect_uri", "localhost", "not a URL"),
            ("redirect_uri", "https://x.example/?a=1&b=2", "does not send correctly"),
            ("client_secret", "a+b%c", "does not send correctly"),
        ],
    )
    def test_that_cannot_work_cost_no_request_and_are_not_shown(
        self, upstox: LocalUpstox, account: Account, field: str, value: str, says: str
    ) -> None:
        with pytest.raises(LoginRefused, match=says) as caught:
            SdkLogin({**account.credentials(), field: value}, base_domain=upstox.base_domain)()
        assert upstox.attempts() == 0
        assert_shows_nothing(caught.value, account)
        assert not value or value not in shown_with_locals(caught.value)

    def test_of_an_unknown_name_are_refused(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="Unknown credentials: pin"):
            SdkLogin({**account.credentials(), "pin": "123456"})

    def test_show_nothing_and_are_not_pickled(self, account: Account) -> None:
        login = SdkLogin(account.credentials())
        accounts = Accounts({USER: account.credentials()})
        for thing in (login, accounts, Credentials(account.credentials())):
            shown = f"{thing} {thing!r} {vars(thing)}"
            assert [secret for secret in secrets_of(account) if secret in shown] == []
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(thing)

    def test_have_a_name_that_is_the_same_for_the_same_account_only(
        self, upstox: LocalUpstox, account: Account
    ) -> None:
        here, again = SdkLogin(account.credentials()), SdkLogin(account.credentials())
        other = SdkLogin(upstox.add_account("XY9999").credentials())
        assert here.account == again.account != other.account
        assert SdkLogin().account is None
        assert [secret for secret in secrets_of(account) if secret in str(here.account)] == []


class TestWhereUpstoxIs:
    @pytest.mark.parametrize(
        "elsewhere", ["http://upstox.example/{stage}", "ftp://127.0.0.1.example/{stage}", "nonsense"]
    )
    def test_has_to_be_https_or_this_machine(self, account: Account, elsewhere: str) -> None:
        with pytest.raises(LoginRefused, match="must be https"):
            SdkLogin(account.credentials(), base_domain=elsewhere)()

    def test_has_to_name_the_stage(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="stage"):
            SdkLogin(account.credentials(), base_domain="https://upstox.example")()


class TestAccounts:
    @pytest.fixture
    def file(self, tmp_path: Path, account: Account) -> Path:
        path = tmp_path / "accounts.toml"
        lines = [f'{name} = "{value}"' for name, value in account.credentials().items()]
        path.write_text("\n".join([f"[{USER}]", *lines]))
        path.chmod(0o600)
        return path

    def test_come_from_a_file_of_their_owners_own(self, file: Path, upstox: LocalUpstox) -> None:
        accounts = Accounts.from_file(file, base_domain=upstox.base_domain)
        assert accounts.user_ids == [USER]
        assert accounts(USER).user_id == USER
        assert accounts().user_id == USER, "the only account needs no name"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
    def test_in_a_file_that_others_can_read_are_refused(self, file: Path, mode: int) -> None:
        file.chmod(mode)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            Accounts.from_file(file)

    @pytest.mark.parametrize("change", ["[[broken", 'x = "{pin}', "\N{BAT}[", f"[{USER}]"])
    def test_in_a_broken_file_are_a_clear_error_that_shows_nothing(
        self, file: Path, account: Account, change: str
    ) -> None:
        file.write_text(f"{file.read_text()}\n{change.format(pin=account.pin)}")
        with pytest.raises(ConfigurationError, match="is not a TOML file") as caught:
            Accounts.from_file(file)
        assert_shows_nothing(caught.value, account)

    @pytest.mark.parametrize("text", ["", 'AB1234 = "text"', "[AB1234]\nusername = 1"])
    def test_in_a_file_without_tables_of_credentials_are_a_clear_error(self, file: Path, text: str) -> None:
        file.write_text(text)
        with pytest.raises((ConfigurationError, LoginError)):
            Accounts.from_file(file)

    def test_in_a_missing_file_or_a_folder_are_a_clear_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.toml", tmp_path):
            with pytest.raises(ConfigurationError, match="could not be read"):
                Accounts.from_file(path)

    def test_with_one_that_cannot_work_show_nothing(self, account: Account) -> None:
        with pytest.raises(LoginRefused, match="AB1234") as caught:
            Accounts({USER: {**account.credentials(), "pin_code": ""}})
        assert_shows_nothing(caught.value, account)

    def test_that_are_not_there_are_named(self, account: Account, upstox: LocalUpstox) -> None:
        accounts = Accounts(
            {USER: account.credentials(), "XY9999": upstox.add_account("XY9999").credentials()},
            base_domain=upstox.base_domain,
        )
        with pytest.raises(LoginRefused, match=r"There is no account ZZ0000\. The known ones: AB1234, XY9999"):
            accounts("ZZ0000")
        with pytest.raises(LoginRefused, match="No account was named"):
            accounts()
        assert upstox.attempts() == 0
