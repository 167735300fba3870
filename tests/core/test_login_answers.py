"""What the login does with an answer that is complete, odd or without a token."""

from __future__ import annotations

import copy
import pickle
import pprint
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import pytest

from upstox_db_examples import (
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    SdkLogin,
    TotpLogin,
)
from upstox_db_examples.core.login import TOTP_FIELDS, read_answer
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox
from upstox_db_examples.local.web import Answer, Shown

from ..support.leaks import assert_shows_nothing, shown_with_locals
from ..support.processes import USER


class OddUpstox(LocalUpstox):
    """An Upstox that changes the answer with the token, and the page that says whose credentials these are."""

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
    """Return each login at this server in turn. Both read an answer in the same way."""
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
