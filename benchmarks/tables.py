"""Tables and numbers in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

NONE = "—"  # for a side that has no such method


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def number(ratio: float | None) -> str:
    if ratio is None:
        return NONE
    if ratio < 0.1:
        return f"{ratio:.2g}"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def verdict(ratio: float, bound: float) -> str:
    # The verdict is about the rounded number, so that nobody reads "3.00, not reached" for a target of 3.
    return "reached" if round(ratio, 2) <= bound else "**not reached**"


def into(file: Path, text: str, begin: str, end: str) -> None:
    """Put the text between the file's markers. What a person wrote around them stays."""
    before, _, rest = file.read_text().partition(begin)
    after = rest.partition(end)[2]
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
