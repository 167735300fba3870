"""A login that is hit once, at one moment, in one way: what the process of that login does, and what is looked at
after it.

A moment is a request or an answer of the login's six steps, or a call to the database, before or after it was carried
out. Where the calls are caught is each driver's own lowest place that a store comes by: so a fault can hit between any
two of them, whatever the store's code looks like.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import curl_cffi.requests
import psycopg2
import pymongo.synchronous.pool
import redis

from upstox_db_examples import Accounts, SdkLogin, Secret, StorageError
from upstox_db_examples.core.backend import ACCOUNT_LOCK
from upstox_db_examples.local.upstox import Account, LocalUpstox

from . import processes
from .processes import Address

ERROR, OUTAGE, INTERRUPT, TWO_INTERRUPTS, KILL = "an error", "an outage", "Ctrl-C", "Ctrl-C twice", "kill -9"
# An outage lasts from its moment on, so all moments between two calls are one. A second Ctrl-C counts only when the
# first was seen, which a process that waits for an answer does not; it is tried where there is a token to be lost.
WORKERS = 3  # Much of a run is waiting: for a commit, or until a copy in Redis is not believed any more.


class Moment(NamedTuple):
    """When a fault hits: at which step ("request", "answer") or call ("before", "after")."""

    what: str
    number: int
    side: str

    def __str__(self) -> str:
        return f"{self.what} {self.number} ({self.side})"


NEVER = Moment("call", 0, "")
STEPS = [Moment("step", number, side) for number in range(1, 7) for side in ("request", "answer")]


class Way(NamedTuple):
    """How the login comes about: which method is called, whether with the user's name, and on what."""

    method: str = "store_token"
    named: bool = True
    revoked: bool = False

    def __str__(self) -> str:
        return f"{self.method}({'USER' if self.named else ''}){' after a revocation' if self.revoked else ''}"


PLAIN = Way()


class Told(NamedTuple):
    """What the login's process says at its end, if it comes to one.

    Attributes:
        outcome: the name of the error's class, or "a token".
        token: the one that was returned, or that is in the error.
        arrived: the tokens whose answers had arrived at the client.
        calls: to the database, in their order.
        before_the_token: how many of them were made when the first token had arrived.
        hit: whether the moment came, at a call.
    """

    outcome: str
    token: str | None
    arrived: list[str]
    calls: list[str]
    before_the_token: int
    hit: bool


# In the login's process


class Faults:
    """The fault at a call to the database.

    Args:
        tell: gets word that this process kills itself.

    Attributes:
        armed: whether calls are counted: not while the store is opened.
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
        """Make this call, unless the fault is there before it; and let nobody see its answer if it is there after it.

        Args:
            server: what is out of reach from now on, if the fault is an outage.
            error: what the driver raises when the connection drops.
            cut: drops the connection.
        """
        self.before(server, name, error, cut)
        answer = call()
        try:
            self.after(server, error, cut)
        except BaseException:
            del answer  # A traceback that keeps this frame must not keep a cursor, and with it SQLite's lock.
            raise
        return answer

    def before(
        self, server: str, name: str, error: Callable[[], Exception], cut: Callable[[], None] = lambda: None
    ) -> None:
        if self._down == server:  # in all threads: one that renews a lease finds no server, either
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
    """Let all calls to this store's database come by these faults. Real calls, to a real database."""
    _watch_mongodb(faults)
    connections = getattr(store, "_connections", None)
    if hasattr(connections, "answer"):
        _watch_postgresql(connections, faults)
    if hasattr(store, "_redis"):
        _watch_redis(store._redis, faults)


