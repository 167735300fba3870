"""In a clean environment the wheel works, and so does each pattern whose files were copied out of the package."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from upstox_db_examples.local.upstox import LocalUpstox

from .databases import notes
from .test_project import PYPROJECT, ROOT, run

EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
REQUIRED = {
    re.split("[^a-z0-9-]", each)[0]: each for each in sum(EXTRAS.values(), PYPROJECT["project"]["dependencies"])
}


def installed(folder: Path, *packages: str, python: str = sys.executable) -> Path:
    """The interpreter of an environment that has these packages, what they need, and nothing else."""
    if not folder.exists():
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    # This environment's pip serves the other one, too: a copy of it in each would take half of the time.
    if packages:
        pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *packages], check=True)
    return folder / "bin" / "python"


README = (ROOT / "README.md").read_text()
COPIED = re.findall(r"(?m)^\| ([\w ]+) \| ((?:`[\w.]+` ?)+) \| ((?:`[\w-]+` ?)*)\|$", README)
FOR_ALL_FILES, FOR_ALL_PACKAGES = (
    re.findall(r"`([\w.-]+)`", found)
    for found in re.findall(r"(?s)All need (.*?), and besides:.*?\| packages beside (.*?) \|", README)[0]
)
CLASSES = {
    "SQLite": "sqlite.SQLiteUpstoxStorage('x.db')",
    "pooled SQLite": "pooled.PooledUpstoxStorage('x.db')",
    "PostgreSQL": "postgresql.PostgreSQLUpstoxStorage(environ['POSTGRES'])",
    "MongoDB": "mongodb.MongoUpstoxStorage(*environ['MONGODB'].split())",
    "hybrid": "hybrid.HybridUpstoxStorage(environ['REDIS'], environ['POSTGRES'], redis_prefix=environ['PREFIX'])",
}


@pytest.fixture(scope="module")
def for_all_patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what every pattern needs: each gets a copy, which is made in half a second."""
    folder = tmp_path_factory.mktemp("for_all") / "environment"
    installed(folder, *(REQUIRED[name] for name in FOR_ALL_PACKAGES))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "files", "packages"), COPIED, ids=[pattern for pattern, *_ in COPIED])
def test_a_pattern_runs_where_its_files_are_copied(
    tmp_path: Path,
    pattern: str,
    files: str,
    packages: str,
    for_all_patterns: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path / "trader" / "tokens"
    folder.mkdir(parents=True)
    for name in [*FOR_ALL_FILES, *re.findall(r"[\w.]+", files)]:
        source = ROOT / "upstox_db_examples" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    environment = shutil.copytree(for_all_patterns, tmp_path / "environment", symlinks=True)
    python = installed(environment, *(REQUIRED[name] for name in re.findall(r"[\w-]+", packages)))
    addresses = {}
    if pattern in ("PostgreSQL", "hybrid"):
        addresses["POSTGRES"] = request.getfixturevalue("postgres_url")
    if pattern == "MongoDB":
        addresses["MONGODB"] = " ".join(request.getfixturevalue("mongo"))
    if pattern == "hybrid":
        addresses["REDIS"] = request.getfixturevalue("redis_server")
        addresses["PREFIX"] = request.getfixturevalue("redis_prefix")
    module, _ = CLASSES[pattern].split(".", 1)
    code = (
        "from importlib.util import find_spec; from os import environ\n"
        f"from trader.tokens import {module}\n"
        f"with {CLASSES[pattern]} as store:\n"
        "    token = store.get_or_create_token()['token']\n"
        "    assert store.get_valid_token('AB1234')['token'] == token\n"
        "print([name for name in ('upstox_db_examples', 'pytest', 'tqdm') if find_spec(name)])\n"
    )
    with LocalUpstox() as upstox:
        account = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        done = run(code, tmp_path, python=python, PYTHONPATH="", **account, **addresses)
    # Copied without the package's __init__.py, its warnings go where Python sends them.
    key_made = f"Made a new key in {tmp_path / 'keys'}. Back it up, apart from the database.\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", key_made)


def test_the_readme_says_what_to_copy_for_all_five() -> None:
    assert [pattern for pattern, *_ in COPIED] == list(CLASSES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # By way of the sdist, which therefore holds all that the wheel is made of.
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_all_of_the_package(wheel: Path) -> None:
    package = ROOT / "upstox_db_examples"
    due = {str(file.relative_to(ROOT)) for file in package.rglob("*") if file.suffix in (".py", ".lua", ".typed")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name} == due


def interpreters() -> dict[str, str]:
    """The running Python, and one of each other version that pyproject.toml names, where this machine has it."""
    running = sys.version.split(" ")[0].rpartition(".")[0]
    found = {running: sys.executable}
    for version in re.findall(r"Python :: (\d\.\d+)", " ".join(PYPROJECT["project"]["classifiers"])):
        pyenv = map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in (shutil.which(f"python{version}"), *pyenv):
            # It is tried, for pyenv's command of that name may lead nowhere.
            code = "import sys, venv; print(sys.version)"
            answer = candidate and subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
            if candidate and answer and answer.stdout.startswith(f"{version}."):
                found.setdefault(version, candidate)
    return found


@pytest.mark.slow
def test_the_wheel_can_be_installed_and_used_in_clean_environments(wheel: Path, tmp_path: Path) -> None:
    for version, interpreter in interpreters().items():
        folder = tmp_path / version
        python = installed(folder, str(wheel), python=interpreter)
        run_there = functools.partial(run, folder=tmp_path, python=python, PYTHONPATH="")
        done = run_there("import sys, upstox_db_examples as u; u.SQLiteUpstoxStorage('x.db'); print(sys.version, u)")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{version}.")
        assert str(folder) in done.stdout
        subprocess.run([folder / "bin" / "upstox-db", "--version"], check=True)
        mongo = "import upstox_db_examples as u; u.MongoUpstoxStorage"
        told = "MongoUpstoxStorage needs pymongo. In a clone of this project: pip install '.[mongodb]'"
        assert run_there(mongo).stderr.splitlines()[-1] == f"ModuleNotFoundError: {told}"
        installed(folder, f"{wheel}[mongodb]")
        assert run_there(mongo).stderr == ""
        notes.append(f"Ran on the wheel: a clean environment of Python {version}")
