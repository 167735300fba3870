"""The wheel works in a clean environment, and so does each pattern that `upstox-db copy` has copied."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from upstox_db_examples import KeyRing, SQLiteUpstoxStorage
from upstox_db_examples.copy_files import write
from upstox_db_examples.copy_pattern import collect, packages
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.patterns import PATTERNS

from ..support.databases import notes
from ..support.project import PYPROJECT, ROOT, run


def installed(folder: Path, *packages: str, python: str = sys.executable) -> Path:
    """Create an environment with only these packages and their dependencies, and return its interpreter."""
    if not folder.exists():
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    # This environment's pip installs into the new one. A copy of pip in each environment would take half of the time.
    if packages:
        pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *packages], check=True)
    return folder / "bin" / "python"


EVERY_COPY_NEEDS = {"cryptography", "upstox-totp"}


def copied(*arguments: str, folder: Path, program: str | Path = Path(sys.executable).parent / "upstox-db") -> str:
    """Run `upstox-db copy` in this folder, and return its output."""
    command, here = [program, "copy", *arguments], Path(program).parent == Path(sys.executable).parent
    env = os.environ if here else {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


def named(told: str) -> list[str]:
    """Return the packages that the command says to install."""
    (found,) = re.findall(r"(?m)^Install what it needs: pip install (.*)$", told)
    return shlex.split(found)


@pytest.fixture(scope="module")
def for_all_patterns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Create an environment with what all patterns need. Each test gets a copy of it, which takes half a second."""
    folder = tmp_path_factory.mktemp("for_all")
    common = set.intersection(*(set(packages(collect(pattern))[0]) for pattern in PATTERNS))
    installed(folder / "environment", *common)
    return folder / "environment", common


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_copied_pattern_runs_with_the_packages_that_the_command_names(
    tmp_path: Path, pattern: str, for_all_patterns: tuple[Path, set[str]], request: pytest.FixtureRequest
) -> None:
    (tmp_path / "trader").mkdir()
    (tmp_path / "trader" / "__init__.py").touch()
    told = copied(pattern, "trader/tokens", folder=tmp_path)
    ready, common = for_all_patterns
    environment = shutil.copytree(ready, tmp_path / "environment", symlinks=True)
    python = installed(environment, *(set(named(told)) - common))
    lines = [line.strip() for line in told.splitlines()[-3:]]
    assert lines[0] == f"from trader.tokens import {PATTERNS[pattern].store}"
    addresses = {}
    if pattern in ("postgresql", "hybrid"):
        addresses["postgresql://user:password@host/name"] = request.getfixturevalue("postgres_url")
    if pattern == "mongodb":
        addresses["mongodb://user:password@host/"], addresses["upstox_db"] = request.getfixturevalue("mongo")
    if pattern == "hybrid":
        addresses["redis://:password@host/0"] = request.getfixturevalue("redis_server")
        prefix = request.getfixturevalue("redis_prefix")
        lines[1] = lines[1].replace(")", f", redis_prefix={prefix!r})")
    for theirs, ours in addresses.items():
        assert f'"{theirs}"' in lines[1]
        lines[1] = lines[1].replace(f'"{theirs}"', repr(ours))
    more = (
        "from importlib.util import find_spec",
        "assert storage.get_valid_token('AB1234')['token'] == token",
        "storage.close()",
        "print([name for name in ('upstox_db_examples', 'pytest', 'tqdm') if find_spec(name)])",
    )
    with LocalUpstox() as upstox:
        account = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        done = run("\n".join([*lines, *more]), tmp_path, python=python, PYTHONPATH="", **account)
    # A copy has no log handler of its own, so its warnings go where Python sends them.
    key_made = f"Made a new key in {tmp_path / 'keys'}. Back it up, and keep the backup apart from the database.\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", key_made)
    if pattern in ("sqlite", "pooled"):
        with SQLiteUpstoxStorage(tmp_path / "upstox.db", keys=KeyRing.from_file(tmp_path / "keys")) as storage:
            assert storage.get_valid_token("AB1234"), "the package must read what a copy has stored"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Build the wheel from the sdist, so that the sdist has to contain everything that the wheel needs.
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_all_of_the_package(wheel: Path) -> None:
    package = ROOT / "upstox_db_examples"
    due = {
        str(file.relative_to(ROOT)) for file in package.rglob("*") if file.suffix in (".py", ".lua", ".typed", ".md")
    }
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name} == due


def interpreters() -> dict[str, str]:
    """Return the running Python, and one of each other version in pyproject.toml that this machine has."""
    running = sys.version.split(" ")[0].rpartition(".")[0]
    found = {running: sys.executable}
    for version in re.findall(r"Python :: (\d\.\d+)", " ".join(PYPROJECT["project"]["classifiers"])):
        pyenv = map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in (shutil.which(f"python{version}"), *pyenv):
            # Try it, because a pyenv command of that name may lead nowhere.
            code = "import sys, venv; print(sys.version)"
            answer = candidate and subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
            if candidate and answer and answer.stdout.startswith(f"{version}."):
                found.setdefault(version, candidate)
    return found


@pytest.mark.slow
def test_the_wheel_can_be_installed_and_used_in_clean_environments(wheel: Path, tmp_path: Path) -> None:
    # The newest is another one than these tests run on, where this machine has several.
    for version, interpreter in [max(interpreters().items())]:
        folder = tmp_path / version
        python = installed(folder, str(wheel), python=interpreter)
        run_there = functools.partial(run, folder=tmp_path, python=python, PYTHONPATH="")
        done = run_there("import sys, upstox_db_examples as u; u.SQLiteUpstoxStorage('x.db'); print(sys.version, u)")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{version}.")
        assert str(folder) in done.stdout
        subprocess.run([folder / "bin" / "upstox-db", "--version"], check=True)
        mongo = "import upstox_db_examples as u; u.MongoUpstoxStorage"
        told = "MongoUpstoxStorage needs pymongo. In a clone of this project, run: pip install '.[mongodb]'"
        assert run_there(mongo).stderr.splitlines()[-1] == f"ModuleNotFoundError: {told}"
        copy_there = functools.partial(copied, folder=tmp_path, program=folder / "bin" / "upstox-db")
        for pattern, extra in (("pooled", ""), ("hybrid", "psycopg2-binary redis")):
            # No driver is installed there, and none is needed to copy.
            told = copy_there(pattern, name := f"{pattern}_{version.replace('.', '_')}")
            assert {re.split("[^a-z0-9-]", each)[0] for each in named(told)} == {*EVERY_COPY_NEEDS, *extra.split()}
            assert ("Optional: 'tqdm>=4.66'" in told) == (pattern == "pooled")
            assert write(collect(pattern).files, tmp_path / name) == 0, "the copy is the same as one made from here"
        installed(folder, f"{wheel}[mongodb]")
        assert run_there(mongo).stderr == ""
        notes.append(f"Ran on the wheel: a clean environment of Python {version}")
