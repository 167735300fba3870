"""`upstox-db copy` makes a package of the user's own from a pattern. test_clean_environments.py runs such packages."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import upstox_db_examples
from upstox_db_examples import InvalidInput
from upstox_db_examples.cli import main
from upstox_db_examples.copy_files import write
from upstox_db_examples.copy_pattern import collect, collect_minimal, packages
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.patterns import PATTERNS

from ..support.project import ROOT, run

each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def copy(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["--store", "nowhere://", "copy", *arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@each_pattern
def test_what_is_copied_is_what_an_import_of_the_copy_loads(tmp_path: Path, pattern: str) -> None:
    told = copy(pattern, "mine")
    assert (told.exit_code, told.stderr) == (0, "")
    code = (
        "import sys; sys.dont_write_bytecode = True; import mine\n"
        "print([m.__file__ for name, m in sys.modules.items() if name.partition('.')[0] == 'mine'])\n"
        "print([name for name in sys.modules if name.startswith('upstox_db_examples')])"
    )
    done = run(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    loaded, of_the_package = map(ast.literal_eval, done.stdout.splitlines())
    files = set(content(tmp_path / "mine"))
    assert {str(Path(file).relative_to(tmp_path / "mine")) for file in loaded} == {f for f in files if f[-3:] == ".py"}
    assert of_the_package == []
    lua = ("databases", "dig_up", "drop", "put", "use")
    scripts = [f"hybrid/lua/{name}.lua" for name in lua] if pattern == "hybrid" else []
    assert sorted(name for name in files if not name.endswith(".py")) == scripts
    assert files == set(collect(pattern).files)


@each_pattern
def test_the_list_has_each_file_with_its_lines_and_writes_nothing(tmp_path: Path, pattern: str) -> None:
    told = copy(pattern, "mine", "--list")
    assert told.exit_code == 0
    assert told.output == copy(pattern, "--list").output
    assert list(tmp_path.iterdir()) == []
    listed = json.loads(copy(pattern, "--list", "--json").output)
    made = json.loads(copy(pattern, "mine", "--json").output)
    assert made["copied"] == len(listed)
    *rows, total = [line.split() for line in told.output.splitlines()]
    lines = {name: len(text.splitlines()) for name, text in content(tmp_path / "mine").items()}
    assert {row[1]: int(row[0]) for row in rows} == lines
    assert total == [str(sum(lines.values())), "lines", "in", str(len(lines)), "files"]
    for _, name, *reason in rows:
        if reason and name.endswith(".py"):  # "for" and the file that imports it
            assert (
                f"{Path(name).stem if Path(name).stem != '__init__' else Path(name).parent.name}"
                in (tmp_path / "mine" / reason[1]).read_text()
            )


@each_pattern
def test_the_package_has_the_class_and_the_errors(tmp_path: Path, pattern: str) -> None:
    copy(pattern, "mine")
    done = run("import mine; print(sorted(mine.__all__), [getattr(mine, name) for name in mine.__all__])", tmp_path)
    errors = upstox_db_examples.core.errors
    names = [
        name for name, each in vars(errors).items() if isinstance(each, type) and each.__module__ == errors.__name__
    ]
    assert done.stdout.startswith(str(sorted([*names, PATTERNS[pattern].store])))
    checked = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "E,F,I,RUF022"]
    subprocess.run([*checked, "--line-length=120", "mine/__init__.py"], check=True, capture_output=True)
    assert "MIT licence" in (tmp_path / "mine" / "__init__.py").read_text()


def test_what_is_the_same_is_left_alone_and_what_is_missing_is_brought(tmp_path: Path) -> None:
    first = copy("sqlite", "mine")
    before = content(tmp_path / "mine")
    (tmp_path / "mine" / "own.py").write_text("# of the reader's own\n")
    ages = {name: (tmp_path / "mine" / name).stat().st_mtime_ns for name in before}
    again = copy("sqlite", "mine")
    assert (again.exit_code, again.stderr) == (0, "")
    assert again.output.startswith(f"mine: 0 files copied, {len(before)} were there already.\n")
    assert {name: (tmp_path / "mine" / name).stat().st_mtime_ns for name in before} == ages
    assert again.output.splitlines()[1:] == first.output.splitlines()[1:]
    (tmp_path / "mine" / "core" / "token.py").unlink()
    assert copy("sqlite", "mine").output.startswith(f"mine: 1 file copied, {len(before) - 1} were there already.\n")
    assert content(tmp_path / "mine") == {**before, "own.py": b"# of the reader's own\n"}


@pytest.mark.parametrize("name", ["__init__.py", "core/token.py", "sqlite/store.py"])
def test_nothing_is_written_if_one_file_differs(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("# of the reader's own\n")
    before = sorted(tmp_path.rglob("*"))
    refused = copy("sqlite", "mine")
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert refused.stderr.startswith("ConfigurationError: mine has different files with these names, so nothing was")
    assert f": {name}. " in refused.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "mine" / name).read_text() == "# of the reader's own\n"


def test_another_pattern_goes_into_another_folder(tmp_path: Path) -> None:
    copy("sqlite", "mine")
    before = content(tmp_path)
    refused = copy("pooled", "mine")
    assert refused.exit_code == 3
    assert ": __init__.py. " in refused.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize("folder", ["my-tokens", "2tokens", "class", "a b", "..", "x.y", "mine/core-1"])
def test_a_folder_that_cannot_be_imported_is_refused(tmp_path: Path, folder: str) -> None:
    refused = copy("sqlite", folder)
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert refused.stderr.startswith("InvalidInput: ")
    assert "cannot be the name of a Python package" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("pattern", "folder"), [("sqlite", "token"), ("hybrid", "redis"), ("mongodb", "bson")])
def test_a_name_that_would_hide_another_module_is_good_only_within_a_package(
    tmp_path: Path, pattern: str, folder: str
) -> None:
    refused = copy(pattern, folder)
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert refused.stderr.startswith(f"InvalidInput: A package '{folder}' would hide ")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "trader").mkdir()
    (tmp_path / "trader" / "__init__.py").touch()
    line = f"from trader.{folder} import {PATTERNS[pattern].store}"
    assert f"    {line}\n" in copy(pattern, f"trader/{folder}").output
    assert run(line, tmp_path).stderr == ""


def test_the_folder_may_be_the_present_one_and_lie_in_a_folder_to_be_made(tmp_path: Path) -> None:
    assert "    from tokens import SQLite" in copy("sqlite", "new/and/tokens").output
    os.chdir(tmp_path / "new/and/tokens")
    assert "were there already.\nInstall what it needs" in copy("sqlite", ".").output


def test_a_folder_that_cannot_be_written_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/mine"):
        refused = copy("sqlite", folder)
        assert (refused.exit_code, refused.stdout) == (3, "")
        assert refused.stderr.startswith("ConfigurationError: file")
        assert refused.stderr.endswith(" cannot be read or written: Not a directory. Nothing was copied.\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sqlite").symlink_to("nowhere")
    assert copy("sqlite", "mine").exit_code == 3
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "mine", "sqlite"]


def test_a_copy_that_breaks_off_leaves_nothing_and_can_be_run_again(tmp_path: Path) -> None:
    command = f"ulimit -f 16; exec '{sys.executable}' -B -m upstox_db_examples copy sqlite deep/mine"  # 512-byte blocks
    done = subprocess.run(["sh", "-c", command], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith(" cannot be read or written: File too large. Nothing was copied.\n")
    assert list(tmp_path.iterdir()) == []
    assert copy("sqlite", "deep/mine").exit_code == 0
    assert write(collect("sqlite").files, tmp_path / "deep/mine") == 0


# The smallest version


@each_pattern
def test_the_smallest_version_is_one_file_that_can_be_imported_from_a_package(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "trader").mkdir()
    (tmp_path / "trader" / "__init__.py").touch()
    told = copy("--minimal", pattern, "trader/tokens.py")
    assert (told.exit_code, told.stderr) == (0, "")
    original = ROOT / "upstox_db_examples" / "minimal" / f"{pattern}.py"
    assert content(tmp_path / "trader") == {"__init__.py": b"", "tokens.py": original.read_bytes()}
    done, install, _, _, *lines = told.output.splitlines()
    assert done == "trader/tokens.py: copied."
    assert install.startswith("Install what it needs: pip install 'cryptography>=44' 'upstox-totp>=1.0.8'")
    assert [driver in install for driver in ("psycopg2-binary", "pymongo", "redis", "tqdm")] == [
        pattern in ("postgresql", "hybrid"),
        pattern == "mongodb",
        pattern == "hybrid",
        False,
    ]
    assert lines[1].startswith("    from trader.tokens import ")
    assert ast.parse("\n".join(line.strip() for line in lines))
    assert all(line in original.read_text() for line in lines[2:])


@pytest.mark.parametrize("pattern", ["sqlite", "pooled"])
def test_a_copy_of_the_smallest_version_runs_without_this_package(tmp_path: Path, pattern: str) -> None:
    lines = [line.strip() for line in copy("--minimal", pattern, "tokens.py").output.splitlines()[-4:]]
    code = [*lines, "token = storage.get_valid_token('AB1234')", "import sys"]
    code.append("print(len(token) > 100, [name for name in sys.modules if 'upstox_db' in name])")
    if pattern == "pooled":  # The smallest pool keeps its connections as long as the program runs.
        code.append("while not storage.pool.empty(): storage.pool.get().close()")
    with LocalUpstox() as upstox:
        account = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        done = run("\n".join(code), tmp_path, TOKEN_KEY="ab" * 32, **account)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True []\n", "")


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert copy("--minimal", "sqlite", "mine.py").exit_code == 0
    assert copy("--minimal", "sqlite", "mine.py").output.startswith("mine.py: was there already.\nInstall what it")
    refused = copy("--minimal", "pooled", "mine.py")
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert refused.stderr == "ConfigurationError: mine.py is there and differs. Choose another name, or move it away.\n"
    assert "SQLiteTokens" in (tmp_path / "mine.py").read_text()


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("no/mine.py", "ConfigurationError: There is no folder no. Make it first. Nothing was copied."),
        ("folder.py", "ConfigurationError: folder.py cannot be read or written: Is a directory. Nothing was copied."),
        ("mine", "InvalidInput: 'mine' is not the name of a Python file. It has to end with .py."),
        ("my-own.py", "InvalidInput: 'my-own' cannot be the name of a Python module. Choose another file."),
        ("token.py", "InvalidInput: A module 'token' would hide a module that the copy needs. Choose another file."),
        ("redis.py", "InvalidInput: A module 'redis' would hide a module that the copy needs. Choose another file."),
    ],
)
def test_a_file_that_cannot_be_written_or_imported_is_refused(tmp_path: Path, file: str, told: str) -> None:
    (tmp_path / "folder.py").mkdir()
    refused = copy("--minimal", "hybrid", file)
    assert (refused.exit_code, refused.stdout, refused.stderr) == (3, "", f"{told}\n")
    assert [each.name for each in tmp_path.rglob("*")] == ["folder.py"]


def test_the_smallest_version_is_listed_and_needs_a_file(tmp_path: Path) -> None:
    listed = copy("--minimal", "hybrid", "--list").output.splitlines()
    assert [line.split() for line in listed] == [["100", "hybrid.py"], ["100", "lines", "in", "1", "file"]]
    assert copy("--minimal", "hybrid").exit_code == 2
    with pytest.raises(InvalidInput, match="no pattern 'core'"):
        collect_minimal("core", "mine.py")
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_or_with_an_unknown_pattern_it_is_a_wrong_command(tmp_path: Path) -> None:
    for arguments in (["sqlite"], ["oracle", "mine"], ["core", "mine"], []):
        assert copy(*arguments).exit_code == 2
    with pytest.raises(InvalidInput, match=r"no pattern 'core'\. Choose one of sqlite, pooled, "):
        collect("core")
    assert list(tmp_path.iterdir()) == []


@each_pattern
def test_each_class_is_its_folders_and_each_driver_is_named(pattern: str) -> None:
    assert PATTERNS[pattern].store in importlib.import_module(f"upstox_db_examples.{pattern}").__all__
    needed, optional = packages(collect(pattern))
    assert not any(each.startswith("click") for each in needed + optional), "only the command needs click"
    assert any(each.startswith("tqdm") for each in optional) == (pattern == "pooled")


def test_all_patterns_are_offered() -> None:
    folders = {file.parent.name for file in (ROOT / "upstox_db_examples").glob("*/store.py")} - {"core"}
    assert set(PATTERNS) == folders
    assert {each.store for each in PATTERNS.values()} >= {
        name for name in upstox_db_examples.__all__ if name.endswith("UpstoxStorage")
    }
