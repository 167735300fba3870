"""Inject a fault at one moment of a login, in the process that runs that login.

Calls to a database are caught at the lowest level of each driver that a store uses. So a fault can hit between any two
calls, whatever the store's code looks like.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import curl_cffi.requests
import psycopg2
import pymongo.synchronous.pool
import redis

from upstox_db_examples import SdkLogin, Secret
from upstox_db_examples.hybrid.backend import HybridBackend
from upstox_db_examples.postgresql.backend import PostgreSQLBackend
from upstox_db_examples.sqlite import connections as sqlite_connections
from upstox_db_examples.sqlite.forks import Connection as SQLiteConnection

from .processes import Address

ERROR, OUTAGE, INTERRUPT, TWO_INTERRUPTS, KILL = "an error", "an outage", "Ctrl-C", "Ctrl-C twice", "kill -9"
# An outage lasts from its moment on, so all moments between two calls are the same. A second Ctrl-C matters only once
# the first has been seen, and a process that waits for a response does not see it. So it is tried where a token is at
# risk.


class Moment(NamedTuple):
    """The moment when a fault hits: at which step ("request", "answer") or call ("before", "after")."""

    what: str
    number: int
    side: str

    def __str__(self) -> str:
        return f"{self.what} {self.number} ({self.side})"


NEVER = Moment("call", 0, "")


class Told(NamedTuple):
    """What the login's process reports at its end, if it gets that far.

    Attributes:
        outcome: the name of the error's class, or "a token".
        token: the token that was returned, or that is in the error.
        arrived: the tokens that had arrived at the client.
        calls: the calls to the database, in order.
        before_the_token: how many of these calls had been made when the first token arrived.
        hit: whether the fault hit at a call.
    """

    outcome: str
    token: str | None
    arrived: list[str]
    calls: list[str]
    before_the_token: int
    hit: bool


class Faults:
    """Injects the fault at a call to the database.

    Args:
        tell: called just before this process kills itself.

    Attributes:
        armed: whether calls are counted. They are not counted while the store is being opened.
    """

    def __init__(self, moment: Moment, kind: str, tell: Callable[[str], None]) -> None:
        self.armed = self.hit = False
        self.calls: list[str] = []
        self.arrived: list[str] = []
        self.before_the_token = 0
        self._moment, self._kind, self._tell = moment, kind, tell
        self._down: str | None = None

    def around(
        self,
        server: str,
        name: str,
        call: Callable[[], Any],
        error: Callable[[], Exception],
        cut: Callable[[], None] = lambda: None,
    ) -> Any:
        """Make this call, with the fault before it or after it.

        If the fault comes before, the call is not made. If it comes after, nobody sees the result.

        Args:
            server: the server that is unreachable from now on, if the fault is an outage.
            error: returns the error that the driver raises when the connection drops.
            cut: drops the connection.
        """
        self.before(server, name, error, cut)
        answer = call()
        try:
            self.after(server, error, cut)
        except BaseException:
            # A traceback that keeps this frame must not keep a cursor as well, because the cursor holds SQLite's lock.
            del answer
            raise
        return answer

    def before(
        self, server: str, name: str, error: Callable[[], Exception], cut: Callable[[], None] = lambda: None
    ) -> None:
        if self._down == server:  # in all threads: a thread that renews a lease cannot reach the server either
            cut()
            raise error()
        if self._counts():
            self.calls.append(name)
            self._come("before", server, error, cut)

    def after(self, server: str, error: Callable[[], Exception], cut: Callable[[], None] = lambda: None) -> None:
        if self._counts():
            self._come("after", server, error, cut)

    def _counts(self) -> bool:
        return self.armed and threading.current_thread() is threading.main_thread()

    def _come(self, side: str, server: str, error: Callable[[], Exception], cut: Callable[[], None]) -> None:
        if (len(self.calls), side) != self._moment[1:] or self.hit:
            return
        self.hit = True
        if self._kind == KILL:
            self._tell(KILL)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._kind in (INTERRUPT, TWO_INTERRUPTS):
            for _ in range(2 if self._kind == TWO_INTERRUPTS else 1):
                signal.raise_signal(signal.SIGINT)
        else:
            self._down = server if self._kind == OUTAGE else None
            cut()
            raise error()


def watch(store: Any, faults: Faults) -> None:
    """Route all calls to this store's database through these faults. The calls and the database are real."""
    _watch_mongodb(faults)
    postgres = getattr(store.backend, "postgres", store.backend)
    if isinstance(postgres, PostgreSQLBackend):
        _watch_postgresql(postgres.connections, faults)
    if isinstance(store.backend, HybridBackend):
        _watch_redis(store.backend.redis, faults)


