"""The targets, and whether a run reached them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.measure import Result
from benchmarks.startup import NOTHING, TOKEN, Start
from benchmarks.tables import number, table, verdict


class Row(NamedTuple):
    """One question, and the answer of each side that has such a method."""

    store: str
    operation: str
    tokens: int
    crowd: int
    results: Mapping[str, Result]

    def ratio(self, above: str, below: str) -> float | None:
        if above not in self.results or below not in self.results:
            return None
        return self.results[above].cost / self.results[below].cost


# How many times as long as the bare driver one caller of ours takes at most.
OF_BARE = {
    ("SQLite", "read"): 3.1,
    ("SQLite", "store"): 3.4,
    ("PostgreSQL", "read"): 1.0,
    ("PostgreSQL", "store"): 1.35,
    ("MongoDB", "read"): 1.2,
    ("MongoDB", "store"): 2.6,
    ("Hybrid", "read"): 1.3,
    ("Hybrid", "cold read"): 1.15,
    ("Hybrid", "store"): 1.6,
    ("Pooled", "read"): 3.2,
    ("Pooled", "store"): 3.4,
}
# How many times as much processor time as a Python that does nothing.
OF_NOTHING = {
    "import the pooled store": 8.9,
    "import the postgresql store": 11.4,
    "import the hybrid store": 23.8,
    TOKEN: 7.0,
}
GROWTH = 1.2  # a read with the most tokens, compared with the fewest


def written(rows: Sequence[Row], starts: Sequence[Start]) -> str:
    """Return the table of the targets and the sentences below it."""
    sizes = sorted({row.tokens for row in rows})
    alone = {(row.store, row.operation, row.tokens): row for row in rows if row.crowd == 1}
    lines = []
    for (store, operation), bound in OF_BARE.items():
        ratios = [alone[store, operation, tokens].ratio("ours", "bare") or 0.0 for tokens in sizes]
        cells = [f"{number(ratio)}, {verdict(ratio, bound)}" for ratio in ratios]
        lines.append([f"{store} {operation}", f"{bound:g}", *cells])
    head = ["one thread, ours ÷ bare", "at most", *(f"{tokens:,} tokens" for tokens in sizes)]
    grown = [_grown(alone, sizes)] if len(sizes) > 1 else []
    return "\n\n".join([table(head, lines), _crowd(rows, alone), *grown, _started(starts)])


def _crowd(rows: Sequence[Row], alone: Mapping[tuple[str, str, int], Row]) -> str:
    lines = []
    for row in rows:
        if (row.store, row.operation) == ("Pooled", "read") and row.crowd > 1:
            ratio = row.results["ours"].cost / alone["Pooled", "read", row.tokens].results["ours"].cost
            lines.append(f"{row.tokens:,} tokens {number(ratio)}, {verdict(ratio, 1.0)}")
    return (
        "A pooled read by a crowd costs all its threads together as much as one read by one thread, at most 1 times: "
        f"{'; '.join(lines)}."
    )


def _grown(alone: Mapping[tuple[str, str, int], Row], sizes: Sequence[int]) -> str:
    found = []
    for (store, operation, tokens), row in alone.items():
        if operation == "read" and tokens == sizes[-1]:
            ratio = row.results["ours"].cost / alone[store, operation, sizes[0]].results["ours"].cost
            found.append(f"{store} {number(ratio)}, {verdict(ratio, GROWTH)}")
    return f"A read among {sizes[-1]:,} tokens against one among {sizes[0]:,}, at most {GROWTH:g}: {'; '.join(found)}."


def _started(starts: Sequence[Start]) -> str:
    spent = {start.what: start.ours for start in starts}
    found = []
    for what, bound in OF_NOTHING.items():
        ratio = spent[what] / spent[NOTHING]
        found.append(f"{what} {number(ratio)} of at most {bound:g}, {verdict(ratio, bound)}")
    return f"Processor time against {NOTHING}: {'; '.join(found)}."
