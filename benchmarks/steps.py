"""Show where the time of one of our calls goes: a stopwatch around each step of the life cycle, on one thread."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from upstox_db_examples.core.store import TokenStorage

# The name of each step in the table. A step that a store does not have is left out.
READ = {"find": "found in the database", "decrypt": "decrypted"}
STORE = {
    "lock": "lock taken and given back",
    "find_newest": "newest token looked up",
    "read_notes": "refusals looked up",
    "begin_login": "login recorded and token marked",
    "encrypt": "encrypted",
    "insert": "token stored",
}
REST = "the rest"


class Steps(NamedTuple):
    """The median time of a call, in microseconds, and each step's share of the time of all calls."""

    store: str
    operation: str
    micros: float
    shares: dict[str, float]


def measured(name: str, storage: TokenStorage, users: Sequence[str], calls: int) -> list[Steps]:
    """Measure reads and stores of this storage, step by step. The storage cannot be used afterwards."""
    stopwatch = Stopwatch(storage, READ | STORE, calls)
    return [
        stopwatch.times(name, "read", storage.get_valid_token, users, READ),
        stopwatch.times(name, "store", storage.store_token, users, STORE),
    ]


class Stopwatch:
    """Wraps these methods of a storage and times them. If one step runs inside another, only the inner one counts."""

    def __init__(self, storage: TokenStorage, names: dict[str, str], calls: int) -> None:
        self._calls = calls
        self._spent: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        for name in names:
            for part in (storage.backend, storage.cipher):
                if method := getattr(part, name, None):
                    setattr(part, name, self._lock(method) if name == "lock" else self._step(name, method))

    def times(
        self, store: str, operation: str, call: Callable[[str], object], users: Sequence[str], names: dict[str, str]
    ) -> Steps:
        self._spent.clear()
        micros = []
        for number in range(self._calls):
            begin = time.perf_counter()
            call(users[number % len(users)])
            micros.append((time.perf_counter() - begin) * 1e6)
        shares = {said: self._spent[name] * 1e6 / sum(micros) for name, said in names.items() if name in self._spent}
        return Steps(store, operation, statistics.median(micros), {**shares, REST: 1 - sum(shares.values())})

    def _step(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self._running(name):
                return method(*arguments, **options)

        return timed

    def _lock(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def timed(name: str) -> Iterator[None]:
            lock = method(name)
            with self._running("lock"):
                lock.__enter__()
            try:
                yield
            finally:
                with self._running("lock"):
                    lock.__exit__(None, None, None)

        return timed

    @contextmanager
    def _running(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - begin
            self._spent[name] += whole - self._inner.pop()
            self._inner[-1] += whole
