"""The hybrid store: each use is counted once, whichever process folds it and whichever is killed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from upstox_db_examples import (
    HybridUpstoxStorage,
)
from upstox_db_examples.hybrid.redis import Found

from ..contracts.reliability import ReliabilityContract
from ..support import processes
from ..support.clocks import Clock
from ..support.hybrid import OnHybrid
from ..support.naive import FoldsAgain, TellsRedisLast
from ..support.postgresql import bare, counting
from ..support.processes import USER, Address
from ..support.stores import Counts, OpenStore, living


class TestHybrid(OnHybrid):
    # Counting uses

    def test_a_use_whose_answer_was_lost_and_that_was_folded_already_is_counted_once(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        use, other = store.backend.redis.read_and_count, open_store()
        assert isinstance(other, HybridUpstoxStorage)

        def and_the_answer_is_lost(*arguments: Any, **options: Any) -> Found:
            use(*arguments, **options)
            assert other.fold_uses() == 1
            return Found("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(store.backend.redis, "read_and_count", and_the_answer_is_lost)
            assert living(store)["source"] == "postgresql"
        assert store.get_user_statistics(USER)["total_usage"] == 1

    def test_entries_that_are_not_ours_are_thrown_away(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        living(store)
        uses = f"{{{self.prefix}}}:{self.database()}:uses"
        self.redis.xadd(uses, {"some": "thing"})
        self.redis.xadd(uses, {"token": "9" * 30, "user": USER, "actor": "x", "at": "1", "use": "y"})
        assert store.get_user_statistics(USER)["total_usage"] == 1
        assert self.redis.xlen(uses) == 0

    def test_a_count_that_was_lost_does_not_stay_for_ever(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        count = self.key().replace(":token:", ":count:")
        self.redis.delete(count)
        assert living(store)["source"] == "redis"
        assert self.redis.pttl(count) > 0

    def test_uses_are_folded_after_some_hundred(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        for _ in range(499):
            living(store)
        assert bare(self.url, "SELECT usage_count FROM upstox_tokens") == [{"usage_count": 0}]
        living(store)
        assert bare(self.url, "SELECT usage_count FROM upstox_tokens") == [{"usage_count": 500}]
        assert store.fold_uses() == 0

    def test_uses_that_were_folded_and_not_forgotten_are_not_folded_again(
        self, store: HybridUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        for _ in range(7):
            living(store)
        with monkeypatch.context() as killed_before_that:
            killed_before_that.setattr(store.backend.redis, "forget_uses", lambda _: None)
            assert store.fold_uses() == 7
        assert store.fold_uses() == 0
        assert self.redis.xlen(f"{{{self.prefix}}}:{self.database()}:uses") == 0
        assert store.get_user_statistics(USER)["total_usage"] == 7
        used = [entry for entry in store.get_audit_trail(USER) if entry["action"] == "used"]
        assert len(used) == len({entry["metadata"]["use"] for entry in used}) == 7

    def test_a_fold_never_sets_the_last_use_back(self, store: HybridUpstoxStorage, clock: Clock) -> None:
        store.store_token()
        assert living(store)["source"] == "redis"
        clock.advance(seconds=60)
        self.redis.delete(self.key())
        assert living(store)["source"] == "postgresql"
        last = store.backend.context.now().isoformat()
        assert store.get_user_statistics(USER)["last_usage"] == last, "the use that waited in Redis was earlier"

    def test_many_fold_at_once_and_each_use_counts_once(self, open_store: OpenStore) -> None:
        stores = [open_store() for _ in range(4)]
        stores[0].store_token()
        for _ in range(300):
            living(stores[0])
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(lambda store: store.fold_uses(), stores)) == 300
        assert stores[0].get_user_statistics(USER)["total_usage"] == 300


class TestHybridUnderCrowdsAndKills(ReliabilityContract):
    kind = "upstox_db_examples:HybridUpstoxStorage"
    seconds_of_crowding = 5
    # Each of 32 processes has a connection of its pool and one for a lock. A server accepts a hundred of them.
    in_a_crowd = {"pool_size": 1, "timeout": 60.0}

    @pytest.fixture
    def address(self, postgres_url: str, redis_server: str, redis_prefix: str) -> Address:
        # A Redis that is only slow, on a busy machine, is not the fault that this class tests.
        options = {"redis_prefix": redis_prefix, "redis_timeout": 5}
        address = Address(self.kind, (redis_server, postgres_url), options)
        address.open().close()
        return address

    @pytest.fixture
    def count(self, postgres_url: str, address: Address) -> Iterator[Callable[[], Counts]]:
        """Yield a function that counts the rows in PostgreSQL. Reads that refill Redis must return nothing older."""
        stop = threading.Event()

        def counted() -> Counts:
            found = count()
            handed_out = store.get_valid_token(USER)
            if handed_out:
                assert not found.active or handed_out["token_id"] >= found.active[0], "a stale token was handed out"
            elif found.active:
                # A login that was killed may have replaced it. And its lock is free at once, while PostgreSQL may still
                # be committing its last store: then the token that was counted was in doubt, and a newer one follows.
                newest = store.backend.find_newest(USER)
                assert newest is not None
                assert newest.in_doubt or newest.token_id not in found.active, "a token was missing"
            return found

        def keep_reading() -> int:
            reads = 0
            while not stop.is_set():
                store.get_valid_token(USER)
                reads += 1
                time.sleep(0.005)
            return reads

        with counting(postgres_url) as count, address.open() as store, ThreadPoolExecutor(1) as thread:
            reading = thread.submit(keep_reading)
            try:
                yield counted
            finally:
                stop.set()
            assert reading.result() > 0

    @pytest.mark.slow
    def test_without_a_tombstone_a_stale_token_is_handed_out(
        self, address: Address, count: Callable[[], Counts]
    ) -> None:
        careless = address._replace(kind=f"{TellsRedisLast.__module__}:TellsRedisLast")
        with pytest.raises(AssertionError, match="stale"):
            self.test_a_writer_can_be_killed_200_times(careless, count)

    @pytest.mark.slow
    def test_a_fold_can_be_killed_at_any_moment(self, address: Address) -> None:
        dice = random.Random(1)
        with address.open(login=processes.made_up_login) as store:
            store.store_token(USER)
            reads = 0
            for _ in range(40):
                process, connection = processes.start(processes.fold_on_and_on, address)
                assert connection.recv() == "ready"
                end = time.monotonic() + dice.uniform(0, 0.05)
                while time.monotonic() < end:
                    store.get_valid_token(USER)
                    reads += 1
                processes.kill(process)
                connection.close()
            assert reads > 100
            assert store.get_user_statistics(USER)["total_usage"] == reads, "some uses were counted more than once"
            used = [entry for entry in store.get_audit_trail(USER, limit=reads + 9) if entry["action"] == "used"]
            assert len(used) == reads

    @pytest.mark.slow
    def test_without_an_id_for_each_use_some_are_counted_twice(self, address: Address) -> None:
        with pytest.raises(AssertionError, match="counted more than once"):
            self.test_a_fold_can_be_killed_at_any_moment(address._replace(kind=f"{FoldsAgain.__module__}:FoldsAgain"))
