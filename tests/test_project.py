"""The files around the package say the same as the package."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, assert_type
from urllib.parse import urlsplit

import pytest

import upstox_db_examples
from upstox_db_examples.hybrid import HybridUpstoxStorage
from upstox_db_examples.local.servers import MongoDBServer, RedisServer
from upstox_db_examples.local.upstox import Account, LocalUpstox
from upstox_db_examples.mongodb import MongoUpstoxStorage
from upstox_db_examples.pooled import PooledUpstoxStorage
from upstox_db_examples.postgresql import PostgreSQLUpstoxStorage

from .databases import MongoDatabase, notes

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
REQUIRED = {
    re.split("[^a-z0-9-]", each)[0]: each for each in sum(EXTRAS.values(), PYPROJECT["project"]["dependencies"])
}
GUIDE_USAGE_SQLITE = """
storage = SQLiteUpstoxStorage()

# Store new token
result = storage.store_token()
print(f"Stored token for user: {result['user_id']}")

# Get valid token
token_info = storage.get_valid_token(result['user_id'])
if token_info:
    print(f"Valid token found: {token_info['token'][:20]}...")

# Get history
history = storage.get_token_history(result['user_id'])
print(f"Token history: {len(history)} entries")
"""


GUIDE_USAGE_POSTGRESQL = """
storage = PostgreSQLUpstoxStorage("postgresql://user:password@localhost/upstox_db")

# Store token
result = storage.store_token()
print(f"Token stored with ID: {result['token_id']}")

# Get statistics
stats = storage.get_user_statistics(result['user_id'])
print(f"User statistics: {stats}")
"""

GUIDE_USAGE_POOLED = """
pooled_storage = PooledUpstoxStorage("upstox_pooled.db", pool_size=10)

# Batch token generation
user_ids = ["user1", "user2", "user3"]
results = pooled_storage.store_token_batch(user_ids)
print(f"Batch results: {results}")
"""


GUIDE_USAGE_MONGODB = """
storage = MongoUpstoxStorage("mongodb://localhost:27017/")

# Store token
result = storage.store_token()
print(f"Token stored: {result}")

# Get user dashboard
dashboard = storage.get_user_dashboard(result['user_id'])
print(f"User dashboard: {dashboard}")
"""

GUIDE_USAGE_HYBRID = """
storage = HybridUpstoxStorage(
    redis_config={"host": "localhost", "port": 6379, "db": 0},
    postgres_config="postgresql://user:password@localhost/upstox_db"
)

# Store token
result = storage.store_token()
print(f"Token stored in hybrid storage: {result}")

