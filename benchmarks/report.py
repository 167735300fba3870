"""What a run writes into benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks import targets
from benchmarks.alternatives import Alternative
from benchmarks.delays import AWAITED, BLOCKING, IDLE, Delay
from benchmarks.measure import Result
from benchmarks.startup import Start
from benchmarks.steps import Steps
from benchmarks.stores import ONE_MESSAGE, PROMISES
from benchmarks.tables import NONE, number, table
from benchmarks.targets import Row

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SIDES = ("ours", "bare", PROMISES, "guide", "py-key-value")
RATIOS = (("ours", "bare"), (PROMISES, "bare"), ("ours", PROMISES), ("guide", "ours"), ("py-key-value", "ours"))


class Found(NamedTuple):
    """Everything that a run measured."""

    rows: list[Row]
    steps: list[Steps]
    choices: list[Alternative]
    starts: list[Start]
    delays: list[Delay]


def written(found: Found, versions: dict[str, str], how: str) -> str:
    """Return everything between the markers."""
    most = max(row.tokens for row in found.rows)
    chapters = [
        f"{how}\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "## Targets\n\n" + targets.written(found.rows, found.starts),
        "## What else you could take\n\nOn one machine, with one thread. All of them encrypt.\n\n"
        + _choices(found.choices),
        f"## Where our time goes\n\nOne thread, {most:,} tokens: each step's share of all calls' time, and a call's "
        "median in microseconds.\n\n" + _steps(found.steps),
        "## Start-up\n\nProcessor time of a fresh Python, in milliseconds.\n\n" + _starts(found.starts),
        "## Event loop and watch\n\nIn milliseconds. Event loop: how much too long its tasks sleep while nothing goes "
        "on, while four tasks await reads and stores through `AsyncTokenStorage`, and while the same calls block the "
        "loop (median / 99th percentile). Watch: from the call of `store_token` until `store.watch` has the token "
        "(median / longest). SQLite's watch polls. The others are told.\n\n" + _delays(found.delays),
        "## Ratios\n\n" + _ratios(found.rows),
        f"## Times\n\nFor each side the median and the 99th percentile of single calls, in microseconds. With more "
        "than one thread also, in brackets, what a call cost all threads together, and the fewest and the most calls "
        f"of a thread in a turn.\n\n{_times(found.rows)}\n\n{_one_message(found.rows)}",
    ]
    return "\n\n".join(chapters)


def _choices(choices: Sequence[Alternative]) -> str:
    first = choices[0].results
    lines = []
    for each in choices:
        cells = []
        for operation in ("read", "store"):
            cost = each.results[operation].cost
            cells += [f"{cost:,.0f} µs", number(cost / first[operation].cost)]
        lines.append([each.name, *cells, "yes" if each.durable else "**no**", each.note])
    return table(["", "read", "÷ ours", "store", "÷ ours", "durable", "how"], lines)


def _steps(parts: Sequence[Steps]) -> str:
    lines = []
    for each in parts:
        shares = ", ".join(f"{share:.0%} {step}" for step, share in each.shares.items())
        lines.append([each.store, each.operation, f"{each.micros:,.0f}", shares])
    return table(["store", "call", "µs", "steps"], lines)


def _starts(starts: Sequence[Start]) -> str:
    lines = [[s.what, f"{s.ours:.0f}", NONE if s.driver is None else f"{s.driver:.0f}"] for s in starts]
    return table(["", "ours", "the driver alone"], lines)


def _delays(delays: Sequence[Delay]) -> str:
    whats = (IDLE, AWAITED, BLOCKING)
    lines = [
        [each.store, *(f"{median:.1f} / {high:.1f}" for median, high in (*(each.loop[w] for w in whats), each.watch))]
        for each in delays
    ]
    return table(["store", *(f"loop: {what}" for what in whats), "watch"], lines)


def _ratios(rows: Iterable[Row]) -> str:
    head = ["store", "call", "threads", "tokens", *(f"{above} ÷ {below}" for above, below in RATIOS)]
    return table(head, [[*_question(row), *(number(row.ratio(*pair)) for pair in RATIOS)] for row in rows])


def _times(rows: Iterable[Row]) -> str:
    return table(
        ["store", "call", "threads", "tokens", *SIDES],
        [[*_question(row), *(_result(row.results.get(side), row.crowd) for side in SIDES)] for row in rows],
    )


def _one_message(rows: Iterable[Row]) -> str:
    ratios = [
        f"{number(ratio)} ({row.crowd} {'thread' if row.crowd == 1 else 'threads'}, {row.tokens:,} tokens)"
        for row in rows
        if (ratio := row.ratio(ONE_MESSAGE, "bare")) is not None
    ]
    return f"A bare PostgreSQL store that sends one message, not six, takes of bare's time: {', '.join(ratios)}."


def _question(row: Row) -> list[str]:
    return [row.store, row.operation, str(row.crowd), f"{row.tokens:,}"]


def _result(result: Result | None, crowd: int) -> str:
    if result is None:
        return NONE
    together = f" [{result.cost:,.0f}; {result.fewest:,.0f} to {result.most:,.0f}]" if crowd > 1 else ""
    failed = f", {result.failed} of {result.failed + result.calls} failed" if result.failed else ""
    return f"{result.median:,.0f} / {result.p99:,.0f}{together}{failed}"


def short(rows: Sequence[Row]) -> str:
    """Return only the ratios for one thread and the most tokens, for the page that compares the stores."""
    most = max(row.tokens for row in rows)
    chosen = [row for row in rows if row.crowd == 1 and row.tokens == most]
    head = ["", *(f"{above} ÷ {below}" for above, below in RATIOS)]
    return table(
        head, [[f"{row.store} {row.operation}", *(number(row.ratio(*pair)) for pair in RATIOS)] for row in chosen]
    )
