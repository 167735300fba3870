"""The benchmarks run and report what they promise. Speed itself is not tested."""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pytest
import redis
from upstox_totp.models import AccessTokenData

from benchmarks import alternatives, growth, report, startup, targets
from benchmarks.guide import GuidePooled, GuideSQLite
from benchmarks.guide_servers import GuideHybrid, GuideMongo, GuidePostgreSQL
from benchmarks.measure import OPERATIONS
from benchmarks.stores import CROWD, STORES, Servers, keywords, login
from benchmarks.tables import NONE, verdict

from ..support.databases import MongoDatabase
from ..support.project import ROOT

USER = "AB1234"
NO_READ = ("Pooled", "read")  # The guide's pool has no method for it.
# Only a store with a cache in front has a cold read, and py-key-value has nothing behind its cache.
ASKED = [
    (store, operation) for store in STORES for operation in OPERATIONS if operation != "cold read" or store == "Hybrid"
]


def is_missing(side: str, store: str, operation: str) -> bool:
    return (side == "guide" and (store, operation) == NO_READ) or (side == "py-key-value" and operation == "cold read")


def table(text: str, heading: str) -> list[dict[str, str]]:
    """Return the rows of the first table below this heading."""
    lines = text.partition(f"## {heading}\n")[2].splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.startswith("|")) :]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    return [dict(zip(cells[0], each, strict=True)) for each in cells[2:]]


def has_the_shape(text: str, tokens: tuple[int, ...]) -> None:
    """Check that every question has an answer, that each ratio is a number, and that each target has a verdict."""
    cases = list(itertools.product(("1", str(CROWD)), (f"{count:,}" for count in tokens)))
    questions = [(*asked, *case) for asked in ASKED for case in cases]
    for heading in ("Ratios", "Times"):
        rows = table(text, heading)
        assert [(row["store"], row["call"], row["threads"], row["tokens"]) for row in rows] == questions
    for row in table(text, "Ratios"):
        for above, below in report.RATIOS:
            ratio = row[f"{above} ÷ {below}"]
            if is_missing(above, row["store"], row["call"]):
                assert ratio == NONE
            else:
                assert float(ratio.replace(",", "")) > 0
    for row in table(text, "Times"):
        for side in report.SIDES:
            missing = is_missing(side, row["store"], row["call"])
            crowd = r" \[[\d,]+; [\d,]+ to [\d,]+\]" if row["threads"] != "1" else ""
            assert re.match(NONE if missing else rf"[\d,]+ / [\d,]+{crowd}", row[side])
    for row in (steps := table(text, "Where our time goes")):
        assert sum(int(share) for share in re.findall(r"(-?\d+)%", row["steps"])) in range(97, 104)
    assert [(row["store"], row["call"]) for row in steps] == [each for each in ASKED if each[1] != "cold read"]
    bounds = table(text, "Targets")
    assert [row["one thread, ours ÷ bare"] for row in bounds] == [" ".join(each) for each in targets.OF_BARE]
    for row in bounds:
        bound = float(row["at most"])
        for each in [value.split(", ") for name, value in row.items() if name.endswith(" tokens")]:
            assert each[1] == verdict(float(each[0].replace(",", "")), bound)
    assert [row[""] for row in table(text, "What else you could take")] == list(alternatives.NOTES)
    assert [row[""] for row in table(text, "Start-up")][-1] == startup.TOKEN
    assert [row["store"] for row in table(text, "Event loop and watch")] == list(STORES)
    assert re.search(r"SQLite 3[\d.]+, PostgreSQL \d+.*, MongoDB \d.*, (Valkey|Redis) \d.*py-key-value-aio \d", text)


def is_a_picture(file: Path) -> None:
    assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.usefixtures("own_servers")  # Its PostgreSQL accepts more than a hundred connections.
def test_the_smallest_run_writes_the_table_and_the_picture(
    tmp_path: Path, mongo_server: str, redis_server: str
) -> None:
    servers = {"MONGODB_URL": mongo_server, "REDIS_URL": redis_server}
    smallest = [
        "--tokens",
        "20",
        "--rounds",
        "1",
        "--calls",
        "5",
        "--seconds",
        "0.05",
        "--folder",
        str(tmp_path / "out"),
    ]
    before = keys(redis_server)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks", *smallest],
        cwd=ROOT,
        env={**os.environ, **servers},
        text=True,
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "out" / "README.md").read_text()
    has_the_shape(text, (20,))
    for name in ("benchmarks.svg", "choices.svg"):
        is_a_picture(tmp_path / "out" / name)
    assert all(url not in done.stdout + text for url in servers.values())
    left = keys(redis_server) - before  # What was there may have expired.
    assert left == set(), "the benchmark left something on a server that belongs to somebody else"


