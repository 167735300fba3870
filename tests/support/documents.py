"""The documents of the repository: the README, the pages of the site, and the code in them."""

from __future__ import annotations

import re
from pathlib import Path

from .databases import MongoDatabase
from .project import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "recipes/README.md")
    ),
    *PAGES,
    *sorted((ROOT / "upstox_db_examples").glob("*/README.md")),
]


FENCED = re.compile(r"(?ms)^```(\S*)[^\n]*\n(.*?)^```$")


def code_blocks(document: Path, language: str = "") -> list[str]:
    """Return the code blocks of this document, all of them or those in one language."""
    found = FENCED.findall(document.read_text())
    return [code for named, code in found if not language or named == language]


def real_addresses(code: str, postgres_url: str, mongo: MongoDatabase, redis_server: str) -> str:
    """Replace the addresses that our documents use with those of real servers."""
    for theirs, ours in (
        ('"postgresql://user:password@host/database"', repr(postgres_url)),
        ('"mongodb://user:password@host/", "upstox_db"', f"{mongo.url!r}, {mongo.name!r}"),
        ('"redis://:password@host/0"', repr(redis_server)),
    ):
        code = code.replace(theirs, ours)
    assert "password@host" not in code
    return code
