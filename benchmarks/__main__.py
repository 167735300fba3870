"""`make bench`: measure all sides on genuine servers, side by side in one run. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg2
import redis
from pymongo import MongoClient

from benchmarks import alternatives, delays, growth, picture, report, startup, steps
from benchmarks.measure import OPERATIONS, Threaded, compare
from benchmarks.stores import CROWD, STORES, Servers, opened
from benchmarks.tables import into
from benchmarks.targets import Row
from upstox_db_examples.local import servers as local

HERE = Path(__file__).parent
LIBRARIES = ("psycopg2-binary", "pymongo", "redis", "cryptography", "py-key-value-aio", "diskcache", "sqlalchemy")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    begin = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        print("Starting PostgreSQL, MongoDB and Redis ...", flush=True)
        servers = Servers(
            folder,
            stack.enter_context(local.postgresql(settings={"max_connections": "400"})),
            stack.enter_context(local.mongodb()),
            stack.enter_context(local.redis()),
        )
        if options.growth:
            _grow(servers, options)
        else:
            _compare(servers, options)
    print(f"{options.folder} is written, after {time.perf_counter() - begin:.0f} s.")


def _compare(servers: Servers, options: argparse.Namespace) -> None:
    versions = _versions(servers)
    found = report.Found([], [], *_apart(servers.folder, options), [])
    rows: list[Row] = []
    for name in STORES:
        rows += _measured(name, servers, options, found)
    rows.sort(key=lambda row: (STORES.index(row.store), OPERATIONS.index(row.operation), row.crowd, row.tokens))
    found = found._replace(rows=rows)
    how = (
        f"{options.rounds} rounds for one thread, {_fewer(options.rounds)} for {CROWD}, on {os.cpu_count()} processor "
        f"cores; {CROWD} users with a living token, and "
        f"{' and '.join(f'{count:,}' for count in options.tokens)} old tokens of others."
    )
    text = report.written(found, versions, how)
    print(f"\n{text}\n")
    into(_page(options.folder), text, report.BEGIN, report.END)
    picture.draw_ratios(rows, options.folder / "benchmarks.svg")
    picture.draw_choices(found.choices, options.folder / "choices.svg")
    if options.folder == HERE:
        into(HERE.parent / "docs" / "choosing.md", report.short(rows), report.BEGIN, report.END)


def _apart(folder: Path, options: argparse.Namespace) -> tuple[list[alternatives.Alternative], list[startup.Start]]:
    print("Other choices, and start-up ...", flush=True)
    choices = alternatives.measured(folder / "choices", options.rounds, options.seconds)
    return choices, startup.measured(folder / "startup", options.rounds)


def _grow(servers: Servers, options: argparse.Namespace) -> None:
    usual = {name: growth.SQLITE_SIZES if name == "SQLite" else growth.SIZES for name in growth.STORES}
    sizes = {name: options.tokens or usual[name] for name in options.stores}
    found = growth.measured(servers, sizes, 10_000, growth.MEMORY_TOKENS, options.rounds, options.seconds)
    text = growth.written(found)
    print(f"\n{text}\n")
    into(_page(options.folder), text, growth.BEGIN, growth.END)


def _measured(name: str, servers: Servers, options: argparse.Namespace, found: report.Found) -> list[Row]:
    rows = []
    with ExitStack() as stack:
        # The small and the large tables take turns in the same rounds, because they are compared with each other as
        # well.
        sides = {}
        for tokens in options.tokens:
            print(f"{name}: loading {tokens:,} tokens ...", flush=True)
            sides.update({(tokens, side.name): side for side in stack.enter_context(opened(name, servers, tokens))})
        for operation in (each for each in OPERATIONS if any(side.can(each) for side in sides.values())):
            for crowd, rounds in ((1, options.rounds), (CROWD, _fewer(options.rounds))):
                all_results = compare(sides, operation, crowd, rounds, options.seconds)
                for tokens in options.tokens:
                    results = {side: result for (count, side), result in all_results.items() if count == tokens}
                    rows.append(Row(name, operation, tokens, crowd, results))
                    costs = ", ".join(f"{side} {result.cost:,.0f}" for side, result in results.items())
                    print(f"{name}: {operation}, {crowd} at once, {tokens:,} tokens: {costs} µs", flush=True)
        mine = sides[max(options.tokens), "ours"]
        assert isinstance(mine, Threaded)
        found.delays.append(delays.measured(name, mine.storage, mine.users, options.calls, options.seconds * 4))
        # The last one, because nobody can use the storage afterwards.
        found.steps.extend(steps.measured(name, mine.storage, mine.users, options.calls))
    return rows


def _fewer(rounds: int) -> int:
    # A crowd makes many more calls in a turn, and its turn lasts until the slowest call has ended.
    return (rounds + 1) // 2


def _page(folder: Path) -> Path:
    """Return the page that the tables are written into."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "README.md"
    if not file.exists():
        parts = (report.BEGIN, report.END, "![Ratios](benchmarks.svg)", growth.BEGIN, growth.END)
        file.write_text("# A run of the benchmarks\n\n" + "\n\n".join(parts) + "\n")
    return file


def _versions(servers: Servers) -> dict[str, str]:
    with closing(psycopg2.connect(servers.postgresql)) as conn, conn.cursor() as cursor:
        cursor.execute("SHOW server_version")
        ((postgresql,),) = cursor.fetchall()
    with MongoClient[dict[str, Any]](servers.mongodb) as mongo:
        mongodb = mongo.server_info()["version"]
    with closing(redis.Redis.from_url(servers.redis)) as client:
        info: Any = client.info("server")
        kept = {"Valkey": info["valkey_version"]} if "valkey_version" in info else {"Redis": info["redis_version"]}
    found = {"SQLite": sqlite3.sqlite_version, "PostgreSQL": postgresql, "MongoDB": mongodb, **kept}
    return {**found, "Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench BENCH_OPTIONS=...", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a thousand tokens and short rounds; into build/benchmarks, not here"
    )
    parser.add_argument(
        "--growth", action="store_true", help="instead: up to ten million tokens, and the memory of an export"
    )
    parser.add_argument(
        "--stores", nargs="+", choices=growth.STORES, default=growth.STORES, help="with --growth: only these"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="how many old tokens there are, the fewest first")
    for name, kind in (
        ("--rounds", int),
        ("--calls", int),
        ("--seconds", float),
        ("--folder", Path),
    ):
        # These options are for the tests, which need the smallest possible run.
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    usual: dict[str, Any] = {"tokens": [1000, 1_000_000], "rounds": 5, "calls": 300, "seconds": 0.25, "folder": HERE}
    if options.quick:
        usual |= {"tokens": [1000], "seconds": 0.1, "folder": HERE.parent / "build" / "benchmarks"}
    if options.growth:
        del usual["tokens"]  # Each store has its own.
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
