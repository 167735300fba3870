"""How much memory an export and an import take. Each is measured in a process of its own.

It grows with the number of users, and by the same for each. An import of a million takes hours. So it is measured for
two smaller numbers of tokens, and the growth from one to the other is reckoned for a million.

Run as a program, it makes the call that is measured, and prints by how many kilobytes the peak grew.
"""

from __future__ import annotations

import base64
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from upstox_db_examples import KeyRing, Secret, SQLiteUpstoxStorage, export_tokens, import_tokens, open_store
from upstox_db_examples.core.cipher import Binding
from upstox_db_examples.sqlite.connections import open_connection

ROOT = Path(__file__).parent.parent
MILLION = 1_000_000
IN_ONE = 10_000  # tokens in one transaction of the loading


class Peak(NamedTuple):
    """By how many megabytes a call raises the peak of its process for a million tokens, and how many were measured."""

    store: str
    what: str
    tokens: int
    mb: float


def peaks(folder: Path, store: str, empty: Callable[[], AbstractContextManager[str]], tokens: int) -> list[Peak]:
    """Import the tokens into this store, and export them from it.

    Args:
        empty: makes a store's place with nothing in it, and yields its address.
    """
    key = KeyRing.new_key()
    grown: dict[str, list[float]] = {"import": [], "export": []}
    few = max(1, tokens // 10)
    for count in (few, tokens):
        place = Path(tempfile.mkdtemp(dir=folder, prefix="memory"))
        (place / "key").write_text(base64.b64encode(key).decode())
        load(place / "source.db", key, count)
        with SQLiteUpstoxStorage(place / "source.db", keys=KeyRing(key)) as source:
            export_tokens(source, place / "tokens", progress=False)
        with empty() as address:
            for what, each in grown.items():
                command = [sys.executable, "-m", "benchmarks.memory", what, str(place), address]
                done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                each.append(int(done.stdout) / 1024)
        shutil.rmtree(place)
    return [
        Peak(store, what, tokens, max(0.0, most - less) / (tokens - few) * MILLION)
        for what, (less, most) in grown.items()
    ]


def load(path: Path, key: bytes, count: int) -> None:
    """Put a living token of each of so many users into a new store. Through the store it would take half an hour."""
    now = datetime.now(UTC).replace(microsecond=0)
    dies, ring = now + timedelta(hours=12), KeyRing(key)
    with SQLiteUpstoxStorage(path, keys=ring) as storage:
        kind = storage.backend.store_kind
        storage.init_database()
    secret = Secret("eyJ0eXAi" * 50)

    def row(number: int) -> tuple[object, ...]:
        user = f"U{number:08}"
        text = ring.encrypt(secret, Binding(user, dies, 1, kind))
        return user, text, ring.key_ids[0], int(now.timestamp()), int(dies.timestamp())

    sql = """INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, products, exchanges, created_at,
             expires_at, metadata) VALUES (?, ?, ?, 1, '[]', '[]', ?, ?, '{}')"""
    with closing(open_connection(path)) as conn:
        for first in range(0, count, IN_ONE):
            conn.execute("BEGIN")
            conn.executemany(sql, map(row, range(first, min(first + IN_ONE, count))))
            conn.execute("COMMIT")


def main(what: str, place: Path, address: str) -> None:
    ring = KeyRing(base64.b64decode((place / "key").read_text()))
    with open_store(address, keys=ring) as store:
        before = peak_kb()
        if what == "import":
            import_tokens(store, place / "tokens", progress=False)
        else:
            export_tokens(store, place / "exported", progress=False)
        print(peak_kb() - before)


def peak_kb() -> int:
    """Return the most memory that this process has had so far, in kilobytes."""
    with suppress(OSError):
        # Not `ru_maxrss`: Linux keeps that from the parent, even in a new program, and the parent is larger.
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
