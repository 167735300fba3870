"""The command of `upstox-db` that needs no store: copy."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .cli_common import OpenStore, command, many
from .copy_files import write, write_file
from .copy_pattern import Copy, collect, collect_minimal, lines_of_minimal_use, lines_of_use, packages
from .core.environment import expand_home
from .patterns import PATTERNS


@command(
    "copy",
    "upstox-db copy postgresql --list",
    "upstox-db copy postgresql my_tokens",
    "upstox-db copy --minimal postgresql tokens.py",
)
@click.argument("pattern", metavar="PATTERN", type=click.Choice(list(PATTERNS)))
@click.argument("target", metavar="TARGET", required=False, type=click.Path(path_type=Path))
@click.option("--list", "listed", is_flag=True, help="Print what would be copied, and write nothing.")
@click.option(
    "--minimal", is_flag=True, help="Copy the smallest version of the pattern: one file of at most 100 lines."
)
@click.pass_obj
def copy(store: OpenStore, pattern: str, target: Path | None, listed: bool, minimal: bool) -> None:
    """Copy a pattern's code, or its smallest version.

    PATTERN is sqlite, pooled, postgresql, mongodb or hybrid. TARGET is a folder. It becomes a package that does not
    need this one, so it must have a valid Python name. Only files that the pattern imports are copied. If a file
    already exists and differs, nothing is written. The command can be run again.

    With --minimal, TARGET is a file such as tokens.py, in a folder that exists.
    """
    target = expand_home(target) if target else None
    found = collect_minimal(pattern, target.name if target else f"{pattern}.py") if minimal else collect(pattern)
    if listed:
        store.result(listing(found), count_lines(found))
    elif target is None:
        raise click.UsageError(f"Give a {'file' if minimal else 'folder'} as TARGET, or --list.")
    elif minimal:
        use, (needed, _) = lines_of_minimal_use(found, target), packages(found)
        written = write_file(found.files[target.name], target)
        told = [f"{target}: {'copied' if written else 'was there already'}."]
        data: dict[str, Any] = {"file": str(target), "copied": int(written), "there_already": int(not written)}
        report(store, told, data, needed, [], use)
    else:
        use, (needed, optional) = lines_of_use(found, target), packages(found)
        written = write(found.files, target)
        there = len(found.files) - written
        told = [f"{target}: {many(written, 'file')} copied" + (f", {there} were there already." if there else ".")]
        data = {"folder": str(target), "copied": written, "there_already": there}
        report(store, told, data, needed, optional, use)


def report(
    store: OpenStore, told: list[str], data: dict[str, Any], needed: list[str], optional: list[str], use: list[str]
) -> None:
    """Print what was copied, what to install for it, and how to use it."""
    told += [f"Install what it needs: pip install {shlex.join(needed)}"]
    told += [f"Optional: {shlex.join(optional)}"] if optional else []
    told += ["Use it like this:", "", *(f"    {line}" for line in use)]
    store.report("\n".join(told), data | {"needs": needed, "optional": optional, "use": use})


def count_lines(found: Copy) -> dict[str, int]:
    """Count the lines of each file."""
    return {name: content.count(b"\n") for name, content in found.files.items()}


def listing(found: Copy) -> str:
    """List each file with its number of lines and the file that imports it."""
    lines = count_lines(found)
    rows = [
        f"{lines[name]:>6}  {name:<28}{f'for {found.reasons[name]}' if found.reasons[name] else ''}".rstrip()
        for name in sorted(lines)
    ]
    return "\n".join([*rows, f"{sum(lines.values()):>6}  lines in {many(len(lines), 'file')}"])
