"""A pooler between a store and PostgreSQL: the genuine PgBouncer if Docker answers, otherwise a small one of the tests.

Few sessions for all clients show whether a program keeps one too many.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit, urlunsplit

import psycopg2

from upstox_db_examples.local import servers

from .databases import docker_answers, notes

IMAGE = "edoburu/pgbouncer:1.18.0"
IDLE, ENCRYPTION = b"I", (80877103, 80877104)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


REFUSED = _message(b"E", b"SFATAL\0C08P01\0Mtransaction blocks not allowed in statement pooling mode\0\0")


class Pooled(NamedTuple):
    """The server itself, and how to reach one of its databases by the pooler."""

    server: str
    by_pooler: Callable[[str], str]


@contextmanager
def pooling(mode: str, sessions: int) -> Iterator[Pooled]:
    """Start PostgreSQL and a pooler of this mode: "transaction", "session" or "statement"."""
    with contextlib.ExitStack() as stack:
        pooled = None
        if docker_answers():
            try:
                pooled = stack.enter_context(_pgbouncer(mode, sessions))
            except Exception as error:  # there is no image and no registry
                notes.append(f"Ran on a pooler: {IMAGE} did not start under Docker ({type(error).__name__})")
        if pooled is None:
            pooled = stack.enter_context(_small_pooler(mode, sessions))
        yield pooled


@contextmanager
def _pgbouncer(mode: str, sessions: int) -> Iterator[Pooled]:
    from testcontainers.community.postgres import PostgresContainer
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.network import Network
    from testcontainers.core.wait_strategies import PortWaitStrategy

    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        server = PostgresContainer("postgres:17", driver=None).with_network(network).with_network_aliases("database")
        url = stack.enter_context(server).get_connection_url()
        parts = urlsplit(url)
        pooler = DockerContainer(IMAGE).with_network(network).with_exposed_ports(5432)
        pooler.waiting_for(PortWaitStrategy(5432))
        settings = {
            "DB_HOST": "database",
            "DB_USER": str(parts.username),
            "DB_PASSWORD": str(parts.password),
            "AUTH_TYPE": "scram-sha-256",
            "POOL_MODE": mode,
            "DEFAULT_POOL_SIZE": str(sessions),
            "MAX_CLIENT_CONN": "500",
        }
        for name, value in settings.items():
            pooler.with_env(name, value)
        stack.enter_context(pooler)
        notes.append(f"Ran on a pooler: testcontainers {IMAGE}")
        host, port = pooler.get_container_host_ip(), int(pooler.get_exposed_port(5432))
        yield Pooled(url, lambda database: _at(urlsplit(database), host, port))


@contextmanager
def _small_pooler(mode: str, sessions: int) -> Iterator[Pooled]:
    notes.append("Ran on a pooler: a small one of the tests, because no PgBouncer runs here")
    with servers.postgresql() as url, contextlib.ExitStack() as stack:
        started: dict[str, SmallPooler] = {}  # by database, as each PgBouncer has a pool for each

        def by_pooler(database: str) -> str:
            if database not in started:
                started[database] = stack.enter_context(SmallPooler(database, mode, sessions))
            return _at(urlsplit(database), "127.0.0.1", started[database].port)

        yield Pooled(url, by_pooler)


def _at(parts: SplitResult, host: str, port: int) -> str:
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@{host}:{port}"))


class SmallPooler:
    """Lends a session for one transaction, for one statement, or until the client leaves. It asks for no password, and
    carries simple queries only, as psycopg2 sends them.

    Args:
        database: the URL of one database.
        invents_ids: tell clients a process id of its own, as PgBouncer does. Others pass on that of some session.
    """

    def __init__(self, database: str, mode: str, sessions: int, *, invents_ids: bool = True) -> None:
        self._database, self._mode, self._invents_ids = database, mode, invents_ids
        self._changed, self._closed = threading.Condition(), False
        self._drivers: list[psycopg2.extensions.connection] = []
        self._free = [self._connect() for _ in range(0 if mode == "session" else sessions)]
        self._hello = self._make_hello()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> SmallPooler:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        with self._changed:
            for session in self._free:
                session.close()
            for driver in self._drivers:
                driver.close()

    def _connect(self) -> socket.socket:
        # psycopg2 logs in. After that only its socket is used.
        self._drivers.append(psycopg2.connect(self._database))
        session = socket.socket(fileno=os.dup(self._drivers[-1].fileno()))
        session.setblocking(True)  # libpq has set the opposite
        return session

    def _make_hello(self) -> bytes:
        with contextlib.closing(psycopg2.connect(self._database)) as driver:
            names = ["server_version", "server_encoding", "client_encoding", "DateStyle", "TimeZone"]
            names += ["integer_datetimes", "standard_conforming_strings"]
            values = {name: driver.info.parameter_status(name) or "" for name in names}
            pid = os.getpid() if self._invents_ids else (self._drivers or [driver])[-1].info.backend_pid
        values["client_encoding"] = "UTF8"
        hello = _message(b"R", struct.pack("!I", 0))
        for name, value in values.items():
            hello += _message(b"S", f"{name}\0{value}\0".encode())
        return hello + _message(b"K", struct.pack("!II", pid, 1)) + _message(b"Z", IDLE)

    def _serve(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._attend, args=(client,), daemon=True).start()

    def _attend(self, client: socket.socket) -> None:
        session = None
        with client, contextlib.suppress(OSError):
            try:
                while _int(start := _take(client, _int(_take(client, 4)) - 4)) in ENCRYPTION:
                    client.sendall(b"N")
                if _int(start) != 196608:  # a request to cancel, for example
                    return
                client.sendall(self._hello)
                while (asked := self._next_question(client, session))[0] != b"X":
                    session = session or self._lend()
                    session.sendall(_message(*asked))
                    answers, kind, body = b"", b"", b""
                    while kind != b"Z":
                        kind, body = _receive(session)
                        answers += _message(kind, body)
                    if self._mode == "statement" and body != IDLE:
                        client.sendall(REFUSED)
                        return
                    if self._mode != "session" and body == IDLE:
                        self._take_back(session)
                        session = None
                    client.sendall(answers)
            finally:
                if session:
                    self._take_back(session, reset=True)

    def _next_question(self, client: socket.socket, session: socket.socket | None) -> tuple[bytes, bytes]:
        """Wait for the client. If the session is the client's own, pass on what it says unasked: notifications."""
        while session and self._mode == "session" and session in select.select([client, session], [], [])[0]:
            client.sendall(_message(*_receive(session)))
        return _receive(client)

    def _lend(self) -> socket.socket:
        with self._changed:
            if self._mode == "session":
                return self._connect()
            self._changed.wait_for(lambda: self._free or self._closed)
            session = self._free.pop()  # the one that was used last, as PgBouncer does
            if select.select([session], [], [], 0)[0]:  # The server has ended it.
                session.close()
                session = self._connect()
            return session

    def _take_back(self, session: socket.socket, *, reset: bool = False) -> None:
        if reset:
            try:
                session.sendall(_message(b"Q", b"ROLLBACK\0"))
                while _receive(session)[0] != b"Z":
                    pass
            except OSError:  # The server has ended this session.
                session.close()
                session = self._connect()
        with self._changed:
            self._free.append(session)
            self._changed.notify()


def _take(source: socket.socket, number: int) -> bytes:
    taken = b""
    while len(taken) < number:
        if not (more := source.recv(number - len(taken))):
            raise ConnectionError
        taken += more
    return taken


def _int(number: bytes) -> int:
    return int.from_bytes(number[:4])


def _receive(source: socket.socket) -> tuple[bytes, bytes]:
    return _take(source, 1), _take(source, _int(_take(source, 4)) - 4)
