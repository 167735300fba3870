"""No module reads the underscored names of another module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Python documents these as public: the methods of a named tuple, os._exit and sys._getframe.
PUBLIC_ALL_THE_SAME = {"_replace", "_asdict", "_fields", "_make", "_exit", "_getframe"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_ALL_THE_SAME


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield each underscored name that this module reads and does not define itself."""
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            own.update(each.id for each in targets if isinstance(each, ast.Name))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, each.name) for each in node.names if is_private(each.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            yield from [(node.lineno, node.attr)] if node.attr not in own else []


def is_self(value: ast.expr) -> bool:
    """Return whether this is `self`, `cls` or `super()`, because a class may use what it inherits."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def test_no_module_reads_anothers_underscores() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for folder in ("upstox_db_examples", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in private_names(ast.parse(path.read_text()))
    ]
    assert found == []
