"""The files around the package agree with the package."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import assert_type

import pytest

import upstox_db_examples
from upstox_db_examples.hybrid import HybridUpstoxStorage
from upstox_db_examples.mongodb import MongoUpstoxStorage
from upstox_db_examples.patterns import PATTERNS
from upstox_db_examples.pooled import PooledUpstoxStorage
from upstox_db_examples.postgresql import PostgreSQLUpstoxStorage
from upstox_db_examples.sqlite import SQLiteUpstoxStorage

from ..support.project import PYPROJECT, ROOT, run


def test_the_conda_environment_installs_what_pyproject_says() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert f"- python{PYPROJECT['project']['requires-python']}" in text
    assert "- --editable .[dev]" in text, "all packages come from pyproject.toml, so there is no second list to drift"
    packages = re.findall(r"^ +- ([^\s]+)", text, flags=re.MULTILINE)
    assert packages == ["conda-forge", f"python{PYPROJECT['project']['requires-python']}", "pip", "pip:", "--editable"]


def test_sqlite_needs_no_driver(tmp_path: Path) -> None:
    code = (
        "import sys; import upstox_db_examples as u; u.SQLiteUpstoxStorage('x.db').get_valid_token('AB1234')\n"
        "u.PooledUpstoxStorage('x.db').get_valid_token('AB1234')\n"
        "drivers = ('psycopg2', 'tqdm', 'pymongo', 'redis', 'upstox_totp', 'anyio', 'httpx', 'requests')\n"
        "print([name for name in drivers if name in sys.modules])"
    )
    done = run(code, tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_type_checkers_see_the_classes_that_are_imported_on_first_use() -> None:
    # `make check` fails here if mypy sees one of them as Any. Editors complete what mypy sees.
    lazy = (
        assert_type(upstox_db_examples.PostgreSQLUpstoxStorage, type[PostgreSQLUpstoxStorage]),
        assert_type(upstox_db_examples.MongoUpstoxStorage, type[MongoUpstoxStorage]),
        assert_type(upstox_db_examples.HybridUpstoxStorage, type[HybridUpstoxStorage]),
        assert_type(upstox_db_examples.SQLiteUpstoxStorage, type[SQLiteUpstoxStorage]),
        assert_type(upstox_db_examples.PooledUpstoxStorage, type[PooledUpstoxStorage]),
    )
    assert {each.__name__ for each in lazy} <= {each.store for each in PATTERNS.values()}
    assert {each.__name__ for each in lazy} < set(upstox_db_examples.__all__)


@pytest.mark.parametrize(
    ("name", "missing", "package", "extra"),
    [
        ("PostgreSQLUpstoxStorage", ["psycopg2"], "psycopg2-binary", "postgresql"),
        ("MongoUpstoxStorage", ["pymongo", "bson", "gridfs"], "pymongo", "mongodb"),  # everything in its wheel
        ("MongoUpstoxStorage", ["pymongo"], "pymongo", "mongodb"),
        ("HybridUpstoxStorage", ["redis"], "redis", "hybrid"),
        ("HybridUpstoxStorage", ["psycopg2"], "psycopg2-binary", "hybrid"),
    ],
)
def test_a_missing_driver_is_named_with_what_to_install(
    tmp_path: Path, name: str, missing: list[str], package: str, extra: str
) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nfrom upstox_db_examples import {name}"
    told = run(code, tmp_path).stderr.splitlines()[-1]
    clone = f"In a clone of this project, run: pip install '.[{extra}]'"
    assert told == f"ModuleNotFoundError: {name} needs {package}. {clone}"


def make_with(tmp_path: Path, *interpreters: str) -> subprocess.CompletedProcess[str]:
    """Run `make` with only these interpreters. Each of them prints its name and accepts any command."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "make", "rm", "touch", "mktemp"):
        found = next(Path(folder, tool) for folder in os.environ["PATH"].split(":") if Path(folder, tool).exists())
        (tools / tool).symlink_to(found)
    for name in interpreters:
        (tools / name).touch(mode=0o700)
        (tools / name).write_text(f'#!{tools / "sh"}\n[ "$1" = -c ] || echo {name} "$@"\n')
    return subprocess.run(
        ["make", "SHELL=" + str(tools / "sh"), "ELSEWHERE=", ".venv/bin/python"],
        cwd=tmp_path,
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_interpreter_is_found_or_its_lack_is_said(tmp_path: Path) -> None:
    done = make_with(tmp_path)
    assert done.returncode != 0
    assert "No Python 3.12 or newer with venv was found" in done.stderr


def test_an_interpreter_that_the_tests_run_on_goes_before_a_newer_one(tmp_path: Path) -> None:
    done = make_with(tmp_path, "python", "python3", "python3.12", "python3.14")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "python3.12 -m venv .venv")


@pytest.mark.parametrize(
    ("selected", "processes", "told"),
    [("one or two", "0", "1 deselected."), ("not two", "1", "1 deselected, 1 skipped.")],
)
def test_the_summary_counts_what_was_not_run(tmp_path: Path, selected: str, processes: str, told: str) -> None:
    code = "import pytest\ndef test_one(): pass\ndef test_two(): pass\ndef test_three(): pytest.skip('')\n"
    (tmp_path / "test_some.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "tests.support.databases"]
    command += ["-n", processes, "-k", selected]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    quick = dict.fromkeys(("POSTGRES_URL", "MONGODB_URL", "REDIS_URL"), "none is asked")
    quick["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quick}, text=True, capture_output=True, check=True)
    assert f"\nNot run, of the tests collected: {told}\n" in done.stdout


def test_each_module_in_which_something_happens_has_a_logger_of_its_name() -> None:
    found = pkgutil.walk_packages(upstox_db_examples.__path__, "upstox_db_examples.")
    modules = {each.name: importlib.import_module(each.name) for each in found if not each.name.endswith("__main__")}
    loggers = {name: module.logger for name, module in modules.items() if hasattr(module, "logger")}
    assert len(loggers) > 10
    assert all(logger.name == name for name, logger in loggers.items())
    assert [name for name in loggers if "logger." not in inspect.getsource(modules[name])] == []


def test_every_public_name_says_what_it_is() -> None:
    silent = []
    for name in upstox_db_examples.__all__:
        public = getattr(upstox_db_examples, name)
        methods = [each for each in vars(public) if each[0] != "_"] if inspect.isclass(public) else []
        said = {name: public, **{f"{name}.{method}": getattr(public, method) for method in methods}}
        silent += [each for each, what in said.items() if callable(what) and not inspect.getdoc(what)]
    assert silent == []
