"""Everything that a notebook or a first experiment needs, made by one line and removed by another.

>>> with Playground() as play:
...     play.set_time("2026-01-07 03:30")
...     print(play.clock())
2026-01-07 03:30:00+05:30
"""

from __future__ import annotations

import atexit
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from ..core.token import IST
from .upstox import LocalUpstox

if TYPE_CHECKING:  # They need psutil, which a playground without a server does not need.
    from .servers import MongoDBServer, PostgreSQLServer, RedisServer

Needed = Literal["postgresql", "mongodb", "redis"]
VARIABLES = {"postgresql": "POSTGRES_URL", "mongodb": "MONGODB_URL", "redis": "REDIS_URL"}
PRELUDE = "from datetime import datetime\nclock = lambda: datetime.fromisoformat({now!r})\n"


class Playground:
    """A local Upstox with made-up accounts, a clock that you set, a key, a folder, and database servers.

    The credentials and the place of the key file are in the environment, as on a machine that trades. `close()` removes
    all of it: folder, databases, servers and variables. It runs at the latest when Python ends.

    Args:
        servers: "postgresql", "mongodb" or "redis": the servers to start. If POSTGRES_URL or MONGODB_URL is set, that
            server is used, with a new database that is dropped at the end. Redis is always started here, because
            nobody could tell which keys of a shared one to remove.
        users: the ids of the made-up accounts. The environment has the credentials of the first one.
        time: the time in India at which the clock stands, as for `set_time`.
        own_servers: start servers even if POSTGRES_URL or MONGODB_URL is set, because you want to kill them or to
            change rights in them.

    Attributes:
        upstox: the local Upstox. It takes a one-time password more than once, so that you can log in again at once.
        folder: a new, empty folder.
        credentials: the credentials of each user, by user id, as for `Accounts` and `SdkLogin`.
        database: the name of the new database in PostgreSQL and in MongoDB.
        postgresql_url, mongodb_url, redis_url: the address of each server, or "" if it was not asked for.
        postgresql, mongodb, redis: the servers themselves, with `kill()`, `start()`, `pause()` and `resume()`. Each is
            None if it was not asked for.

    Raises:
        ConfigurationError: a server cannot be started on this machine; the message says why.
        StoreUnavailable: a server did not start, or the one in the environment cannot be reached.
    """

    def __init__(
        self,
        *servers: Needed,
        users: Sequence[str] = ("AB1234",),
        time: str = "2026-01-06 08:45",
        own_servers: bool = False,
    ) -> None:
        self._now = datetime.fromisoformat(time).replace(tzinfo=IST)
        self._stack = ExitStack()
        self.database = f"upstox_playground_{secrets.token_hex(4)}"
        self.postgresql_url = self.mongodb_url = self.redis_url = ""
        self.postgresql: PostgreSQLServer | None = None
        self.mongodb: MongoDBServer | None = None
        self.redis: RedisServer | None = None
        try:
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="upstox-playground-")))
            self.upstox = self._stack.enter_context(LocalUpstox(clock=self.clock, totp_once=False, limits=False))
            accounts = {user: self.upstox.add_account(user) for user in users}
            self.credentials = {user: account.credentials() for user, account in accounts.items()}
            for name in os.environ:  # Those of a real account must not be mixed with the made-up ones.
                if name.startswith("UPSTOX_") or (own_servers and name in VARIABLES.values()):
                    self._set(name, None)
            self._set(VARIABLES["redis"], None)
            for name, value in {
                **accounts[users[0]].environ(),
                "UPSTOX_USER_ID": users[0],
                "UPSTOX_BASE_DOMAIN": self.upstox.base_domain,
                "UPSTOX_DB_KEY_FILE": str(self.folder / "keys"),
                "no_proxy": "127.0.0.1",
            }.items():
                self._set(name, value)
            for server in servers:
                self.start_server(server)
            atexit.register(self.close)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<playground, {self._now:%A %H:%M} in India>"

    def clock(self) -> datetime:
        """Return the time of this playground, with India's time zone. Pass it to a store as `clock`."""
        return self._now

    def set_time(self, time: str) -> None:
        """Set the clock.

        Args:
            time: the time in India, such as "2026-01-07 03:30" or "2026-01-07 03:29:59".

        Raises:
            ValueError: this is no time.
        """
        self._now = datetime.fromisoformat(time).replace(tzinfo=IST)

    def keep[T](self, opened: AbstractContextManager[T]) -> T:
        """Enter this context manager, such as a store, and exit it when the playground is closed."""
        return self._stack.enter_context(opened)

    def at_end(self, function: Callable[..., object], *arguments: object) -> None:
        """Call this function with these arguments when the playground is closed, before anything older is removed."""
        self._stack.callback(function, *arguments)

    def start_server(self, server: Needed, *, own: bool = False, tls: bool = False) -> None:
        """Start one more server. The attributes then tell about this one.

        Args:
            server: which one.
            own: start it even if POSTGRES_URL or MONGODB_URL is set, as with `own_servers`.
            tls: let PostgreSQL or MongoDB speak TLS, too. `ca_file` of the server verifies its certificate.

        Raises:
            ConfigurationError, StoreUnavailable: as when a playground is made.
        """
        if own:
            self._set(VARIABLES[server], None)
        {"postgresql": self._postgresql, "mongodb": self._mongodb, "redis": self._redis}[server](tls)

    def start(self, program: str) -> subprocess.Popen[str]:
        """Start a Python program in a process of its own, in `folder`. Its `communicate()[0]` is what it printed.

        The program has this environment. The name `clock` is defined in it: a clock that shows the present time of the
        playground.
        """
        code = PRELUDE.format(now=self._now.isoformat()) + program
        return subprocess.Popen([sys.executable, "-c", code], cwd=self.folder, stdout=subprocess.PIPE, text=True)

    def copy_folder(self) -> Path:
        """Copy `folder` without the key file, as a thief would, and return the copy. It is removed at the end.

        Another process copies: if a program opened and closed a file that it uses through SQLite, it would lose
        SQLite's locks on that file.
        """
        copy = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="upstox-playground-")))
        subprocess.run(["/bin/cp", "-R", f"{self.folder}/.", str(copy)], check=True)
        for key in copy.glob("keys*"):
            key.unlink()
        return copy

    def close(self) -> None:
        """Remove everything that this playground has made. Calling it again does nothing."""
        atexit.unregister(self.close)
        self._stack.close()

    def _set(self, name: str, value: str | None) -> None:
        """Set or remove an environment variable until the end."""
        self._stack.callback(_set, name, os.environ.get(name))
        _set(name, value)

    def _postgresql(self, tls: bool) -> None:
        import psycopg2

        from .servers import PostgreSQLServer

        self.postgresql = self._stack.enter_context(PostgreSQLServer(tls=tls))
        url = self.postgresql.url
        if self.postgresql.process is None:  # It was given. The data of our own server goes with the server.
            self._stack.callback(_sql, url, f"DROP DATABASE IF EXISTS {self.database} WITH (FORCE)")
        _sql(url, f"CREATE DATABASE {self.database}")
        self.postgresql_url = psycopg2.extensions.make_dsn(url, dbname=self.database)

    def _mongodb(self, tls: bool) -> None:
        import pymongo

        from .servers import MongoDBServer

        # A server looks for expired documents once a minute. This one does it each second, so that nobody has to wait.
        self.mongodb = self._stack.enter_context(MongoDBServer(tls=tls, settings={"ttlMonitorSleepSecs": "1"}))
        self.mongodb_url = self.mongodb.url
        if self.mongodb.process is None:
            client = self._stack.enter_context(pymongo.MongoClient[dict[str, object]](self.mongodb_url))
            self._stack.callback(client.drop_database, self.database)

    def _redis(self, tls: bool) -> None:
        from .servers import RedisServer

        self.redis = self._stack.enter_context(RedisServer(tls=tls))
        self.redis_url = self.redis.url


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _sql(url: str, statement: str) -> None:
    import psycopg2

    from ..core.errors import StoreUnavailable

    try:
        connection = psycopg2.connect(url)
    except psycopg2.OperationalError as error:
        raise StoreUnavailable("PostgreSQL cannot be reached. Check POSTGRES_URL.") from error
    connection.autocommit = True  # CREATE DATABASE does not run in a transaction.
    with connection.cursor() as cursor:
        cursor.execute(statement)
    connection.close()