def test_the_committed_table_has_the_shape_that_the_command_writes() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    sizes = sorted({int(row["tokens"].replace(",", "")) for row in table(text, "Times")})
    has_the_shape(text, tuple(sizes))
    for name in ("benchmarks.svg", "choices.svg"):
        is_a_picture(ROOT / "benchmarks" / name)
    summary = (ROOT / "docs" / "choosing.md").read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert [re.match(r"\| ([\w ]+) \|", line)[1] for line in summary.strip().splitlines()[2:]] == [  # type: ignore[index]
        f"{store} {operation}" for store, operation in ASKED
    ]


def test_growth_is_measured_for_calls_a_batch_and_memory(tmp_path: Path) -> None:
    servers = Servers(tmp_path, "", "", "")
    text = growth.written(growth.measured(servers, {"SQLite": (20, 40)}, 2, {"SQLite": 10}, 1, 0.01))
    verdicts = re.findall(r"\| (?:\*\*not )?reached(?:\*\*)? \|$", text, re.MULTILINE)
    assert len(verdicts) == len(["read", "store", "batch", "export", "import"])
    assert re.search(r"\| SQLite \| read \| 20: \d+ µs, 40: \d+ µs \|", text)


def test_the_memory_of_a_larger_parent_does_not_hide_what_a_call_takes() -> None:
    ballast = b"x" * 200_000_000
    code = "from benchmarks.memory import peak_kb; a = peak_kb(); b = b'x' * 50_000_000; print(peak_kb() - a)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert 45_000 < int(done.stdout) < 60_000 < len(ballast) // 1024


def test_targets_are_judged_by_their_bounds() -> None:
    assert [verdict(ratio, 3.1) for ratio in (3.0, 3.104, 3.106)] == ["reached", "reached", "**not reached**"]


LoggedIn = tuple[list[str], Callable[[str | None], AccessTokenData]]


@pytest.fixture
def logged_in() -> LoggedIn:
    """Return a made-up login together with the tokens that it has returned."""
    tokens: list[str] = []

    def remembered(user_id: str | None) -> AccessTokenData:
        data = login(user_id)
        tokens.append(data.access_token)
        return data

    return tokens, remembered


def gives_back_the_newest(storage: GuideSQLite | GuidePostgreSQL | GuideMongo | GuideHybrid, tokens: list[str]) -> None:
    assert storage.get_valid_token(USER) is None
    for number in (1, 2):
        stored = storage.store_token(USER)["token"]
        assert len(tokens) == number
        found = storage.get_valid_token(USER)
        assert found
        assert found["token"] == stored == tokens[-1]


def test_the_guides_sqlite_gives_back_what_it_stored(tmp_path: Path, logged_in: LoggedIn) -> None:
    gives_back_the_newest(GuideSQLite(str(tmp_path / "guide.db"), logged_in[1]), logged_in[0])


def test_the_guides_postgresql_gives_back_what_it_stored(postgres_url: str, logged_in: LoggedIn) -> None:
    gives_back_the_newest(GuidePostgreSQL(postgres_url, logged_in[1]), logged_in[0])


def test_the_guides_mongodb_gives_back_what_it_stored(mongo: MongoDatabase, logged_in: LoggedIn) -> None:
    storage = GuideMongo(mongo.url, mongo.name, logged_in[1])
    with closing(storage.client):
        gives_back_the_newest(storage, logged_in[0])


def test_the_guides_hybrid_gives_back_what_it_stored_also_when_redis_lost_it(
    postgres_url: str, redis_server: str, redis_prefix: str, logged_in: LoggedIn
) -> None:
    storage = GuideHybrid(keywords(redis_server), postgres_url, logged_in[1])
    storage.prefix = f"{{{redis_prefix}}}:"
    with closing(storage.redis):
        gives_back_the_newest(storage, logged_in[0])
        storage.redis.delete(f"{storage.prefix}{USER}")
        for _ in ("from PostgreSQL", "and from Redis again"):
            found = storage.get_valid_token(USER)
            assert found
            assert found["token"] == logged_in[0][-1]


def test_the_guides_pool_stores_a_token_for_each_user(tmp_path: Path, logged_in: LoggedIn) -> None:
    path = tmp_path / "guide.db"
    with closing(GuidePooled(str(path), logged_in[1])) as storage:
        results = storage.store_token_batch(["AB1234", "CD5678"])
    assert [(result["user_id"], result["success"]) for result in results] == [("AB1234", True), ("CD5678", True)]
    with closing(sqlite3.connect(path)) as conn:
        stored = conn.execute("SELECT access_token FROM upstox_tokens WHERE is_active ORDER BY id").fetchall()
    assert [token for (token,) in stored] == logged_in[0]


def keys(url: str) -> set[bytes]:
    with closing(redis.Redis.from_url(url)) as client:
        return set(client.scan_iter(count=1000))
