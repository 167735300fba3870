"""Each store against a small model of its promises: any calls, in any order, while time passes 03:30."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from upstox_db_examples import KeyRing, TokenStorage
from upstox_db_examples.core.token import IST

from ..support.clocks import Clock
from ..support.processes import Address, made_up_login

MARGIN = timedelta(minutes=1)
KEYS = [KeyRing.new_key() for _ in range(2)]
examples = itertools.count()


def next_death(now: datetime) -> datetime:
    """Return the next 03:30 in India, calculated independently of token.py."""
    local = now.astimezone(IST)
    death = local.replace(hour=3, minute=30, second=0, microsecond=0)
    return death if death > local else death + timedelta(days=1)


@dataclass
class Known:
    """What the model knows about a user. The latest token is the last one."""

    tokens: list[str] = field(default_factory=list)
    dies: datetime | None = None
    active: bool = False
    uses: int = 0
    revoked: int = 0


class Model(RuleBasedStateMachine):
    """A model of two users, new in each example, on a store that has already seen earlier examples."""

    stores: list[TokenStorage]
    clock: Clock

    @initialize()
    def new_users(self) -> None:
        self.users = {f"U{next(examples)}x{number}": Known() for number in range(2)}
        self.names = list(self.users)

    def alive(self, known: Known, margin: timedelta) -> bool:
        return bool(known.active and known.dies and known.dies > self.clock.now + margin)

    user = st.integers(0, 1)
    one_of_two = st.integers(0, 1)

    @rule(user=user, which=one_of_two)
    def store_token(self, user: int, which: int) -> None:
        self.stored(user, self.stores[which].store_token(self.names[user])["token"])

    @rule(user=user, which=one_of_two)
    def get_valid_token(self, user: int, which: int) -> None:
        known = self.users[self.names[user]]
        result = self.stores[which].get_valid_token(self.names[user])
        assert (result is not None) == self.alive(known, MARGIN)
        if result:
            assert result["token"] == known.tokens[-1]
            known.uses += 1

    @rule(user=user, which=one_of_two)
    def get_or_create_token(self, user: int, which: int) -> None:
        known = self.users[self.names[user]]
        kept = self.alive(known, timedelta(0))
        token = self.stores[which].get_or_create_token(self.names[user])["token"]
        assert (token in known.tokens) == kept
        if kept:
            assert token == known.tokens[-1]
            known.uses += 1
        else:
            self.stored(user, token)

    def stored(self, user: int, token: str) -> None:
        known = self.users[self.names[user]]
        known.tokens.append(token)
        known.active, known.dies = True, next_death(self.clock.now)

    @rule(user=user, which=one_of_two)
    def revoke_token(self, user: int, which: int) -> None:
        known = self.users[self.names[user]]
        revoked = self.stores[which].revoke_token(self.names[user])
        if self.alive(known, timedelta(0)):
            assert revoked
        elif not known.active:
            assert not revoked
        known.revoked += revoked
        known.active = False

    @rule(which=one_of_two)
    def cleanup(self, which: int) -> None:
        self.stores[which].cleanup_expired_tokens()
        assert self.stores[1 - which].cleanup_expired_tokens() == 0
        for known in self.users.values():
            known.active = self.alive(known, timedelta(0))

    @rule(which=one_of_two)
    def rotate_keys(self, which: int) -> None:
        self.stores[which].rotate_keys()
        assert set(self.stores[which].keys_in_use()) <= {KeyRing(KEYS[which]).key_ids[0]}

    @rule(minutes=st.integers(1, 2000))
    def time_passes(self, minutes: int) -> None:
        self.clock.advance(minutes=minutes)

    @rule(before=st.integers(-3, 120))
    def it_is_nearly_half_past_three(self, before: int) -> None:
        self.clock.now = next_death(self.clock.now) - timedelta(seconds=before)

    @invariant()
    def what_is_told_is_true(self) -> None:
        for name, known in self.users.items():
            told = self.stores[0].get_user_statistics(name)
            assert told["total_tokens"] == len(known.tokens)
            assert told["active_tokens"] == self.alive(known, timedelta(0))
            assert told["total_usage"] == known.uses
            history = self.stores[1].get_token_history(name, limit=1000)
            assert [row["is_active"] for row in history[1:]] == [False] * (len(history) - 1)
            trail = [entry["action"] for entry in self.stores[0].get_audit_trail(name, limit=1000)]
            assert trail.count("created") == trail.count("login") == len(known.tokens)
            assert trail.count("revoked") == known.revoked
            assert trail.count("used") == known.uses


class Forgets(Model):
    """The same model with a fault, which hypothesis has to find."""

    def stored(self, user: int, token: str) -> None:
        super().stored(user, token)
        self.users[self.names[user]].active = False


@contextmanager
def on(address: Address, clock: Clock, kind: type[Model]) -> Iterator[type[Model]]:
    """Yield the model class with two stores on the same database."""
    with ExitStack() as stack:
        common = {"login": made_up_login, "clock": clock, **address.counting()}
        rings = (KeyRing(*KEYS), KeyRing(*reversed(KEYS)))
        opened = [stack.enter_context(address.open(keys=ring, **common)) for ring in rings]
        yield type("OnThisStore", (kind,), {"stores": opened, "clock": clock})


QUICK = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)


@pytest.mark.slow
def test_any_calls_in_any_order_do_what_the_model_says(each_address: Address, clock: Clock) -> None:
    with on(each_address, clock, Model) as model:
        run_state_machine_as_test(model, settings=QUICK)


def test_the_model_finds_a_fault(tmp_path: Path, clock: Clock) -> None:
    address = Address("upstox_db_examples:SQLiteUpstoxStorage", (str(tmp_path / "upstox.db"),))
    with on(address, clock, Forgets) as model, pytest.raises(AssertionError):
        run_state_machine_as_test(model, settings=QUICK)