def watch_sqlite(faults: Faults) -> None:
    """Do the same as `watch` for all SQLite connections that are opened afterwards."""

    def error() -> sqlite3.OperationalError:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR"
        return error

    class Watched(SQLiteConnection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            run = super().execute
            answer: sqlite3.Cursor = faults.around("sqlite", _short(sql), lambda: run(sql, *arguments), error)
            return answer

        def executescript(self, sql: str) -> sqlite3.Cursor:
            run = super().executescript
            answer: sqlite3.Cursor = faults.around("sqlite", _short(sql), lambda: run(sql), error)
            return answer

        def rollback(self) -> None:
            if self.in_transaction:  # Otherwise a rollback does nothing.
                faults.around("sqlite", "rollback", super().rollback, error)

    sqlite_connections.Connection = Watched  # type: ignore[attr-defined]


def _watch_postgresql(connections: Any, faults: Faults) -> None:
    answer = connections.answer

    def watched(conn: Any, sql: str, **values: Any) -> Any:
        def cut() -> None:
            if not conn.closed:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(conn.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)

        def error() -> psycopg2.OperationalError:
            return psycopg2.OperationalError("server closed the connection unexpectedly")

        return faults.around("postgresql", _short(sql), lambda: answer(conn, sql, **values), error, cut)

    connections.answer = watched


def _watch_redis(tokens: Any, faults: Faults) -> None:
    answer = tokens.ask

    def watched(ask: Callable[[], Any], **options: Any) -> Any:
        def error() -> redis.ConnectionError:
            return redis.ConnectionError("Connection closed by server.")

        name = ask.__qualname__.partition(".<locals>")[0].rpartition(".")[2]
        return answer(lambda: faults.around("redis", f"Redis: {name}", ask, error), **options)

    tokens.ask = watched


def _watch_mongodb(faults: Faults) -> None:
    pool: Any = pymongo.synchronous.pool
    send, receive = pool.sendall, pool.receive_message

    def monitors() -> bool:  # The driver's own threads check whether a server is up.
        return threading.current_thread().name.startswith("pymongo")

    def error() -> ConnectionResetError:
        return ConnectionResetError("Connection reset by peer")

    def sendall(line: Any, message: bytes) -> None:
        if not monitors():
            faults.before("mongodb", _command_in(message), error)
        send(line, message)

    def receive_message(*arguments: Any, **options: Any) -> Any:
        answer = receive(*arguments, **options)
        if not monitors():
            faults.after("mongodb", error)
        return answer

    pool.sendall, pool.receive_message = sendall, receive_message


def _short(sql: str) -> str:
    return " ".join(sql.split())[:50]


def _command_in(message: bytes) -> str:
    # An OP_MSG has 16 bytes of header, 4 of flags and 1 of kind. The document has 4 bytes of size and 1 of type, and
    # then the name.
    return message[26 : message.index(b"\0", 26)].decode(errors="replace")


def _note_arrivals(faults: Faults) -> None:
    """Record each token as it comes out of the HTTP client, before the login's own code sees it."""
    session: Any = curl_cffi.requests.Session
    send = session.request

    def request(self: Any, method: str, url: str, *arguments: Any, **options: Any) -> Any:
        response = send(self, method, url, *arguments, **options)
        if urlsplit(url).path.endswith("/authorization/token") and response.status_code == 200:
            faults.arrived.append(response.json()["access_token"])
            faults.before_the_token = faults.before_the_token or len(faults.calls)
        return response

    session.request = request


def log_in(
    connection: Connection,
    address: Address,
    upstox: str,
    credentials: dict[str, str],
    user_id: str | None,
    method: str,
    moment: Moment,
    kind: str,
) -> None:
    """Log in once, with a fault if its moment is a call to the database, and send the report."""
    os.environ["no_proxy"] = "127.0.0.1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may have set SIGINT to be ignored.
    faults = Faults(moment if moment.what == "call" else NEVER, kind, connection.send)
    _note_arrivals(faults)
    watch_sqlite(faults)
    store = address.open(login=SdkLogin(credentials, base_domain=upstox))
    watch(store, faults)
    connection.send("ready")
    connection.recv()
    faults.armed = True
    try:
        outcome, token = "a token", getattr(store, method)(user_id)["token"]
    except BaseException as error:
        held = getattr(error, "token", None)
        outcome, token = f"{type(error).__name__}: {error}", held.reveal() if isinstance(held, Secret) else None
    faults.armed = False
    connection.send(Told(outcome, token, faults.arrived, faults.calls, faults.before_the_token, faults.hit))
