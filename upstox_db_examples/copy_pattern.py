"""Copy a pattern into the reader's own package: find its files, the packages it needs, and the lines that use it.

We keep no lists of our own, because they would go stale. The files are found by following imports from the pattern's
folder, and the packages come from the metadata of the installed distribution. This imports no pattern, so the pattern's
driver need not be installed.
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

from .core.errors import ConfigurationError, InvalidInput
from .patterns import INSTALLED_AS, PATTERNS

DISTRIBUTION = "upstox-db-examples"


class Copy(NamedTuple):
    """The contents of a pattern's copy.

    Attributes:
        files: path in the copy -> content.
        reasons: path in the copy -> the first file that imports it; "" for the first two files.
        outside: the modules that the files import from elsewhere, such as `sqlite3` and `redis`.
    """

    pattern: str
    files: dict[str, bytes]
    reasons: dict[str, str]
    outside: set[str]


def collect(pattern: str) -> Copy:
    """Collect everything that the copy of this pattern needs.

    Raises:
        InvalidInput: there is no such pattern.
    """
    _require(pattern)
    root = resources.files(__package__)
    due, copy = [(f"{pattern}/__init__.py", "")], Copy(pattern, {}, {}, set())
    for name, reason in due:  # The list grows in the loop, so files nearest to the pattern come first.
        file = root.joinpath(*name.split("/"))
        if name in copy.files or not file.is_file():
            continue
        copy.files[name], copy.reasons[name] = file.read_bytes(), reason
        folder = name.split("/")[:-1]
        for node in ast.walk(ast.parse(copy.files[name])):  # This includes imports inside functions.
            if isinstance(node, ast.Import):
                copy.outside.update(each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                copy.outside.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.ImportFrom):
                base = folder[: len(folder) + 1 - node.level] + (node.module.split(".") if node.module else [])
                for path in (base, *([*base, each.name] for each in node.names)):  # A name may be a module.
                    due += [("/".join([*path[:n], "__init__.py"]), name) for n in range(1, len(path) + 1)]
                    due.append(("/".join(path) + ".py", name))
    for folder_name in {name.rpartition("/")[0] for name in copy.files}:
        for name, content in _data(root.joinpath(*folder_name.split("/")), folder_name):
            copy.files[name], copy.reasons[name] = content, f"{folder_name}/__init__.py"
    copy.files["__init__.py"], copy.reasons["__init__.py"] = _init(copy).encode(), ""
    return copy


def collect_minimal(pattern: str, name: str) -> Copy:
    """Collect the smallest version of this pattern: one file, which gets this name.

    Raises:
        InvalidInput: there is no such pattern.
    """
    _require(pattern)
    content = resources.files(__package__).joinpath("minimal", f"{pattern}.py").read_bytes()
    imports = [node for node in ast.parse(content).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
    return Copy(pattern, {name: content}, {name: ""}, {module.partition(".")[0] for module in modules})


def _require(pattern: str) -> None:
    if pattern not in PATTERNS:
        raise InvalidInput(f"There is no pattern {pattern!r}. Choose one of {', '.join(PATTERNS)}.")


def _data(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files in a folder that are not Python, such as Redis's scripts."""
    for item in folder.iterdir():
        if item.is_dir() and item.name != "__pycache__" and not item.joinpath("__init__.py").is_file():
            yield from _data(item, f"{name}/{item.name}")
        elif item.is_file() and not item.name.startswith(".") and not item.name.endswith((".py", ".pyc")):
            yield f"{name}/{item.name}", item.read_bytes()


def _init(copy: Copy) -> str:
    errors = [node.name for node in ast.parse(copy.files["core/errors.py"]).body if isinstance(node, ast.ClassDef)]
    store, about = PATTERNS[copy.pattern].store, metadata.metadata(DISTRIBUTION)
    made = f"upstox-db copy {copy.pattern}` of {DISTRIBUTION} {about['Version']}, {about['License-Expression']} licence"
    imports = ["from .core.errors import (", *(f"    {name}," for name in sorted(errors)), ")"]
    exports = ["__all__ = [", *(f'    "{name}",' for name in sorted([*errors, store])), "]"]
    return "\n".join(
        [f'"""Copied by `{made}."""', "", *imports, f"from .{copy.pattern} import {store}", "", *exports, ""]
    )


def packages(copy: Copy) -> tuple[list[str], list[str]]:
    """Return the packages that the copy needs and those that are optional, from this distribution's metadata.

    The command's own packages are in neither list, because no copied file imports them.
    """
    imported = {INSTALLED_AS.get(name, name).replace("_", "-") for name in copy.outside}
    found: tuple[list[str], list[str]] = [], []
    for requirement, _, marker in (each.partition(";") for each in metadata.requires(DISTRIBUTION) or []):
        extra = re.findall(r"extra == ['\"]([\w-]+)", marker)
        needed = re.split(r"[^\w.-]", requirement)[0] in imported
        if extra == [copy.pattern] or (needed and not extra):
            found[not needed].append(requirement.strip())
    return found


def lines_of_use(copy: Copy, folder: Path) -> list[str]:
    """Return the three lines of a program that uses the copy in this folder.

    Raises:
        InvalidInput: Python cannot import a folder with this name, or the folder would hide another module.
        ConfigurationError: the working folder was deleted.
    """
    pattern, name = PATTERNS[copy.pattern], _import_name(copy, folder, "package", "folder")
    last = 'token = storage.get_or_create_token()["token"]'
    return [f"from {name} import {pattern.store}", f"storage = {pattern.store}({pattern.example})", last]


def lines_of_minimal_use(copy: Copy, file: Path) -> list[str]:
    """Return the lines of a program that uses this copy of a smallest version: the example in its docstring.

    Raises:
        InvalidInput: this is not the name of a Python file, or the file would hide another module.
        ConfigurationError: the working folder was deleted.
    """
    if file.suffix != ".py":
        raise InvalidInput(f"{file.name!r} is not the name of a Python file. It has to end with .py.")
    name = _import_name(copy, file.with_suffix(""), "module", "file")
    tree = ast.parse(copy.files[file.name])
    (store,) = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    example = [line.strip() for line in (ast.get_docstring(tree) or "").splitlines() if line.startswith("    ")]
    return ["import os", f"from {name} import {store}", *example]


def _import_name(copy: Copy, place: Path, kind: str, what: str) -> str:
    """Return the name by which Python imports the copy. It is longer if the copy lies in a package."""
    try:
        place = place.absolute()
    except OSError as error:  # The working folder was deleted.
        raise ConfigurationError(f"The working folder cannot be used: {error.strerror}. Nothing was copied.") from error
    names = [place.name]
    with suppress(OSError):  # An unreadable folder does not count as a package; `write` reports it.
        for parent in place.parents:
            if not (parent / "__init__.py").is_file():
                break
            names.insert(0, parent.name)
    if not names[-1].isidentifier() or keyword.iskeyword(names[-1]):
        raise InvalidInput(f"{names[-1]!r} cannot be the name of a Python {kind}. Choose another {what}.")
    if len(names) == 1 and names[0] in sys.stdlib_module_names | copy.outside:
        raise InvalidInput(f"A {kind} {names[0]!r} would hide a module that the copy needs. Choose another {what}.")
    return ".".join(names)
