"""The README and the pages of the site agree with the package: their code runs, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import tomllib
from pathlib import Path

import pytest

import upstox_db_examples
from upstox_db_examples import KeyRing, SQLiteUpstoxStorage
from upstox_db_examples.core.login import FIELDS
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.databases import ENGINES, MongoDatabase
from ..support.documents import DOCUMENTS, FENCED, PAGES, code_blocks, real_addresses
from ..support.project import PYPROJECT, ROOT, run

README = ROOT / "README.md"


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def test_the_readme_is_a_front_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200
    assert "![" in text, "a picture"


def test_the_readmes_first_program_prints_what_the_readme_says(tmp_path: Path) -> None:
    (code,) = code_blocks(README, "python")
    (shown,) = code_blocks(README, "text")
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10
    with LocalUpstox() as upstox:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        assert "https://api.upstox.com/v2" in code
        code = code.replace("https://api.upstox.com/v2", upstox.base_domain.format(stage="api") + "/v2")
        first, second = (run(code, tmp_path, **environment) for _ in range(2))
        assert upstox.logins() == 1, "the second run finds the token"
    assert (first.stderr, first.returncode) == ("", 0)
    assert re.sub(r"\d{4}-\d\d-\d\d", "<day>", first.stdout) == re.sub(r"\d{4}-\d\d-\d\d", "<day>", shown)
    assert second.stdout == first.stdout


def test_the_code_of_the_pages_runs(tmp_path: Path, postgres_url: str, mongo: MongoDatabase, redis_server: str) -> None:
    code = "\n".join(block for page in PAGES for block in code_blocks(page, "python"))
    code = real_addresses(code, postgres_url, mongo, redis_server)
    code += "\nassert all(store.get_valid_token('ZZ9999') is None for store in stores)"
    with LocalUpstox() as upstox:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}
        done = run(code, tmp_path, **environment)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_example_of_the_errors_says_for_each_kind_what_to_do(tmp_path: Path) -> None:
    (code,) = code_blocks(ROOT / "docs" / "token_life.md", "python")
    file = tmp_path / "upstox.db"
    with LocalUpstox(totp_once=False, limits=False) as upstox:
        environment = {**upstox.add_account("AB1234").environ(), "UPSTOX_BASE_DOMAIN": upstox.base_domain}

        def tell(**changed: str) -> tuple[str, int]:
            done = run(code, tmp_path, **{**environment, "UPSTOX_USER_ID": "AB1234", **changed})
            assert "Traceback" not in done.stderr
            return (done.stdout + done.stderr).partition(":")[0], done.returncode

        fix = ("Fix this, and do not try again before", 1)
        assert tell(UPSTOX_PIN_CODE="000000") == fix
        upstox.fail("drop")
        assert tell() == ("Try again soon", 1)
        upstox.fail("rate_limit")
        assert tell() == ("Try again in 60 s", 1)
        file.unlink()  # The store would respect that limit.
        SQLiteUpstoxStorage(file, keys=KeyRing(KeyRing.new_key())).close()
        with contextlib.closing(sqlite3.connect(file)) as conn:
            conn.execute("CREATE TRIGGER t BEFORE INSERT ON upstox_tokens BEGIN SELECT RAISE(ABORT, 'no room'); END")
            assert tell() == ("Mend the store", 0), "the token is used"
            conn.execute("DROP TRIGGER t")
        assert tell()[1] == 0
        KeyRing.from_file(tmp_path / "others")
        assert tell(UPSTOX_DB_KEY_FILE=str(tmp_path / "others")) == fix, "a key is missing"
        (tmp_path / "keys").chmod(0o644)
        assert tell() == fix, "others can read the key file"


def test_the_readme_installs_an_extra_that_there_is() -> None:
    project = PYPROJECT["project"]
    text = README.read_text()
    ((name, extra),) = re.findall(r'pip install "([\w-]+)\[(\w+)\] @ git\+https://', text)
    assert name == project["name"]
    (sentence,) = re.findall(r"what your pattern needs: (.*?)\. SQLite", text, flags=re.DOTALL)
    extras = re.findall("`([a-z]+)`", sentence)
    assert extra in extras
    assert set(extras) <= set(project["optional-dependencies"])


def test_the_credentials_and_the_images_are_those_that_the_tests_use() -> None:
    account = ROOT / "docs" / "account.md"
    (accounts,) = code_blocks(account, "toml")
    (table,) = tomllib.loads(accounts).values()
    others = re.findall(r"\w+_?\w+", accounts.partition("# and ")[2])
    assert {*table, *others} == set(FIELDS)
    due = {f"UPSTOX_{field.upper()}" for field in FIELDS} | {"UPSTOX_USER_ID"}
    for document in (README, account):
        assert due <= set(re.findall("`(UPSTOX_[A-Z_]+)`", document.read_text())), document
    images = re.findall(r"docker run .* (\w+:[\d.]+)", (ROOT / "docs" / "servers.md").read_text())
    assert images == [engine.image for engine in ENGINES]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = FENCED.sub("", document.read_text())
    to = r'([^)#:\s]*)(?:#([^)\s]+))?(?: "(.+?)")?'
    links = [*re.findall(rf"\]\({to}\)", text), *re.findall(rf"(?m)^\[[^]]+\]: {to}$", text)]
    assert [link for link, _, _ in links if not (document.parent / link).exists()] == []
    places_in = {link: places(document.parent / link if link else document) for link, place, _ in links if place}
    assert [(link, place) for link, place, _ in links if place and place not in places_in[link]] == []
    used = {" ".join(name.split()) for name in re.findall(r"\]\[([^]]+)\]", text)}
    assert used == set(re.findall(r"(?m)^\[([^]]+)\]: ", text))
    tests = [(link, title) for link, _, title in links if title]
    assert [title for link, title in tests if f"def {title}(" not in (document.parent / link).read_text()] == []


@pytest.mark.parametrize("document", [README, *PAGES], ids=name_of)
def test_no_code_is_wider_than_githubs_page(document: Path) -> None:
    assert [line for block in code_blocks(document) for line in block.splitlines() if len(line) > 96] == []


def places(document: Path) -> set[str]:
    """Return the anchors for links in this document: its headings, spelled as Jupyter or GitHub spells them."""
    text = document.read_text()
    if document.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    if document.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_line_of_the_guides_lists_leads_to_a_cell_and_tests_and_names_what_is_there() -> None:
    page = ROOT / "docs" / "guide.md"
    rows = re.findall(r"^\| \d+ [A-Z].*$", page.read_text(), flags=re.MULTILINE)
    assert len(rows) == 10 + 5
    code = "\n".join(file.read_text() for file in (ROOT / "upstox_db_examples").rglob("*.py"))
    for row in rows:
        _, line, method, cell, tests, _ = row.split("|")
        names = re.findall(r"`([a-z_]+|[A-Z]\w+)", method)
        outside = ("make", "pg_dump")  # These are not ours. The tests in the row's last column run them.
        assert [name for name in names if not re.search(rf"\b{name}\b", code) and name not in outside] == [], line
        assert "ipynb#" in cell, line
        for group in tests.split(";"):
            words = re.findall("`(.*?)`", group)
            files = re.findall(r"\]\((.*?)\)", group)
            named = [re.findall(r"def (test_\w+)", (page.parent / file).read_text()) for file in files]
            assert files, line
            for word in words:
                assert all(any(word in name for name in found) for found in named), f"{line}: {word}"


def test_the_reference_has_each_exported_name_and_the_site_each_page() -> None:
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", reference, flags=re.MULTILINE)
    assert sorted(set(upstox_db_examples.__all__) - set(documented)) == []
    stores = {name for name in upstox_db_examples.__all__ if name.endswith("UpstoxStorage")}
    assert stores == set(re.findall(r"^\.\. inherited:: (\w+)$", reference, flags=re.MULTILINE))


def test_what_the_readme_links_to_is_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README.read_text()))
    assert linked == {name_of(page) for page in PAGES if page.parent.name == "docs"} | {
        "docs/api/index.md",
        "docs/images/token_day.svg",
    }
