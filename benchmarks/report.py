"""The table, the verdict on the targets, and the picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Result
from benchmarks.steps import Steps

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NONE = "—"  # for a side that has no such method
SIDES = ("ours", "bare", "guide", "py-key-value")
RATIOS = (("ours", "bare"), ("guide", "ours"), ("py-key-value", "ours"))
MORE = {
    ("SQLite", "read"): "decrypts",
    ("SQLite", "store"): "encrypts; audits the login first, in a transaction of its own; a lock a user",
    ("PostgreSQL", "read"): "decrypts; counts the use and audits it, durably",
    ("PostgreSQL", "store"): "encrypts; audits the login first; a lock a user on a connection of its own",
    ("MongoDB", "read"): "decrypts; counts the use and audits it, durably",
    ("MongoDB", "store"): "encrypts; audits the login first; a lease a user",
    ("Hybrid", "read"): "decrypts; counts the use and audits it, in Redis",
    ("Hybrid", "cold read"): "decrypts; counts the use and audits it, in PostgreSQL",
    ("Hybrid", "store"): "as PostgreSQL; a tombstone, so that no old copy is read",
    ("Pooled", "read"): "decrypts; a bounded pool",
    ("Pooled", "store"): "as SQLite; a bounded pool",
}


class Row(NamedTuple):
    """One question, and the answer of each side that has such a method."""

    store: str
    operation: str
    tokens: int
    crowd: int
    results: dict[str, Result]

    def ratio(self, above: str, below: str) -> float | None:
        if above not in self.results or below not in self.results:
            return None
        return self.results[above].cost / self.results[below].cost


class Target(NamedTuple):
    """An upper limit for the ratio of the time of `above` to the time of `below`."""

    store: str
    says: str
    operation: str
    above: str
    below: str
    bound: float
    at_most: bool = True

    def reached(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound


def _targets_of(store: str, operation: str, of_bare: float, of_guide: float) -> list[Target]:
    what = f"{store} {operation}"
    return [
        Target(store, f"{what}: at most {of_bare:g} times the bare driver's", operation, "ours", "bare", of_bare),
        Target(
            store,
            f"{what}: the guide's takes at least {of_guide:g} times ours",
            operation,
            "guide",
            "ours",
            of_guide,
            False,
        ),
    ]


TARGETS = (
    *_targets_of("SQLite", "read", 3, 3),
    *_targets_of("SQLite", "store", 1.5, 4),
    *_targets_of("PostgreSQL", "read", 1.3, 8),
    *_targets_of("PostgreSQL", "store", 1.3, 5),
    *_targets_of("MongoDB", "read", 1.3, 1),
    *_targets_of("Hybrid", "read", 1.4, 1.3),
    *_targets_of("Hybrid", "cold read", 1.4, 8),
)
GROWTH = 1.2  # a read with the most tokens, compared with the fewest


def written(rows: Sequence[Row], parts: Sequence[Steps], versions: dict[str, str], how: str) -> str:
    """Return everything between the markers."""
    most = max(row.tokens for row in rows)
    chapters = [
        f"{how}\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "## Targets\n\n" + _targets(rows),
        f"## Where our time goes\n\nOne thread, {most:,} tokens: each step's share of all calls' time, and a call's "
        "median in microseconds.\n\n" + _steps(parts),
        "## Ratios\n\n" + _ratios(rows),
        "## Times\n\nFor each side the median and the 99th percentile of single calls, in microseconds; with more than "
        "one thread also, in brackets, what a call cost all threads together.\n\n" + _times(rows),
    ]
    return "\n\n".join(chapters)


def into(file: Path, text: str) -> None:
    """Put the text between the file's markers. What a person wrote around them stays."""
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _targets(rows: Sequence[Row]) -> str:
    cases = sorted({(row.crowd, row.tokens) for row in rows})
    found = {(row.store, row.operation, row.crowd, row.tokens): row for row in rows}
    lines = []
    for target in TARGETS:
        cells = []
        for case in cases:
            ratio = found[target.store, target.operation, *case].ratio(target.above, target.below)
            cells.append(f"{_number(ratio)}, {_verdict(target, ratio)}")
        lines.append([target.says, *cells])
    fewest, most = (pick(tokens for _, tokens in cases) for pick in (min, max))
    grown = {
        row.store: row.results["ours"].cost / found[row.store, "read", row.crowd, fewest].results["ours"].cost
        for row in rows
        if (row.operation, row.tokens, row.crowd) == ("read", most, 1)
    }
    growth = ", ".join(f"{store} {_number(ratio)}" for store, ratio in grown.items())
    table = _table(["", *(f"{_threads(crowd)}, {tokens:,} tokens" for crowd, tokens in cases)], lines)
    return f"{table}\n\nA read among {most:,} tokens against one among {fewest:,}, at most {GROWTH:g}: {growth}."


