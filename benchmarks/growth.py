"""`make bench BENCH_OPTIONS=--growth`: do calls cost the same when there is much more in the store?

Apart from the other measurements, because loading ten million tokens takes longer than all of those.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks import rows
from benchmarks.measure import Threaded, compare
from benchmarks.memory import Peak, peaks
from benchmarks.stores import CROWD, SEED, Servers, options, ours
from benchmarks.tables import number, table, verdict
from upstox_db_examples import (
    HybridUpstoxStorage,
    MongoUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
    TokenStorage,
)

BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"
FLAT = 1.2  # a call among the most tokens, compared with the fewest
OF_READS = 2.0  # a batch that finds all tokens living, compared with the reads alone
MOST_MB = 100.0
# How many tokens are imported and exported. MongoDB takes the longest for each.
MEMORY_TOKENS = {"SQLite": 100_000, "PostgreSQL": 30_000, "MongoDB": 10_000, "Hybrid": 30_000}
SIZES = (1_000, 1_000_000)
SQLITE_SIZES = (*SIZES, 10_000_000)
STORES = ("SQLite", "PostgreSQL", "MongoDB", "Hybrid")  # The pooled store's file is SQLite's.


class Grown(NamedTuple):
    """The median times of a call, in microseconds, by the number of tokens."""

    store: str
    operation: str
    micros: dict[int, float]


class Batch(NamedTuple):
    """Seconds for a batch of living tokens, and for the reads alone. Both are medians."""

    store: str
    users: int
    batch: float
    reads: float


class Growth(NamedTuple):
    """Everything that this option measures."""

    calls: list[Grown]
    batches: list[Batch]
    peaks: list[Peak]


def measured(
    servers: Servers,
    sizes: Mapping[str, Sequence[int]],
    batch: int,
    tokens: Mapping[str, int],
    rounds: int,
    seconds: float,
) -> Growth:
    """Measure the stores that `sizes` names, a batch of so many users, and the memory for so many tokens."""
    calls, batches, memory = [], [], []
    for name, counts in sizes.items():
        with ExitStack() as stack:
            sides = {}
            for count in counts:
                print(f"{name}: loading {count:,} tokens ...", flush=True)
                sides[count] = stack.enter_context(_grown(name, servers, count))
            for operation in ("read", "store"):
                results = compare(sides, operation, 1, rounds, seconds)
                calls.append(Grown(name, operation, {count: each.cost for count, each in results.items()}))
                print(f"{name}: {operation}: {_micros(calls[-1])}", flush=True)
            batches.append(_batch(name, sides[min(counts)].storage, batch))
        print(f"{name}: importing and exporting {tokens[name]:,} tokens ...", flush=True)
        memory += peaks(servers.folder, name, functools.partial(_empty, name, servers), tokens[name])
    return Growth(calls, batches, memory)


@contextmanager
def _empty(name: str, servers: Servers) -> Iterator[str]:
    """Yield the address of an empty store of this kind."""
    run = f"bench_{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        if name == "SQLite":
            folder = servers.folder / run
            folder.mkdir()
            stack.callback(shutil.rmtree, folder)
            yield str(folder / "ours.db")
        elif name == "MongoDB":
            yield f"{servers.mongodb}#{stack.enter_context(rows.mongodb_database(servers.mongodb, run))}"
        else:
            url = stack.enter_context(rows.postgresql_database(servers.postgresql, run))
            yield f"{servers.redis} {url}" if name == "Hybrid" else url


@contextmanager
def _grown(name: str, servers: Servers, count: int) -> Iterator[Threaded]:
    """Yield our side, with so many old tokens of others and a living one for each user."""
    run = f"bench_{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        if name == "SQLite":
            storage = _sqlite(stack, servers.folder / run, count)
        elif name == "MongoDB":
            database = stack.enter_context(rows.mongodb_database(servers.mongodb, run))
            storage = stack.enter_context(MongoUpstoxStorage(servers.mongodb, database, **options()))
            ours(storage).once("store", SEED)
            rows.multiply_in_mongodb(servers.mongodb, database, "tokens", rows.OURS_IN_MONGODB, count)
        else:
            url = stack.enter_context(rows.postgresql_database(servers.postgresql, run))
            if name == "Hybrid":
                prefix = stack.enter_context(rows.redis_prefix(servers.redis, run))
                hybrid = HybridUpstoxStorage(servers.redis, url, redis_prefix=prefix, pool_size=CROWD, **options())
                storage = stack.enter_context(hybrid)
            else:
                storage = stack.enter_context(PostgreSQLUpstoxStorage(url, pool_size=CROWD, **options()))
            ours(storage).once("store", SEED)
            rows.multiply_in_postgresql(url, "upstox_tokens", rows.OURS, count)
        side = ours(storage)
        for user in side.users:
            side.once("store", user)
        yield side


def _sqlite(stack: ExitStack, folder: Path, count: int) -> TokenStorage:
    folder.mkdir()
    path = folder / "ours.db"
    with SQLiteUpstoxStorage(path, **options()) as storage:
        ours(storage).once("store", SEED)
    rows.multiply_in_sqlite(str(path), "upstox_tokens", rows.OURS, count)
    stack.callback(path.unlink)
    return stack.enter_context(SQLiteUpstoxStorage(path, **options()))


def _batch(name: str, storage: TokenStorage, users: int) -> Batch:
    names = [f"BATCH{number:06}" for number in range(users)]
    for user in names:
        storage.store_token(user)
    times: dict[str, list[float]] = {"batch": [], "reads": []}
    for _ in range(3):
        begin = time.perf_counter()
        results = storage.store_token_batch(names, progress=False)
        middle = time.perf_counter()
        for user in names:
            storage.get_valid_token(user)
        times["batch"].append(middle - begin)
        times["reads"].append(time.perf_counter() - middle)
        if not all(each["success"] and each["kept"] for each in results):
            raise RuntimeError("The batch logged somebody in, although all tokens are living.")
    return Batch(name, users, *(statistics.median(each) for each in times.values()))


def _micros(grown: Grown) -> str:
    return ", ".join(f"{count:,}: {micros:,.0f} µs" for count, micros in grown.micros.items())


def written(growth: Growth) -> str:
    """Return the tables."""
    lines = []
    for each in growth.calls:
        ratio = each.micros[max(each.micros)] / each.micros[min(each.micros)]
        lines.append([each.store, each.operation, _micros(each), number(ratio), verdict(ratio, FLAT)])
    batches = [
        [each.store, f"{each.users:,}", f"{each.batch:.2f} s", number(ratio), verdict(ratio, OF_READS)]
        for each in growth.batches
        for ratio in [each.batch / each.reads]
    ]
    memory = [
        [each.store, each.what, f"{each.tokens:,}", f"{each.mb:.0f} MB", verdict(each.mb, MOST_MB)]
        for each in growth.peaks
    ]
    return "\n\n".join(
        [
            f"The median of a call by the number of tokens, and the most against the fewest, at most {FLAT:g}:",
            table(["store", "call", "tokens: time", "ratio", ""], lines),
            f"A batch that finds all tokens living, against the reads alone, at most {OF_READS:g}:",
            table(["store", "users", "batch", "ratio", ""], batches),
            "How much the memory of a program grows during these calls, for a million tokens of a million users, at "
            f"most {MOST_MB:g} MB. This is reckoned from fewer tokens:",
            table(["store", "call", "measured with", "for a million", ""], memory),
        ]
    )
