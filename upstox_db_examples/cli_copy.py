"""The command of `upstox-db` that needs no store: copy."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from .cli_common import OpenStore, command, many
from .copy_files import write
from .copy_pattern import Copy, collect, lines_of_use, packages
from .core.environment import expand_home
from .patterns import PATTERNS


@command("copy", "upstox-db copy postgresql --list", "upstox-db copy postgresql my_tokens")
@click.argument("pattern", metavar="PATTERN", type=click.Choice(list(PATTERNS)))
@click.argument("folder", metavar="FOLDER", required=False, type=click.Path(path_type=Path))
@click.option("--list", "listed", is_flag=True, help="Print what would be copied, and write nothing.")
@click.pass_obj
def copy(store: OpenStore, pattern: str, folder: Path | None, listed: bool) -> None:
    """Copy a pattern's code into a package of your own.

    PATTERN is sqlite, pooled, postgresql, mongodb or hybrid. FOLDER becomes a package that does not need this one, so
    it must have a valid Python name. Only files that the pattern imports are copied. If a file already exists and
    differs, nothing is written. The command can be run again.
    """
    found = collect(pattern)
    if listed:
        store.result(listing(found), count_lines(found))
    elif folder is None:
        raise click.UsageError("Give a FOLDER, or --list.")
    else:
        folder = expand_home(folder)
        use, (needed, optional) = lines_of_use(found, folder), packages(found)
        written = write(found.files, folder)
        there = len(found.files) - written
        told = [f"{folder}: {many(written, 'file')} copied" + (f", {there} were there already." if there else ".")]
        told += [f"Install what it needs: pip install {shlex.join(needed)}"]
        told += [f"Optional: {shlex.join(optional)}"] if optional else []
        told += ["Use it like this:", "", *(f"    {line}" for line in use)]
        data = {"folder": str(folder), "copied": written, "there_already": there, "needs": needed}
        store.report("\n".join(told), data | {"optional": optional, "use": use})


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
    return "\n".join([*rows, f"{sum(lines.values()):>6}  lines in {len(lines)} files"])
