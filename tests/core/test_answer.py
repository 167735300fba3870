"""What a login may return, and what the package reads from it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData, AccessTokenResponse

from upstox_db_examples import LoginError, LoginInterrupted, LoginRefused, Secret
from upstox_db_examples.core.answer import LoginAnswer, Minted, find_token, read_answer
from upstox_db_examples.core.token import issued_at, jwt_claims, subject

from ..support.leaks import shown_with_locals


def jwt(**claims: object) -> str:
    parts = ({"typ": "JWT"}, claims)
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return f"{'.'.join(encoded)}.c2lnbmF0dXJl"


TOKEN = jwt(sub="AB1234", iat=1767709800)
NAMELESS = jwt(iat=1)
EXTENDED = jwt(sub="AB1234", extended=True)
FULL: dict[str, Any] = {
    "email": "ab1234@example.com",
    "exchanges": ["NSE"],
    "products": ["D", "I"],
    "broker": "UPSTOX",
    "user_id": "AB1234",
    "user_name": "A Trader",
    "order_types": ["MARKET"],
    "user_type": "individual",
    "poa": False,
    "ddpi": True,
    "is_active": True,
    "access_token": TOKEN,
    "extended_token": EXTENDED,
}
NOTIFIED = {
    "client_id": "an-app",
    "user_id": "AB1234",
    "access_token": TOKEN,
    "token_type": "Bearer",
    "expires_at": "1",
    "issued_at": "1",
    "message_type": "access_token",
}


class OwnMapping(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return FULL[name]

    def __iter__(self) -> Iterator[str]:
        return iter(FULL)

    def __len__(self) -> int:
        return len(FULL)


@dataclass
class OwnAnswer:
    access_token: str
    user_id: str


class BrokenProperty:
    access_token = TOKEN
    user_id = "AB1234"

    @property
    def email(self) -> str:
        raise RuntimeError("not today")


def refused(answer: object) -> LoginError:
    """Return the error for this answer, and check that a traceback with locals shows no token."""
    with pytest.raises(LoginError) as caught:
        read_answer(answer)
    assert "eyJ" not in shown_with_locals(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    return caught.value


@pytest.mark.parametrize(
    "answer",
    [
        FULL,
        {"status": "success", "data": FULL},
        {"success": True, "data": FULL, "error": None},
        {"data": {"data": FULL}},
        AccessTokenData(**FULL),
        AccessTokenResponse(success=True, data=AccessTokenData(**FULL)),
        {"data": AccessTokenData(**FULL)},
        SimpleNamespace(**FULL),
        LoginAnswer(FULL),
        OwnMapping(),
        FULL | {"access_token": f" {TOKEN}\n", "user_id": " AB1234 "},
        FULL | {"access_token": Secret(TOKEN)},
    ],
)
def test_every_form_of_an_answer_is_read_alike(answer: object) -> None:
    minted = read_answer(answer)
    assert (minted.user_id, minted.token.reveal(), minted.odd_fields) == ("AB1234", TOKEN, {})
    assert minted.profile == {
        "user_name": "A Trader",
        "email": "ab1234@example.com",
        "broker": "UPSTOX",
        "user_type": "individual",
        "products": ["D", "I"],
        "exchanges": ["NSE"],
        "metadata": {"is_active_user": True, "generation_method": "upstox_totp_sdk"},
    }


@pytest.mark.parametrize("answer", [OwnAnswer(TOKEN, "AB1234"), BrokenProperty(), NOTIFIED, {"access_token": TOKEN}])
def test_a_token_and_a_user_are_enough(answer: object) -> None:
    minted = read_answer(answer)
    assert (minted.user_id, minted.token.reveal()) == ("AB1234", TOKEN)
    assert minted.profile["email"] is None
    assert minted.profile["exchanges"] == []
    assert "fields_unknown" not in minted.odd_fields


@pytest.mark.parametrize("user_id", [None, "", 7, "no spaces please", "x" * 51])
def test_an_unusable_user_id_is_taken_from_the_token(user_id: object) -> None:
    assert read_answer(FULL | {"user_id": user_id}).user_id == "AB1234"


def test_the_answer_counts_for_more_than_the_token_that_names_another_user() -> None:
    assert read_answer(FULL | {"user_id": "XY9999"}).user_id == "XY9999"


@pytest.mark.parametrize("token", [NAMELESS, "opaque", jwt(sub="not a user id"), jwt(sub=7)])
def test_a_token_of_nobody_is_in_the_error(token: str) -> None:
    error = refused({"access_token": token})
    assert isinstance(error, LoginInterrupted)
    assert error.token is not None
    assert (error.token.reveal(), error.user_id, error.token_may_exist) == (token, None, True)


@pytest.mark.parametrize(
    "answer",
    [
        TOKEN,
        TOKEN.encode(),
        json.dumps(FULL),
        f"extended_token={EXTENDED}&access_token={TOKEN}",
        FULL | {"access_token": [TOKEN]},
        FULL | {"access_token": ""} | {"elsewhere": {"deep": [(TOKEN,)]}},
        {"token": TOKEN, "user_id": "AB1234"},
        {"user_id": "AB1234", TOKEN: 1},
        SimpleNamespace(access_token=None, token=TOKEN),
    ],
)
def test_a_token_that_is_not_where_it_should_be_is_in_the_error(answer: object) -> None:
    error = refused(answer)
    assert isinstance(error, LoginInterrupted)
    assert error.token is not None
    assert (error.token.reveal(), error.user_id, error.token_may_exist) == (TOKEN, "AB1234", True)


@pytest.mark.parametrize(
    "answer", [{}, {"user_id": "AB1234"}, {"access_token": 7}, {"data": None}, {"status": "error"}]
)
def test_an_answer_without_any_token_leaves_it_in_doubt(answer: object) -> None:
    error = refused(answer)
    assert isinstance(error, LoginInterrupted)
    assert (error.token, error.token_may_exist) == (None, True)


@pytest.mark.parametrize("answer", [{"extended_token": EXTENDED}, f'{{"extended_token": "{EXTENDED}"}}'])
def test_the_extended_token_is_never_taken_for_an_access_token(answer: object) -> None:
    assert refused(answer).token is None


@pytest.mark.parametrize("answer", [None, object(), 7, "text", [], AccessTokenData, ValueError("no")])
def test_what_is_no_answer_is_refused_and_says_what_an_answer_is(answer: object) -> None:
    error = refused(answer)
    assert isinstance(error, LoginRefused)
    assert "AccessTokenData" in str(error)
    assert "mapping with access_token and user_id" in str(error)
    assert error.token is None


@pytest.mark.parametrize("answer", [[TOKEN], ValueError(TOKEN), SimpleNamespace(text=f"<p>{TOKEN}</p>")])
def test_what_is_no_answer_and_has_a_token_carries_it(answer: object) -> None:
    error = refused(answer)
    assert isinstance(error, LoginRefused)
    assert error.token is not None
    assert (error.token.reveal(), error.token_may_exist) == (TOKEN, True)


def test_a_structure_without_end_is_not_searched_forever() -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    assert refused(endless).token is None


@pytest.mark.parametrize("value", ["a\0b", "\ud800", TOKEN, f"see {TOKEN}", 7, ["x"]])
def test_a_text_that_no_database_could_hold_or_that_shows_a_token_is_left_out(value: object) -> None:
    minted = read_answer(FULL | {"user_name": value, "exchanges": [value]})
    assert (minted.profile["user_name"], minted.profile["exchanges"]) == (None, [])
    assert minted.odd_fields == {"fields_of_another_type": ["user_name", "exchanges"]}
    assert "eyJ0" not in repr(minted.profile)


def test_odd_fields_are_told_by_name_only_and_only_by_harmless_names() -> None:
    many = {f"new_{n:02}": "a value" for n in range(30)}
    odd = read_answer(FULL | many | {"poa": None}).odd_fields
    assert odd == {"fields_null": ["poa"], "fields_unknown": [*sorted(many)[:20], "…"]}
    harmful = {"a b": 1, "x" * 41: 1, "line\nbreak": 1, TOKEN: 1, TOKEN[:30]: 1, TOKEN[-12:]: 1, "fine": 1}
    assert read_answer(FULL | harmful).odd_fields == {"fields_unknown": ["fine", "…"]}


def test_what_was_minted_shows_no_token() -> None:
    shown = repr(read_answer(FULL))
    assert TOKEN[4:] not in shown
    assert EXTENDED[4:] not in shown
    assert Minted._fields == ("user_id", "token", "profile", "odd_fields")


def test_a_token_at_the_end_of_a_text_that_broke_off_is_not_taken() -> None:
    text = f'{{"access_token": "{TOKEN}'
    assert find_token(text, cut=True) is None
    whole = find_token(f'{text}"', cut=True)
    assert whole is not None
    assert whole.reveal() == TOKEN


def test_a_token_says_when_and_for_whom_it_was_made() -> None:
    token = Secret(TOKEN)
    assert jwt_claims(token) == {"sub": "AB1234", "iat": 1767709800}
    assert issued_at(token) == datetime(2026, 1, 6, 14, 30, tzinfo=UTC)
    assert subject(token) == "AB1234"


@pytest.mark.parametrize(
    "text", ["", "opaque", "a.b.c", "eyJ.€.x", jwt(sub=7, iat="soon"), jwt(sub=None, iat=1e300), f"x.{'W10'}.y"]
)
def test_a_token_that_says_nothing_is_no_error(text: str) -> None:
    assert (issued_at(Secret(text)), subject(Secret(text))) == (None, None)
