"""Promises that are tested with crowds and kill -9, and counted. A naive store is shown to fail each of them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import KeyRing, SdkLogin, StorageError
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support import processes
from ..support.clocks import Clock
from ..support.processes import Address
from ..support.stores import Counts


class ReliabilityContract:
    """Promises for a store's test class to inherit.

    The test class has two fixtures: `address`, an empty store that other processes can open, and `count`, a function
    that counts the rows in it with the bare driver.
    """

    takeover: float = 1
    """Seconds after which other processes stop waiting for a login whose process was killed."""
    seconds_of_crowding: float = 20
    """How long eight processes compete for the lock. A store that uses another store's lock needs less."""
    killed_within: float = 0.1
    """Seconds within which a writer is killed. A writer that first waits for the previous lock needs more."""
    in_a_crowd: dict[str, Any] = {}
    """Options for a store that a thousand callers use at once, on a busy machine."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock(datetime.now(UTC))  # the real time, as in the other processes

    def test_of_32_processes_one_logs_in(self, address: Address, upstox: LocalUpstox, account: Account) -> None:
        upstox.login_seconds = 0.3
        job = (processes.get_or_create, address, upstox.base_domain, account.credentials())
        tokens = processes.run_all(32, *job)
        assert len(set(tokens)) == 1, sorted(set(tokens))
        assert upstox.logins() == 1

    def test_a_killed_login_holds_nobody_up(self, address: Address, upstox: LocalUpstox, account: Account) -> None:
        killed, connection = processes.start(processes.log_in_for_ever, address)
        assert connection.recv() == "logging in"
        process, waiting = processes.start(processes.get_or_create, address, upstox.base_domain, account.credentials())
        assert waiting.recv() == "ready"
        waiting.send("go")
        assert not waiting.poll(2), "it logs in although another process is logging in"
        processes.kill(killed)
        begin = time.monotonic()
        assert waiting.poll(10), "the dead process still holds the lock"
        assert upstox.is_living(waiting.recv())
        assert time.monotonic() - begin < self.takeover + 1.5, "the takeover was late, even for a slow machine"
        process.join()

    def test_a_holder_woken_late_makes_no_second_token(self, address: Address) -> None:
        slow, from_slow = processes.start(processes.log_in_slowly, address)
        assert from_slow.recv() == "logging in"
        assert slow.pid is not None
        os.kill(slow.pid, signal.SIGSTOP)
        with address.open(login=processes.made_up_login, login_wait=4) as store:
            # If the holder has a lock, this waits in vain. If it has a lease that ends, this process logs in.
            try:
                other = store.get_or_create_token(processes.USER)["token"]
            except StorageError as error:
                other = repr(error)
            os.kill(slow.pid, signal.SIGCONT)
            from_slow.send("go on")
            assert from_slow.poll(20)
            believed = [answer for answer in (from_slow.recv(), other) if answer.startswith("eyJ0eXAi")]
            read = store.get_valid_token(processes.USER)
            assert read
            assert believed == [read["token"]], "two tokens look active, and one of them is dead"
        slow.join()

    def test_a_forked_child_uses_connections_of_its_own(self, address: Address) -> None:
        process, connection = processes.start(processes.fork_and_read, address)
        assert connection.poll(20)
        stored, in_the_child, after_it = connection.recv()
        process.join()
        assert stored == in_the_child == after_it

    @pytest.mark.slow
    def test_of_1024_callers_whose_token_is_refused_one_logs_in(
        self, address: Address, upstox: LocalUpstox, account: Account
    ) -> None:
        options = {"login_wait": 240, **self.in_a_crowd}
        with address.open(login=SdkLogin(account.credentials(), base_domain=upstox.base_domain)) as store:
            refused = store.store_token(processes.USER)["token"]
        upstox.kill_token(processes.USER)
        upstox.login_seconds = 0.3
        job = (processes.renew_in_threads, address, upstox.base_domain, account.credentials(), refused, 32, options)
        outcomes: Counter[str] = sum(processes.run_all(32, *job, seconds=250), Counter())
        assert upstox.logins() == 2, "there was one login before them, and one for all of them"
        assert {upstox.is_living(token): count for token, count in outcomes.items()} == {True: 1024}, outcomes

    @pytest.mark.slow
    def test_a_rotation_can_be_killed_at_any_moment(self, address: Address) -> None:
        users, kills = 60, 20
        old, new = KeyRing.new_key(), KeyRing.new_key()
        both, only_new = KeyRing(new, old), KeyRing(new)
        dice, stop = random.Random(1), threading.Event()
        with address.open(login=processes.made_up_login, keys=KeyRing(old)) as store:
            tokens = {f"CD{n:04}": store.store_token(f"CD{n:04}")["token"] for n in range(users)}

        def keep_reading() -> int:
            reads = 0
            with address.open(keys=both) as store:
                while not stop.is_set():
                    user_id = dice.choice(list(tokens))
                    read = store.get_valid_token(user_id) or {}
                    assert read.get("token") == tokens[user_id], "a token was missing while keys were rotated"
                    reads += 1
            return reads

        def keep_storing() -> dict[str, str]:
            """Store tokens with the new key behind the old one, so that a rotation always has something to do."""
            stored: dict[str, str] = {}
            with address.open(login=processes.made_up_login, keys=KeyRing(old, new)) as store:
                for user_id in itertools.cycle(f"CW{number:04}" for number in range(20)):
                    if stop.is_set():
                        break
                    stored[user_id] = store.store_token(user_id)["token"]
            return stored

        with ThreadPoolExecutor(2) as threads:
            reader, writer = threads.submit(keep_reading), threads.submit(keep_storing)
            killed_in_time = 0
            try:
                for _ in range(kills):
                    process, connection = processes.start(processes.rotate, address, old, new)
                    assert connection.recv() == "ready"
                    time.sleep(dice.uniform(0, 0.02))
                    processes.kill(process)
                    try:
                        connection.recv()
                    except EOFError:
                        killed_in_time += 1
                    connection.close()
            finally:
                stop.set()
            assert reader.result() > 0
            tokens |= writer.result()
        assert len(tokens) > users
        assert killed_in_time, "each rotation was done before it was killed"
        with address.open(keys=both) as store:
            store.rotate_keys()
            assert store.keys_in_use() == {only_new.key_ids[0]: len(tokens)}
        with address.open(keys=only_new) as store:
            assert {user_id: store.get_valid_token(user_id)["token"] for user_id in tokens} == tokens

    @pytest.mark.slow
    def test_a_writer_can_be_killed_200_times(self, address: Address, count: Callable[[], Counts]) -> None:
        kills, within = 200, self.killed_within
        acknowledged, writes = None, 0
        dice = random.Random(1)
        faults = {"two active": 0, "none active": 0, "acknowledged lost": 0, "orphans": 0}
        # On a busy machine a write takes longer, and killing each writer before its first write would prove nothing.
        process, connection = processes.start(processes.store_on_and_on, address)
        begin = [connection.recv(), time.monotonic()]
        acknowledged = [connection.recv() for _ in range(5)][-1]
        within = max(within, (time.monotonic() - begin[1]) / 5 * 4)
        processes.kill(process)
        for number in range(kills):
            process, connection = processes.start(processes.store_on_and_on, address)
            assert connection.recv() == "ready"
            time.sleep(dice.uniform(0, within))
            processes.kill(process)
            while connection.poll():
                try:
                    acknowledged, writes = connection.recv(), writes + 1
                except EOFError:
                    break
            connection.close()
            if writes < number / 3:  # The machine has become busier.
                within *= 1.05
            found = count()
            faults["two active"] += len(found.active) > 1
            newest = max((found.generations[each] for each in found.active), default=0)
            faults["none active"] += acknowledged is not None and not found.active
            lost = acknowledged is not None and found.generations.get(acknowledged, 10**9) > newest
            faults["acknowledged lost"] += lost
            faults["orphans"] += found.orphans > 0
        assert writes > kills / 5, "the writers were killed before they could write much"
        assert not any(faults.values()), faults

    @pytest.mark.slow
    def test_the_lock_lets_one_in_at_a_time(self, address: Address, tmp_path: Path) -> None:
        seconds = self.seconds_of_crowding
        results = processes.run_all(8, processes.enter_and_leave, address, str(tmp_path), seconds, seconds=seconds + 60)
        entries, overlaps = (sum(column) for column in zip(*results, strict=True))
        assert entries > 100
        assert overlaps == 0, f"{overlaps} of {entries} entries overlapped"
