"""Helpers and tests are kept apart: nothing imports a test module, and the helpers contain no tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from ..support.project import ROOT

CODE = {file.relative_to(ROOT / "tests"): file.read_text() for file in (ROOT / "tests").rglob("*.py")}


def imported(code: str) -> Iterator[str]:
    """Yield each part of each imported name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            yield from ".".join([module, *(alias.name for alias in node.names)]).split(".")


def modules_of_tests(code: str) -> list[str]:
    return [name for name in imported(code) if name.startswith("test_")]


def defined_tests(code: str) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if function.name.startswith("test_")]


def test_no_module_imports_a_test_module() -> None:
    """Code that two test modules share belongs in support/ or contracts/."""
    assert len(CODE) > 50
    assert {str(file): names for file, code in CODE.items() if (names := modules_of_tests(code))} == {}


@pytest.mark.parametrize("code", ["from .test_a import b", "from . import b, test_a", "import tests.core.test_a as a"])
def test_such_an_import_is_found(code: str) -> None:
    assert modules_of_tests(code) == ["test_a"]


def test_tests_lie_in_test_modules_and_contracts_only() -> None:
    elsewhere = {
        file: code for file, code in CODE.items() if not file.match("test_*.py") and file.parts[0] != "contracts"
    }
    assert {str(file): names for file, code in elsewhere.items() if (names := defined_tests(code))} == {}