def _verdict(target: Target, ratio: float | None) -> str:
    # The verdict is about the rounded number, so that nobody reads "3.00, not reached" for a target of 3.
    return "reached" if ratio and target.reached(round(ratio, 2)) else "**not reached**"


def _steps(parts: Sequence[Steps]) -> str:
    lines = []
    for each in parts:
        shares = ", ".join(f"{share:.0%} {step}" for step, share in each.shares.items())
        lines.append([each.store, each.operation, f"{each.micros:,.0f}", shares])
    return _table(["store", "call", "µs", "steps"], lines)


def _ratios(rows: Iterable[Row]) -> str:
    head = ["store", "call", "threads", "tokens", *(f"{above} ÷ {below}" for above, below in RATIOS), "ours also"]
    lines = [[*_question(row), *(_number(row.ratio(*pair)) for pair in RATIOS), _more(row)] for row in rows]
    return _table(head, lines)


def _times(rows: Iterable[Row]) -> str:
    return _table(
        ["store", "call", "threads", "tokens", *SIDES],
        [[*_question(row), *(_result(row.results.get(side), row.crowd) for side in SIDES)] for row in rows],
    )


def _question(row: Row) -> list[str]:
    return [row.store, row.operation, str(row.crowd), f"{row.tokens:,}"]


def _more(row: Row) -> str:
    return MORE[row.store, row.operation]


def _result(result: Result | None, crowd: int) -> str:
    if result is None:
        return NONE
    together = f" [{result.cost:,.0f}]" if crowd > 1 else ""
    failed = f", {result.failed} of {result.failed + result.calls} failed" if result.failed else ""
    return f"{result.median:,.0f} / {result.p99:,.0f}{together}{failed}"


def _number(ratio: float | None) -> str:
    if ratio is None:
        return NONE
    if ratio < 0.1:
        return f"{ratio:.2g}"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def _threads(crowd: int) -> str:
    return "1 thread" if crowd == 1 else f"{crowd} threads"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def short(rows: Sequence[Row]) -> str:
    """Return only the ratios for one thread and the most tokens, for the page that compares the stores."""
    most = max(row.tokens for row in rows)
    chosen = [row for row in rows if row.crowd == 1 and row.tokens == most]
    head = ["", *(f"{above} ÷ {below}" for above, below in RATIOS)]
    return _table(
        head, [[f"{row.store} {row.operation}", *(_number(row.ratio(*pair)) for pair in RATIOS)] for row in chosen]
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw bars for one thread and the most tokens."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 10})
    import matplotlib.pyplot as plt

    most = max(row.tokens for row in rows)
    chosen = [row for row in rows if row.crowd == 1 and row.tokens == most]
    colors = ("#5b6770", "#d1642e", "#2e6fb7")
    # The background is white, so that the picture looks the same on a light and on a dark page.
    figure, axes = plt.subplots(figsize=(8.5, 0.62 * len(chosen) + 1.6), facecolor="white", layout="constrained")
    for place, (pair, color) in enumerate(zip(RATIOS, colors, strict=True)):
        bars = [(y, ratio) for y, row in enumerate(chosen) if (ratio := row.ratio(*pair)) is not None]
        at = [y + (place - 1) * 0.27 for y, _ in bars]
        drawn = axes.barh(at, [r - 1 for _, r in bars], 0.24, left=1, color=color, label=f"{pair[0]} ÷ {pair[1]}")
        axes.bar_label(drawn, [_number(r) for _, r in bars], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(chosen)), [f"{row.store} {row.operation}" for row in chosen])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("how many times as long, logarithmic; 1 is equal")
    axes.set_title(f"One thread, {most:,} stored tokens: ratios of medians in one run", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # The renderer leaves spaces at the ends of lines.
    file.write_text(re.sub(r"[ \t]+$", "", file.read_text(), flags=re.MULTILINE))
