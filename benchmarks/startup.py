"""What it costs to start: the processor time of a fresh Python, with warm bytecode."""

from __future__ import annotations

import base64
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.stores import login, options
from upstox_db_examples import KeyRing, SQLiteUpstoxStorage

ROOT = Path(__file__).parent.parent
USER = "AB1234"
NOTHING = "`python -c pass`"
TOKEN = "`upstox-db token`"
COMMAND = "from upstox_db_examples.cli import main; main()"  # as the installed script
# The same by hand: what a script of twenty lines would do.
BY_HAND = """
import sqlite3, sys, time
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
path, key_file, user = sys.argv[1:]
query = "SELECT token FROM tokens WHERE user_id = ? AND expires_at > ?"
(sealed,) = sqlite3.connect(path).execute(query, (user, time.time())).fetchone()
print(AESGCM(open(key_file, "rb").read()).decrypt(sealed[:12], sealed[12:], user.encode()).decode())
"""
IMPORTS = {
    "sqlite": "sqlite3",
    "postgresql": "psycopg2",
    "mongodb": "pymongo",
    "hybrid": "psycopg2, redis",
    "pooled": "sqlite3",
}


class Start(NamedTuple):
    """The milliseconds of processor time of our code, and of the driver alone."""

    what: str
    ours: float
    driver: float | None


def measured(folder: Path, rounds: int) -> list[Start]:
    """Start each of them once a round, in turn, and return the medians."""
    folder.mkdir()
    commands: dict[tuple[str, str], list[str]] = {(NOTHING, "ours"): ["pass"]}
    for store, drivers in IMPORTS.items():
        commands[f"import the {store} store", "ours"] = [f"import upstox_db_examples.{store}"]
        commands[f"import the {store} store", "driver"] = [f"import {drivers}"]
    commands[TOKEN, "ours"] = [COMMAND, "token", USER, "--no-login", "--store", str(folder / "ours.db")]
    commands[TOKEN, "driver"] = [BY_HAND, *_database_by_hand(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UPSTOX_", "PYTHON"))}
    environment |= {"HOME": str(folder), "UPSTOX_DB_KEY_FILE": str(_our_database(folder))}
    times: dict[tuple[str, str], list[float]] = {which: [] for which in commands}
    for number in range(rounds + 1):
        for which, command in commands.items():
            spent = _processor_ms(command, environment)
            if number:  # The first round writes the bytecode and fills the system's cache of files.
                times[which].append(spent)
    found = {which: statistics.median(each) for which, each in times.items()}
    return [Start(what, spent, found.get((what, "driver"))) for (what, side), spent in found.items() if side == "ours"]


def _processor_ms(command: list[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def _our_database(folder: Path) -> Path:
    key, key_file = KeyRing.new_key(), folder / "keys"
    key_file.touch(mode=0o600)
    key_file.write_text(base64.b64encode(key).decode())
    with SQLiteUpstoxStorage(folder / "ours.db", **(options() | {"keys": KeyRing(key)})) as storage:
        storage.store_token(USER)
    return key_file


def _database_by_hand(folder: Path) -> list[str]:
    key, nonce = os.urandom(32), os.urandom(12)
    key_file, path = folder / "key", folder / "hand.db"
    key_file.write_bytes(key)
    sealed = nonce + AESGCM(key).encrypt(nonce, login(USER).access_token.encode(), USER.encode())
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("CREATE TABLE tokens (user_id TEXT PRIMARY KEY, token BLOB, expires_at REAL)")
        conn.execute("INSERT INTO tokens VALUES (?, ?, ?)", (USER, sealed, time.time() + 86_400))
    return [str(path), str(key_file), USER]
