"""The two pictures: the ratios for the benchmarks' page, and the choices of a user for the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.alternatives import Alternative
from benchmarks.stores import PROMISES
from benchmarks.tables import number
from benchmarks.targets import Row

PAIRS = (("ours", "bare"), ("ours", PROMISES), ("guide", "ours"))
COLORS = ("#5b6770", "#2e6fb7", "#d1642e")
PALE = "#b9c2c9"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 10})
    import matplotlib.pyplot as plt

    return plt


def draw_ratios(rows: Sequence[Row], file: Path) -> None:
    """Draw bars for one thread and the most tokens."""
    plt = _pyplot()
    most = max(row.tokens for row in rows)
    chosen = [row for row in rows if row.crowd == 1 and row.tokens == most]
    # The background is white, so that the picture looks the same on a light and on a dark page.
    figure, axes = plt.subplots(figsize=(8.5, 0.62 * len(chosen) + 1.6), facecolor="white", layout="constrained")
    for place, (pair, color) in enumerate(zip(PAIRS, COLORS, strict=True)):
        bars = [(y, ratio) for y, row in enumerate(chosen) if (ratio := row.ratio(*pair)) is not None]
        at = [y + (place - 1) * 0.27 for y, _ in bars]
        drawn = axes.barh(at, [r - 1 for _, r in bars], 0.24, left=1, color=color, label=f"{pair[0]} ÷ {pair[1]}")
        axes.bar_label(drawn, [number(r) for _, r in bars], padding=3, fontsize=8)
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
    _save(plt, figure, file)


def draw_choices(choices: Sequence[Alternative], file: Path) -> None:
    """Draw the times of a read and of a store for each choice. Those that can lose a token are pale."""
    plt = _pyplot()
    figure, both = plt.subplots(1, 2, figsize=(8.5, 2.4), sharey=True, facecolor="white", layout="constrained")
    for axes, operation in zip(both, ("read", "store"), strict=True):
        for place, each in enumerate(choices):
            micros = each.results[operation].cost
            color = PALE if not each.durable else COLORS[1] if each.name == "ours" else COLORS[0]
            drawn = axes.barh(place, micros, 0.6, color=color)
            axes.bar_label(drawn, [f"{micros:,.0f} µs"], padding=3, fontsize=8)
        axes.set_title(f"a {operation}", fontsize=11)
        axes.set_yticks(range(len(choices)), [each.name for each in choices])
        axes.margins(x=0.25)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    both[0].invert_yaxis()
    figure.supxlabel("one machine, one thread, all encrypted; pale: a power cut can lose what was stored", fontsize=9)
    _save(plt, figure, file)


def _save(plt: Any, figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # The renderer leaves spaces at the ends of lines.
    file.write_text(re.sub(r"[ \t]+$", "", file.read_text(), flags=re.MULTILINE))
