"""Hit a login with a fault at each of its moments in turn, and check the store afterwards.

Each login is hit once, in one way. A moment is a request or a response of one of the login's six steps, or the point
just before or just after a call to the database.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from upstox_db_examples import Accounts, Secret, StorageError
from upstox_db_examples.core.locks import ACCOUNT_LOCK
from upstox_db_examples.local.upstox import Account, LocalUpstox

from . import processes
from .faults import ERROR, INTERRUPT, KILL, NEVER, OUTAGE, TWO_INTERRUPTS, Moment, Told, log_in
from .processes import Address

WORKERS = 3  # Runs mostly wait: for a commit, or until a cached copy in Redis expires.
STEPS = [Moment("step", number, side) for number in range(1, 7) for side in ("request", "answer")]


class Way(NamedTuple):
    """How the login is started: by which method, with or without the user's name, and on what kind of token."""

    method: str = "store_token"
    named: bool = True
    revoked: bool = False

    def __str__(self) -> str:
        return f"{self.method}({'USER' if self.named else ''}){' after a revocation' if self.revoked else ''}"


PLAIN = Way()


class Run(NamedTuple):
    """The result of a login that was hit by a fault, or should have been."""

    account: Account
    moment: Moment
    hit: bool
    told: Told | None

    def __str__(self) -> str:
        at = self.moment
        name = f" {self.told.calls[at.number - 1]!r}" if self.told and at.what == "call" and self.hit else ""
        return f"{at}{name}: {self.told.outcome if self.told else 'dead'}"


class Worker:
    """A worker that runs logins one after another at its own Upstox, and checks what they leave behind.

    Args:
        address: the address of the store, which the other workers use as well.
        letter: the first letter of this worker's own users.
    """

    def __init__(self, address: Address, letter: str, kind: str, way: Way) -> None:
        self._address, self._letter, self._kind, self._way = address, letter, kind, way
        self._upstox = LocalUpstox(totp_once=False)

    def faults(self, moments: Sequence[Moment]) -> list[str]:
        """Hit a login at each of these moments, and return the promises that were broken."""
        return [fault for _, found in self.runs(moments) for fault in found]

    def undisturbed(self) -> Told:
        """Run a login that nothing hits, and return its report."""
        ((run, faults),) = self.runs([NEVER])
        assert not faults, faults
        assert run.told is not None
        assert run.told.arrived == [run.told.token]
        assert run.told.calls, "the faults see no call of this driver"
        return run.told

    def runs(self, moments: Sequence[Moment]) -> list[tuple[Run, list[str]]]:
        users = [f"C{self._letter}{number:04}" for number in range(len(moments))]
        with self._upstox:
            accounts = {user_id: self._upstox.add_account(user_id) for user_id in users}
            login = Accounts(
                {user_id: account.credentials() for user_id, account in accounts.items()},
                base_domain=self._upstox.base_domain,
            )
            with self._address.open(login=login) as store:
                pairs = zip(users, moments, strict=True)
                runs: Iterable[Run] = (self._hit(store, accounts[user], moment) for user, moment in pairs)
                if "lease" in self._address.options:  # All leases end together, so wait for them only once.
                    runs = list(runs)
                return [(run, list(self._broken(store, run))) for run in runs]

    def _hit(self, store: Any, account: Account, moment: Moment) -> Run:
        """Log this account in while it has a living token, and hit that login at this moment."""
        store.save_token(self._upstox.notify(account.user_id))
        if self._way.revoked:
            store.revoke_token(account.user_id)
        process, connection = processes.start(
            log_in,
            self._address,
            self._upstox.base_domain,
            account.credentials(),
            account.user_id if self._way.named else None,
            self._way.method,
            moment,
            self._kind,
        )
        come, over = threading.Event(), threading.Event()

        def at_a_step(step: int, side: str) -> None:
            if (step, side) == moment[1:]:
                come.set()
                if self._kind == ERROR:
                    over.set()
                    raise ConnectionResetError
                assert process.pid is not None
                os.kill(process.pid, signal.SIGINT if self._kind == INTERRUPT else signal.SIGKILL)
            if (step, "answer") == (moment.number, side):
                over.set()

        self._upstox.on_step = at_a_step if moment.what == "step" else None
        told = None
        with connection:
            assert connection.recv() == "ready"
            connection.send("go")
            with contextlib.suppress(EOFError, ConnectionResetError):
                assert connection.poll(60), f"{moment}: the login hangs"
                told = connection.recv()
        process.join()
        hit = come.is_set() or told == KILL or (isinstance(told, Told) and told.hit)
        if moment.what == "step" and come.is_set():
            # Upstox finishes a request even if the client has died in the meantime. Until then nobody can know the
            # result.
            assert over.wait(20)
        self._upstox.on_step = None
        return Run(account, moment, hit, told if isinstance(told, Told) else None)

    def _broken(self, store: Any, run: Run) -> Iterator[str]:
        """Yield a description of each promise that was broken."""
        told, user_id, way = run.told, run.account.user_id, f"{self._way}, {self._kind} at {run}"
        if run.hit != (run.moment != NEVER) or (told is None) != (run.hit and self._kind == KILL):
            yield f"{way}: the fault did not hit, or not in this way"
        for name in (user_id, f"{ACCOUNT_LOCK}{store.login.account_of(user_id)}"):
            with store.backend.lock(name):
                pass  # That login is over.
        kept = told.token if told else None
        for token in told.arrived if told else ():
            if token != kept and not _is_stored(store, user_id, Secret(token)):
                yield f"{way}: a token that had arrived is neither in the store nor in the error"
        if told and told.outcome == "a token" and not _is_stored(store, user_id, Secret(str(told.token))):
            yield f"{way}: a token was returned that is not in the store"
        read = store.get_valid_token(user_id)
        if read is not None and not self._upstox.is_living(read["token"]):
            yield f"{way}: get_valid_token hands out a token that Upstox refuses"
        try:
            there = store.get_or_create_token(user_id)["token"]
        except StorageError as error:
            yield f"{way}: get_or_create_token fails ({type(error).__name__}: {error})"
        else:
            if not self._upstox.is_living(there):
                yield f"{way}: get_or_create_token hands out a token that Upstox refuses"


def moments_of(told: Told, kind: str) -> list[Moment]:
    """Return the moments of a login that makes the same calls as this one."""
    calls = range(1 + (told.before_the_token if kind == TWO_INTERRUPTS else 0), len(told.calls) + 1)
    at_calls = [Moment("call", number, side) for number in calls for side in ("before", "after")]
    return at_calls if kind in (OUTAGE, TWO_INTERRUPTS) else STEPS + at_calls


def broken_at_every_step(
    address: Address, kind: str, way: Way = PLAIN, workers: int = WORKERS
) -> tuple[int, list[str]]:
    """Hit one login at each of its moments. Return the number of moments, and the promises that were broken."""
    moments = moments_of(Worker(address, "Z", kind, way).undisturbed(), kind)
    shares = [moments[first::workers] for first in range(workers)]
    each = [Worker(address, chr(ord("A") + number), kind, way) for number in range(workers)]
    with ThreadPoolExecutor(workers) as threads:
        found = threads.map(Worker.faults, each, shares)
        return len(moments), [fault for faults in found for fault in faults]


def _is_stored(store: Any, user_id: str, token: Secret) -> bool:
    newest = store.backend.find_newest(user_id) or store.backend.find_newest(user_id.upper())
    return newest is not None and store.cipher.is_of(newest, token)
