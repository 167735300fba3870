"""A fault at every step of a login, one login per step: no token is lost, and no dead one is handed out.

When a login is over, another process on the same database checks two promises:

1. A token that had arrived at the client is in the store or in the error, unless the process was killed.
2. No call hands out a token that Upstox refuses, and `get_or_create_token` returns one that works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from ..support import databases
from ..support.every_step import PLAIN, WORKERS, Way, broken_at_every_step
from ..support.faults import ERROR, INTERRUPT, KILL, OUTAGE, TWO_INTERRUPTS
from ..support.processes import Address

pytestmark = pytest.mark.slow

KINDS = (ERROR, OUTAGE, INTERRUPT, TWO_INTERRUPTS, KILL)
runs: dict[str, Counter[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def _told() -> Iterator[None]:
    yield
    for store, counts in runs.items():
        kinds = ", ".join(f"{count} times {kind}" for kind, count in counts.items())
        databases.notes.append(f"Faults in a login: {counts.total()} runs on {store}: {kinds}.")


@pytest.fixture
def quick(each_address: Address) -> Address:
    """Return the address of a store that nobody has to wait for long after a kill or an outage."""
    shorter = {
        "MongoUpstoxStorage": {"lease": 2.0, "timeout": 2.0},
        "HybridUpstoxStorage": {"believed": 0.5},
    }
    options = each_address.options | shorter.get(each_address.kind.partition(":")[2], {})
    return each_address._replace(options=options)


def promises_hold(address: Address, kind: str, way: Way = PLAIN, workers: int = WORKERS) -> int:
    """Check the promises at every moment, and return the number of logins that were hit."""
    count, faults = broken_at_every_step(address, kind, way, workers)
    assert not faults, f"{len(faults)} faults in {count} runs:\n" + "\n".join(faults)
    return count


def counted(address: Address, kind: str, way: Way = PLAIN, workers: int = WORKERS) -> None:
    count = promises_hold(address, kind, way, workers)
    store = address.kind.partition(":")[2].removesuffix("UpstoxStorage")
    runs.setdefault(store, Counter())[kind] += count


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_every_step_of_a_login(quick: Address, kind: str) -> None:
    counted(quick, kind)


def test_a_kill_where_nobody_is_named_and_all_tokens_are_marked(quick: Address) -> None:
    # Use one worker, because such a login puts the tokens of all others in doubt. That would hide what the test looks
    # for.
    counted(quick, KILL, Way(named=False), workers=1)


def test_two_interrupts_where_the_earlier_token_was_revoked(quick: Address) -> None:
    counted(quick, TWO_INTERRUPTS, Way("get_or_create_token", revoked=True))


def test_the_harness_finds_a_store_that_does_not_mark(sqlite: Address) -> None:
    with pytest.raises(AssertionError, match="get_valid_token hands out a token that Upstox refuses"):
        promises_hold(sqlite._replace(kind="tests.support.naive:DoesNotMark"), KILL)


@pytest.mark.parametrize("kind", [ERROR, TWO_INTERRUPTS])
def test_the_harness_finds_a_store_that_saves_only_once(sqlite: Address, kind: str) -> None:
    with pytest.raises(AssertionError, match="neither in the store nor in the error"):
        promises_hold(sqlite._replace(kind="tests.support.naive:SavesOnce"), kind)
