"""Each exported name has an example in its docstring, and the examples of all docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest

import upstox_db_examples
from upstox_db_examples import SQLiteUpstoxStorage
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.databases import MongoDatabase
from ..support.documents import real_addresses

EXPORTED = {name: getattr(upstox_db_examples, name) for name in upstox_db_examples.__all__}


def examples() -> Iterator[tuple[str, str, ModuleType]]:
    """Yield the name, the docstring and the module of everything whose docstring has an example."""
    for _, name, _ in pkgutil.walk_packages(upstox_db_examples.__path__, "upstox_db_examples."):
        if not name.endswith("__main__"):
            module = importlib.import_module(name)
            for found in doctest.DocTestFinder().find(module):
                if found.examples:
                    yield found.name.rpartition(".")[2], str(found.docstring), module


def failures(name: str, text: str, namespace: dict[str, object]) -> str:
    """Run the examples in this text, and return what did not come out as it says."""
    told: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, namespace, name, None, 0)
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    return "".join(told)


@pytest.fixture
def upstox_of_today() -> Iterator[LocalUpstox]:
    with LocalUpstox(totp_once=False, limits=False) as server:
        yield server


def test_each_exported_name_has_an_example() -> None:
    assert sorted(set(EXPORTED) - {name for name, _, _ in examples()}) == []


@pytest.mark.usefixtures("own_servers")
def test_the_examples_in_docstrings_run(
    upstox_of_today: LocalUpstox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    postgres_url: str,
    mongo: MongoDatabase,
    redis_server: str,
) -> None:
    accounts = [upstox_of_today.add_account(user_id) for user_id in ("AB1234", "CD5678")]
    tables = "".join(
        f"[{account.user_id}]\n" + "".join(f"{key} = '{value}'\n" for key, value in account.credentials().items())
        for account in accounts
    )
    environment = {**accounts[0].environ(), "UPSTOX_USER_ID": "AB1234"}
    for variable, value in {**environment, "UPSTOX_BASE_DOMAIN": upstox_of_today.base_domain}.items():
        monkeypatch.setenv(variable, value)
    told = []
    for name, text, module in examples():
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("accounts.toml").write_text(tables)
        Path("accounts.toml").chmod(0o600)
        with SQLiteUpstoxStorage("upstox.db") as storage:
            given = {"storage": storage, "upstox": upstox_of_today, "credentials": accounts[0].credentials()}
            text = real_addresses(text, postgres_url, mongo, redis_server)
            told.append(failures(name, text, {**vars(module), **EXPORTED, **given, "timedelta": timedelta}))
    if wrong := "".join(told):
        pytest.fail(wrong, pytrace=False)


def test_an_example_that_is_wrong_is_found() -> None:
    assert "Expected:\n    3" in failures("sum", ">>> 1 + 1\n3\n", {})
