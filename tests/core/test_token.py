"""When a token expires, and how it stays out of sight."""

from __future__ import annotations

import base64
import copy
import json
import logging
import pickle
import pprint
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upstox_db_examples import ExpiryPolicy, InvalidInput, Secret, TokenResult
from upstox_db_examples.core.checks import require_aware
from upstox_db_examples.core.token import IST, jwt_expiry

POLICY = ExpiryPolicy()
TOKEN = "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9." + "x" * 80


def ist(day: int, hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 1, day, hour, minute, second, tzinfo=IST)


def jwt(exp: object) -> Secret:
    payload = base64.urlsafe_b64encode(json.dumps({"sub": "AB1234", "exp": exp}).encode()).decode().rstrip("=")
    return Secret(f"eyJ0eXAiOiJKV1QifQ.{payload}.signature")


@pytest.fixture(params=["Asia/Kolkata", "America/New_York", "UTC"])
def _machine_zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_machine_zone")
class TestATokenDiesAtTheNextHalfPastThreeInIndia:
    @pytest.mark.parametrize(
        ("made", "dies"),
        [
            (ist(6, 20), ist(7, 3, 30)),
            (ist(7, 0), ist(7, 3, 30)),
            (ist(7, 2, 30), ist(7, 3, 30)),
            (ist(7, 3, 29, 59), ist(7, 3, 30)),
            (ist(7, 3, 30), ist(8, 3, 30)),
            (ist(7, 3, 30, 1), ist(8, 3, 30)),
            (ist(31, 23, 59), datetime(2026, 2, 1, 3, 30, tzinfo=IST)),
        ],
    )
    def test_whenever_it_was_made(self, made: datetime, dies: datetime) -> None:
        assert POLICY.next_death(made) == dies
        assert POLICY.next_death(made.astimezone(UTC)) == dies
        assert POLICY.next_death(made.astimezone()) == dies  # the machine's own time zone
        assert POLICY.next_death(made).tzinfo is UTC

    def test_which_is_22_00_utc_to_the_second(self) -> None:
        assert POLICY.next_death(ist(6, 20)) == datetime(2026, 1, 6, 22, 0, tzinfo=UTC)


@given(st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC)))
def test_a_token_lives_for_a_day_at_most_and_always_dies_at_the_same_time_of_day(made: datetime) -> None:
    death = POLICY.next_death(made)
    assert timedelta(0) < death - made <= timedelta(days=1)
    assert death.astimezone(IST).time() == POLICY.time_of_day


@given(st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC)))
def test_a_token_that_is_worth_keeping_is_alive_and_any_other_dies_sooner_than_a_new_one(now: datetime) -> None:
    threshold = POLICY.worth_keeping(now)
    new_dies = POLICY.next_death(now)
    assert new_dies > threshold, "a new token is always worth keeping"
    assert threshold >= min(now, new_dies - timedelta(seconds=1))


# Zones whose clocks go forward or back around the time of day, one of them at midnight, and one that lost a whole day.
@pytest.mark.parametrize(
    "zone", ["Europe/Berlin", "America/New_York", "America/Havana", "Pacific/Apia", "Australia/Lord_Howe"]
)
@pytest.mark.parametrize("at", [clock_time(0, 15), clock_time(1, 30), clock_time(2, 30), clock_time(23, 30)])
def test_a_death_in_a_zone_with_summer_time_is_always_after_now(zone: str, at: clock_time) -> None:
    policy = ExpiryPolicy(at, ZoneInfo(zone))
    for begin in (
        datetime(2026, 3, 1, tzinfo=UTC),
        datetime(2026, 9, 25, tzinfo=UTC),
        datetime(2011, 12, 20, tzinfo=UTC),
    ):
        for half in range(45 * 48):
            now = begin + timedelta(minutes=30 * half)
            assert timedelta(0) < policy.next_death(now) - now <= timedelta(hours=49), now


def test_a_death_in_the_hour_that_comes_twice_is_not_before_now() -> None:
    policy = ExpiryPolicy(clock_time(2, 30), ZoneInfo("Europe/Berlin"))
    # 02:15 for the second time. The first 02:30 was 45 minutes ago.
    assert policy.next_death(datetime(2026, 10, 25, 1, 15, tzinfo=UTC)) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


class TestTheTokensOwnExpiry:
    def test_counts_where_it_is_the_earlier_one(self) -> None:
        assert POLICY.expires_at(jwt(ist(6, 21).timestamp()), ist(6, 20)) == ist(6, 21)

    def test_never_prolongs_the_life_beyond_half_past_three(self) -> None:
        assert POLICY.expires_at(jwt(ist(9, 21).timestamp()), ist(6, 20)) == ist(7, 3, 30)

    @pytest.mark.parametrize(
        "token",
        ["opaque", "", "a.b.c", "..", "a.e30.c", "a.bnVsbA.c", "a.W10.c", f"a.{'W1tb' * 40_000}.c", "a.\N{BAT}.c"],
    )
    def test_is_done_without_where_the_token_is_opaque(self, token: str) -> None:
        assert jwt_expiry(Secret(token)) is None
        assert POLICY.expires_at(Secret(token), ist(6, 20)) == ist(7, 3, 30)

    @pytest.mark.parametrize("exp", [None, "soon", [], {}, 1e400, float("nan"), 10**30, -(10**30)])
    def test_is_done_without_where_it_makes_no_sense(self, exp: object) -> None:
        assert jwt_expiry(jwt(exp)) is None


class TestASecret:
    def test_shows_its_first_characters_and_its_length(self) -> None:
        assert f"{Secret(TOKEN)} {Secret(TOKEN)!r}" == "eyJ0…(117 chars) eyJ0…(117 chars)"

    def test_shows_only_its_length_when_it_is_short(self) -> None:
        assert str(Secret("123456")) == "…(6 chars)"

    def test_is_not_pickled(self) -> None:
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(Secret(TOKEN))


class TestAResult:
    result = TokenResult(Secret(TOKEN), {"user_id": "AB1234", "expires_at": "2026-01-06T22:00:00+00:00"})

    def test_reads_like_a_dict(self) -> None:
        assert self.result["token"] == TOKEN
        assert self.result["user_id"] == "AB1234"
        assert self.result.get("nothing") is None
        assert list(self.result) == ["token", "user_id", "expires_at"]
        assert dict(self.result)["token"] == TOKEN
        assert len(self.result) == 3
        with pytest.raises(KeyError):
            self.result["nothing"]

    def test_shows_its_token_nowhere(self, caplog: pytest.LogCaptureFixture) -> None:
        logging.getLogger("any").warning("%s %r", self.result, self.result)
        shown = [
            str(self.result),
            f"{self.result}",
            pprint.pformat(self.result),
            caplog.text,
            str(self.result.values()),
        ]
        assert all(TOKEN[:20] not in text for text in shown)
        assert "eyJ0…(117 chars)" in shown[0]
        assert "AB1234" in shown[0]

    def test_is_neither_pickled_nor_copied_into_a_plain_dict_by_accident(self) -> None:
        for accident in (pickle.dumps, json.dumps, copy.deepcopy):
            with pytest.raises(TypeError):
                accident(self.result)


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(InvalidInput, match="time zone"):
        require_aware(datetime(2026, 1, 6), "start")
