"""Export and import take no more memory for more users, but for eight bytes each."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.memory import load
from upstox_db_examples import KeyRing, SQLiteUpstoxStorage, export_tokens, import_tokens
from upstox_db_examples.core import backend
from upstox_db_examples.core.token import StoredToken
from upstox_db_examples.sqlite.backend import SQLiteBackend

FEW, MANY = 150, 450
MOST = 36  # bytes for each user; a str takes 58, and a set of tuples took 230
OFTEN = 25  # users


class WeighedBackend(SQLiteBackend):
    calls = most = 0

    def read_tokens(self, user_id: str | None) -> list[StoredToken]:
        self.calls += 1
        if self.calls % OFTEN == 0:
            gc.collect()  # Python also keeps some freed tuples, and this frees them.
            self.most = max(self.most, tracemalloc.get_traced_memory()[0])
        return super().read_tokens(user_id)


class Weighed(SQLiteUpstoxStorage):
    backend_class = WeighedBackend


def memory_of(store: Weighed, call: Callable[[], object]) -> int:
    """Return by how many bytes the memory grows at most during this call."""
    assert isinstance(store.backend, WeighedBackend)
    gc.collect()
    gc.freeze()  # so that the next collections are quick
    tracemalloc.start()
    try:
        call()
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    return store.backend.most


def test_memory_does_not_grow_with_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "USERS_AT_ONCE", OFTEN)  # Otherwise one answer would hold all of these few.
    key, file = KeyRing.new_key(), tmp_path / "export"
    exports, imports = {}, {}
    for count in (OFTEN, FEW, MANY):  # The first ones fill what is filled only once.
        load(tmp_path / f"{count}.db", key, count)
        with Weighed(tmp_path / f"{count}.db", keys=KeyRing(key)) as source:
            exports[count] = memory_of(source, lambda: export_tokens(source, file, progress=False))
        with Weighed(tmp_path / f"into{count}.db", keys=KeyRing(key)) as target:
            imports[count] = memory_of(target, lambda: import_tokens(target, file, progress=False))
    for peaks in (exports, imports):
        assert (peaks[MANY] - peaks[FEW]) / (MANY - FEW) < MOST, (exports, imports)