# Get storage status
status = storage.get_storage_status()
print(f"Storage status: {status}")
"""


def run(
    code: str, folder: Path, *, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A new Python process in this folder, with nothing of UPSTOX_* but what is given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
    environment = {**clean, "UPSTOX_DB_KEY_FILE": str(folder / "keys"), "no_proxy": "127.0.0.1", **environment}
    command = [str(python), "-W", "error", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=60)


def installed(folder: Path, *packages: str, python: str = sys.executable) -> Path:
    """The interpreter of an environment that has these packages, what they need, and nothing else."""
    if not folder.exists():
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    # This environment's pip serves the other one, too: a copy of it in each would take half of the time.
    if packages:
        pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *packages], check=True)
    return folder / "bin" / "python"


def test_the_guides_usage_of_sqlite_runs_as_it_stands(tmp_path: Path) -> None:
    with LocalUpstox() as upstox:
        account: Account = upstox.add_account("AB1234")
        code = "from upstox_db_examples import SQLiteUpstoxStorage\n" + GUIDE_USAGE_SQLITE
        done = run(code, tmp_path, **account.environ(), UPSTOX_BASE_DOMAIN=upstox.base_domain)
    assert done.stderr == ""
    assert done.returncode == 0
    first, second, third = done.stdout.splitlines()
    assert first == "Stored token for user: AB1234"
    assert re.fullmatch(r"Valid token found: eyJ[\w-]{17}\.\.\.", second)
    assert third == "Token history: 1 entries"
    assert (tmp_path / "upstox.db").exists()


def test_the_guides_usage_of_postgresql_runs_as_it_stands_but_for_the_url(tmp_path: Path, postgres_url: str) -> None:
    with LocalUpstox() as upstox:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        usage = GUIDE_USAGE_POSTGRESQL.replace("postgresql://user:password@localhost/upstox_db", postgres_url)
        done = run("from upstox_db_examples import PostgreSQLUpstoxStorage\n" + usage, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0
    assert re.fullmatch(
        r"Token stored with ID: 1\nUser statistics: \{'total_tokens': 1, 'active_tokens': 1, 'total_usage': 0, .*\}\n",
        done.stdout,
    )


def test_the_guides_usage_of_the_pool_runs_as_it_stands(tmp_path: Path) -> None:
    with LocalUpstox() as upstox:
        one_account = {**upstox.add_account("user1").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        usage = "from upstox_db_examples import PooledUpstoxStorage\n" + GUIDE_USAGE_POOLED
        unknown = run(usage, tmp_path, **one_account)
        assert unknown.stdout.count("'success': False") == 3
        assert upstox.attempts() == 0, "one account's credentials are not tried on three users"
        named = run(usage, tmp_path, **one_account, UPSTOX_USER_ID="user1")
        assert upstox.attempts() == upstox.logins("user1") == 1
    for done in (unknown, named):
        assert done.returncode == 0
        assert re.fullmatch(r"(\r|Accounts: .*|\n)*", done.stderr), "nothing but the progress bar"
    assert re.fullmatch(
        r"Batch results: \[\{'user_id': 'user1', 'token_id': 1, 'success': True, .*\}, "
        r"\{'user_id': 'user2', 'success': False, .*\}, \{'user_id': 'user3', 'success': False, .*\}\]\n",
        named.stdout,
    )


def test_a_pool_needs_no_progress_bar(tmp_path: Path) -> None:
    code = "import sys; sys.modules['tqdm'] = sys.modules['tqdm.auto'] = None\n"
    code += "from upstox_db_examples import PooledUpstoxStorage as P; print(P('x.db').store_token_batch(['AB1234']))"
    assert "'success': False" in run(code, tmp_path).stdout


def test_the_guides_usage_of_mongodb_runs_as_it_stands_but_for_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MONGODB_URL", raising=False)  # The guide names no database, and the default one may be in use.
    with LocalUpstox() as upstox, MongoDBServer() as server:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        usage = GUIDE_USAGE_MONGODB.replace("mongodb://localhost:27017/", server.url)
        done = run("from upstox_db_examples import MongoUpstoxStorage\n" + usage, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0
    stored, dashboard = done.stdout.splitlines()
    assert re.match(r"Token stored: \{'token': eyJ0…\(\d+ chars\), 'user_id': 'AB1234', ", stored)
    assert re.match(r"User dashboard: \{'user_id': 'AB1234', 'statistics': \{'total_tokens': \d+, ", dashboard)
    assert "'active_token': {'exists': True, " in dashboard
    assert "eyJ0eX" not in done.stdout


def test_the_guides_usage_of_the_hybrid_runs_as_it_stands_but_for_host_port_and_url(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    with LocalUpstox() as upstox, RedisServer() as redis:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        parts = urlsplit(redis.url)
        usage = GUIDE_USAGE_HYBRID.replace("postgresql://user:password@localhost/upstox_db", postgres_url)
        usage = usage.replace('"port": 6379', f'"port": {parts.port}, "password": "{parts.password}"')
        done = run("from upstox_db_examples import HybridUpstoxStorage\n" + usage, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0
    stored, status = done.stdout.splitlines()
    assert re.fullmatch(r"Token stored in hybrid storage: \{'token': eyJ0…\(\d+ chars\), .*\}", stored)
    assert status.startswith("Storage status: {'redis': 'healthy', 'postgresql': 'healthy', ")


def test_the_conda_environment_installs_what_pyproject_says() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert f"- python{PYPROJECT['project']['requires-python']}" in text
    assert "- --editable .[dev]" in text, "all packages come from pyproject.toml, so there is no second list to drift"
    packages = re.findall(r"^ +- ([^\s]+)", text, flags=re.MULTILINE)
    assert packages == ["conda-forge", f"python{PYPROJECT['project']['requires-python']}", "pip", "pip:", "--editable"]


def test_sqlite_needs_no_other_databases_driver(tmp_path: Path) -> None:
    code = (
        "import sys; import upstox_db_examples as u; u.SQLiteUpstoxStorage('x.db').get_valid_token('AB1234')\n"
        "drivers = ('psycopg2', 'sqlalchemy', 'tqdm', 'pymongo', 'redis', 'upstox_totp')\n"
        "print([name for name in drivers if name in sys.modules])"
    )
    done = run(code, tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_type_checkers_see_the_classes_that_are_imported_on_first_use() -> None:
    # `make check` fails here if one of them is Any to mypy; editors complete what mypy sees.
    lazy = (
        assert_type(upstox_db_examples.PostgreSQLUpstoxStorage, type[PostgreSQLUpstoxStorage]),
        assert_type(upstox_db_examples.MongoUpstoxStorage, type[MongoUpstoxStorage]),
        assert_type(upstox_db_examples.HybridUpstoxStorage, type[HybridUpstoxStorage]),
        assert_type(upstox_db_examples.PooledUpstoxStorage, type[PooledUpstoxStorage]),
    )
    assert {each.__name__ for each in lazy} == set(upstox_db_examples._NEED_A_DRIVER)


@pytest.mark.parametrize(
    ("name", "missing", "package", "extra"),
    [
        ("PostgreSQLUpstoxStorage", ["psycopg2"], "psycopg2-binary", "postgresql"),
        ("PostgreSQLUpstoxStorage", ["sqlalchemy"], "sqlalchemy", "postgresql"),
        ("MongoUpstoxStorage", ["pymongo", "bson", "gridfs"], "pymongo", "mongodb"),  # all that is in its wheel
        ("MongoUpstoxStorage", ["pymongo"], "pymongo", "mongodb"),
        ("HybridUpstoxStorage", ["redis"], "redis", "hybrid"),
        ("HybridUpstoxStorage", ["psycopg2"], "psycopg2-binary", "hybrid"),
        ("PooledUpstoxStorage", ["sqlalchemy"], "sqlalchemy", "pooled"),
    ],
)
def test_a_missing_driver_is_named_with_what_to_install(
    tmp_path: Path, name: str, missing: list[str], package: str, extra: str
) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nfrom upstox_db_examples import {name}"
    told = run(code, tmp_path).stderr.splitlines()[-1]
    assert told == f"ModuleNotFoundError: {name} needs {package}. In a clone of this project: pip install '.[{extra}]'"


def test_the_readme_code_runs(tmp_path: Path, postgres_url: str, mongo: MongoDatabase, redis_server: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = "\n".join(blocks)
    for theirs, ours in (
        ('"postgresql://user:password@host/database"', repr(postgres_url)),
        ('"mongodb://user:password@host/", "upstox_db"', f"{mongo.url!r}, {mongo.name!r}"),
        ('"redis://:password@host/0"', repr(redis_server)),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    assert "@host" not in code
    code += "\nassert all(store.get_valid_token('ZZ9999') is None for store in stores)"
    with LocalUpstox() as upstox:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        done = run(code, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0


def make_with(tmp_path: Path, *interpreters: str) -> subprocess.CompletedProcess[str]:
    """`make`, where these are the only interpreters: each of them says its name and can do whatever it is asked."""
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
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("selected", "processes", "told"),
    [("one or two", "0", "1 deselected."), ("not two", "1", "1 deselected, 1 skipped.")],
)
def test_what_was_not_run_is_told(tmp_path: Path, selected: str, processes: str, told: str) -> None:
    code = "import pytest\ndef test_one(): pass\ndef test_two(): pass\ndef test_three(): pytest.skip('')\n"
    (tmp_path / "test_some.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "tests.databases", "-n", processes, "-k", selected]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    quick = dict.fromkeys(("POSTGRES_URL", "MONGODB_URL", "REDIS_URL"), "none is asked")
    quick["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quick}, text=True, capture_output=True, check=True)
    assert f"\nNot run, of the tests collected: {told}\n" in done.stdout


def test_the_readme_says_what_to_copy_for_all_five() -> None:
    assert [pattern for pattern, *_ in COPIED] == list(CLASSES)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    file = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)\)", file.read_text())
    assert [link for link in links if not (file.parent / link).exists()] == []


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


def test_every_public_name_says_what_it_is() -> None:
    silent = []
    for name in upstox_db_examples.__all__:
        public = getattr(upstox_db_examples, name)
        methods = [each for each in vars(public) if each[0] != "_"] if inspect.isclass(public) else []
        said = {name: public, **{f"{name}.{method}": getattr(public, method) for method in methods}}
        silent += [each for each, what in said.items() if callable(what) and not inspect.getdoc(what)]
    assert silent == []


def test_the_code_in_docstrings_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTGRES_URL", raising=False)
    names = [name for _, name, _ in pkgutil.walk_packages(upstox_db_examples.__path__, "upstox_db_examples.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    tried = [doctest.testmod(module, raise_on_error=True).attempted for module in modules]
    assert sum(tried) > 0