def watch_sqlite(faults: Faults) -> None:
    """As `watch`, for all connections that are opened after it."""

    def error() -> sqlite3.OperationalError:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR"
        return error

    class Watched(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            run = super().execute
            answer: sqlite3.Cursor = faults.around("sqlite", _short(sql), lambda: run(sql, *arguments), error)
            return answer

        def executescript(self, sql: str) -> sqlite3.Cursor:
            run = super().executescript
            answer: sqlite3.Cursor = faults.around("sqlite", _short(sql), lambda: run(sql), error)
            return answer

        def rollback(self) -> None:
            if self.in_transaction:  # Otherwise it does nothing.
                faults.around("sqlite", "rollback", super().rollback, error)

    connect = sqlite3.connect
    sqlite3.connect = lambda *arguments, **options: connect(*arguments, **{**options, "factory": Watched})


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
    answer = tokens._answer

    def watched(ask: Callable[[], Any], **options: Any) -> Any:
        def error() -> redis.ConnectionError:
            return redis.ConnectionError("Connection closed by server.")

        name = ask.__qualname__.partition(".<locals>")[0].rpartition(".")[2]
        return answer(lambda: faults.around("redis", f"Redis: {name}", ask, error), **options)

    tokens._answer = watched


def _watch_mongodb(faults: Faults) -> None:
    pool: Any = pymongo.synchronous.pool
    send, receive = pool.sendall, pool.receive_message

    def monitors() -> bool:  # The driver's own threads ask whether a server is there.
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
    # An OP_MSG: 16 bytes of header, 4 of flags, 1 of kind; a document of 4 bytes of size and 1 of type, then the name.
    return message[26 : message.index(b"\0", 26)].decode(errors="replace")


def _note_arrivals(faults: Faults) -> None:
    """Write down each token as it comes out of the HTTP client, before the login's own code has seen it."""
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
    """One login, with a fault if its moment is a call to the database; sends what there is to tell."""
    os.environ["no_proxy"] = "127.0.0.1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may have had it ignored.
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


# In the test's process


class Run(NamedTuple):
    """A login that was hit, or had to be."""

    account: Account
    moment: Moment
    hit: bool
    told: Told | None

    def __str__(self) -> str:
        at = self.moment
        name = f" {self.told.calls[at.number - 1]!r}" if self.told and at.what == "call" and self.hit else ""
        return f"{at}{name}: {self.told.outcome if self.told else 'dead'}"


class Worker:
    """Makes logins, one after another, at an Upstox of its own, and looks at what they leave.

    Args:
        address: where the store is, which other workers use as well.
        letter: of this worker's own users.
    """

    def __init__(self, address: Address, letter: str, kind: str, way: Way) -> None:
        self._address, self._letter, self._kind, self._way = address, letter, kind, way
        self._upstox = LocalUpstox(totp_once=False)

    def faults(self, moments: Sequence[Moment]) -> list[str]:
        """Hit a login at each of these moments; in what the promises were broken."""
        return [fault for _, found in self.runs(moments) for fault in found]

    def undisturbed(self) -> Told:
        """What there is to tell of a login that nothing hits."""
        ((run, faults),) = self.runs([NEVER])
        assert not faults, faults
        assert run.told is not None
        assert run.told.arrived == [run.told.token]
        return run.told

    def runs(self, moments: Sequence[Moment]) -> list[tuple[Run, list[str]]]:
        users = [f"C{self._letter}{number:04}" for number in range(len(moments))]
        with self._upstox:
            accounts = {user_id: self._upstox.add_account(user_id) for user_id in users}
            login = Accounts(
                {user_id: account.credentials() for user_id, account in accounts.items()},
                base_domain=self._upstox.base_domain,
            )
            with self._address.open(login=login) as store:
                pairs = zip(users, moments, strict=True)
                runs: Iterable[Run] = (self._hit(store, accounts[user], moment) for user, moment in pairs)
                if "lease" in self._address.options:  # All leases end together: so they are waited for once.
                    runs = list(runs)
                return [(run, list(self._broken(store, run))) for run in runs]

    def _hit(self, store: Any, account: Account, moment: Moment) -> Run:
        """A login of this account, which has a living token, hit at this moment."""
        store.save_token(self._upstox.notify(account.user_id))
        if self._way.revoked:
            store.revoke_token(account.user_id)
        process, connection = processes.start(
            log_in,
            self._address,
            self._upstox.base_domain,
            account.credentials(),
            account.user_id if self._way.named else None,
            self._way.method,
            moment,
            self._kind,
        )
        come, over = threading.Event(), threading.Event()

        def at_a_step(step: int, side: str) -> None:
            if (step, side) == moment[1:]:
                come.set()
                if self._kind == ERROR:
                    over.set()
                    raise ConnectionResetError
                assert process.pid is not None
                os.kill(process.pid, signal.SIGINT if self._kind == INTERRUPT else signal.SIGKILL)
            if (step, "answer") == (moment.number, side):
                over.set()

        self._upstox.on_step = at_a_step if moment.what == "step" else None
        told = None
        with connection:
            assert connection.recv() == "ready"
            connection.send("go")
            with contextlib.suppress(EOFError, ConnectionResetError):
                assert connection.poll(60), f"{moment}: the login hangs"
                told = connection.recv()
        process.join()
        hit = come.is_set() or told == KILL or (isinstance(told, Told) and told.hit)
        if moment.what == "step" and come.is_set():
            # Upstox works on a request also if its sender has died meanwhile. Until it is done nobody can know.
            assert over.wait(20)
        self._upstox.on_step = None
        return Run(account, moment, hit, told if isinstance(told, Told) else None)

    def _broken(self, store: Any, run: Run) -> Iterator[str]:
        """In what a promise was broken, in words."""
        told, user_id, way = run.told, run.account.user_id, f"{self._way}, {self._kind} at {run}"
        if run.hit != (run.moment != NEVER) or (told is None) != (run.hit and self._kind == KILL):
            yield f"{way}: the fault did not hit, or not in this way"
        for name in (user_id, f"{ACCOUNT_LOCK}{store._login.account_of(user_id)}"):
            with store._lock(name):
                pass  # That login is over.
        kept = told.token if told else None
        for token in told.arrived if told else ():
            if token != kept and not _is_stored(store, user_id, Secret(token)):
                yield f"{way}: a token that had arrived is neither in the store nor in the error"
        if told and told.outcome == "a token" and not _is_stored(store, user_id, Secret(str(told.token))):
            yield f"{way}: a token was returned that is not in the store"
        read = store.get_valid_token(user_id)
        if read is not None and not self._upstox.is_living(read["token"]):
            yield f"{way}: get_valid_token hands out a token that Upstox refuses"
        try:
            there = store.get_or_create_token(user_id)["token"]
        except StorageError as error:
            yield f"{way}: get_or_create_token fails ({type(error).__name__}: {error})"
        else:
            if not self._upstox.is_living(there):
                yield f"{way}: get_or_create_token hands out a token that Upstox refuses"


def moments_of(told: Told, kind: str) -> list[Moment]:
    """The moments of a login that makes the calls of this one."""
    calls = range(1 + (told.before_the_token if kind == TWO_INTERRUPTS else 0), len(told.calls) + 1)
    at_calls = [Moment("call", number, side) for number in calls for side in ("before", "after")]
    return at_calls if kind in (OUTAGE, TWO_INTERRUPTS) else STEPS + at_calls


def broken_at_every_step(
    address: Address, kind: str, way: Way = PLAIN, workers: int = WORKERS
) -> tuple[int, list[str]]:
    """Hit one login at each of its moments; how many there were, and in what the promises were broken."""
    moments = moments_of(Worker(address, "Z", kind, way).undisturbed(), kind)
    shares = [moments[first::workers] for first in range(workers)]
    each = [Worker(address, chr(ord("A") + number), kind, way) for number in range(workers)]
    with ThreadPoolExecutor(workers) as threads:
        found = threads.map(Worker.faults, each, shares)
        return len(moments), [fault for faults in found for fault in faults]


def _is_stored(store: Any, user_id: str, token: Secret) -> bool:
    _, newest = store._look_up(user_id)
    return newest is not None and bool(store._holds(newest, token))
