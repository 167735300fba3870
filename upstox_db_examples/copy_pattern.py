"""A pattern as a package of the reader's own: its files, the packages it needs, the lines that use it.

None of that is a list of ours, which would go stale. The files are found by the imports in them, starting at the
pattern's folder, and the packages in the metadata of the installed distribution. Nothing is imported for it: the
pattern's driver need not be installed.
"""

from __future__ import annotations

import ast
import keyword
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from . import _INSTALLED_AS
from .core.errors import InvalidInput

DISTRIBUTION = "upstox-db-examples"
# Each pattern's class, and how it is opened. A pattern's folder and its extra have its name.
PATTERNS = {
    "sqlite": ("SQLiteUpstoxStorage", '"upstox.db"'),
    "pooled": ("PooledUpstoxStorage", '"upstox.db", pool_size=5'),
    "postgresql": ("PostgreSQLUpstoxStorage", '"postgresql://user:password@host/name"'),
    "mongodb": ("MongoUpstoxStorage", '"mongodb://user:password@host/", "upstox_db"'),
    "hybrid": ("HybridUpstoxStorage", '"redis://:password@host/0", "postgresql://user:password@host/name"'),
}


class Copy(NamedTuple):
    """What the copy of a pattern consists of.

    Attributes:
        files: the content of each, by its path in the copy.
        reasons: for each, the file that imports it first; none for the first two.
        outside: the modules that they import from elsewhere, as `sqlite3` and `redis`.
    """

    pattern: str
    files: dict[str, bytes]
    reasons: dict[str, str]
    outside: set[str]


def collect(pattern: str) -> Copy:
    """All that the copy of this pattern consists of.

    Raises:
        InvalidInput: there is no such pattern.
    """
    if pattern not in PATTERNS:
        raise InvalidInput(f"There is no pattern {pattern!r}. Choose one of {', '.join(PATTERNS)}.")
    root = resources.files(__package__)
    due, copy = [(f"{pattern}/__init__.py", "")], Copy(pattern, {}, {}, set())
    for name, reason in due:  # It grows on the way, so what is nearest to the pattern comes first.
        file = root.joinpath(*name.split("/"))
        if name in copy.files or not file.is_file():
            continue
        copy.files[name], copy.reasons[name] = file.read_bytes(), reason
        folder = name.split("/")[:-1]
        for node in ast.walk(ast.parse(copy.files[name])):  # also what is imported in a function, on first use
            if isinstance(node, ast.Import):
                copy.outside.update(each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                copy.outside.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.ImportFrom):
                base = folder[: len(folder) + 1 - node.level] + (node.module.split(".") if node.module else [])
                for path in (base, *([*base, each.name] for each in node.names)):  # A name may be a module, too.
                    due += [("/".join([*path[:n], "__init__.py"]), name) for n in range(1, len(path) + 1)]
                    due.append(("/".join(path) + ".py", name))
    for folder_name in {name.rpartition("/")[0] for name in copy.files}:
        for name, content in _data(root.joinpath(*folder_name.split("/")), folder_name):
            copy.files[name], copy.reasons[name] = content, f"{folder_name}/__init__.py"
    copy.files["__init__.py"], copy.reasons["__init__.py"] = _init(copy).encode(), ""
    return copy


def _data(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """What lies there and is no Python, such as Redis's scripts."""
    for item in folder.iterdir():
        if item.is_dir() and item.name != "__pycache__" and not item.joinpath("__init__.py").is_file():
            yield from _data(item, f"{name}/{item.name}")
        elif item.is_file() and not item.name.startswith(".") and not item.name.endswith((".py", ".pyc")):
            yield f"{name}/{item.name}", item.read_bytes()


def _init(copy: Copy) -> str:
    errors = [node.name for node in ast.parse(copy.files["core/errors.py"]).body if isinstance(node, ast.ClassDef)]
    store, about = PATTERNS[copy.pattern][0], metadata.metadata(DISTRIBUTION)
    made = f"upstox-db copy {copy.pattern}` of {DISTRIBUTION} {about['Version']}, {about['License-Expression']} licence"
    imports = ["from .core.errors import (", *(f"    {name}," for name in sorted(errors)), ")"]
    exports = ["__all__ = [", *(f'    "{name}",' for name in sorted([*errors, store])), "]"]
    return "\n".join(
        [f'"""Copied by `{made}."""', "", *imports, f"from .{copy.pattern} import {store}", "", *exports, ""]
    )


def packages(copy: Copy) -> tuple[list[str], list[str]]:
    """What to install for it, and what it can do without: as the metadata of this distribution has it.

    The command's own packages are not among them, for no copied file imports them.
    """
    imported = {_INSTALLED_AS.get(name, name).replace("_", "-") for name in copy.outside}
    found: tuple[list[str], list[str]] = [], []
    for requirement, _, marker in (each.partition(";") for each in metadata.requires(DISTRIBUTION) or []):
        extra = re.findall(r"extra == ['\"]([\w-]+)", marker)
        needed = re.split(r"[^\w.-]", requirement)[0] in imported
        if extra == [copy.pattern] or (needed and not extra):
            found[not needed].append(requirement.strip())
    return found


def lines_of_use(copy: Copy, folder: Path) -> list[str]:
    """The three lines of a program that uses the copy in this folder.

    Raises:
        InvalidInput: a folder of this name cannot be imported, or other modules could not be imported beside it.
    """
    store, address = PATTERNS[copy.pattern]
    names = [folder.absolute().name]
    with suppress(OSError):  # What cannot be looked into is not taken for a package; `write` will tell.
        for parent in folder.absolute().parents:
            if not (parent / "__init__.py").is_file():
                break
            names.insert(0, parent.name)
    if not names[-1].isidentifier() or keyword.iskeyword(names[-1]):
        raise InvalidInput(f"{names[-1]!r} cannot be the name of a Python package. Choose another folder.")
    if len(names) == 1 and names[0] in sys.stdlib_module_names | copy.outside:
        raise InvalidInput(f"A package {names[0]!r} would hide Python's own or a needed one. Choose another folder.")
    last = 'token = storage.get_or_create_token()["token"]'
    return [f"from {'.'.join(names)} import {store}", f"storage = {store}({address})", last]
