"""Jobs for the other processes of a test. Each job opens its own store on the test's database."""

from __future__ import annotations

import base64
import contextlib
import importlib
import inspect
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from upstox_totp.models import AccessTokenData

from upstox_db_examples import Accounts, KeyRing, Pace, SdkLogin, migrate
from upstox_db_examples.core import store as storage
from upstox_db_examples.core.token import IST

KEY = KeyRing(b"the same key for all processes..")
USER = "AB1234"

# A shell starts its background processes with SIGINT ignored, and CI may run in one of these. Then Ctrl-C would do
# nothing here and in the processes that this one starts.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Use a fork server: a plain fork is not safe in a process with threads, and spawn takes a second each time.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.support.processes",
        "upstox_db_examples.postgresql",
        "upstox_db_examples.mongodb",
        "upstox_db_examples.hybrid",
        "tests.support.naive",
        "tests.support.every_step",
        "tests.support.minimal",
    ]
)


class Address(NamedTuple):
    """How another process can open the same store: `module:Class` and the arguments."""

    kind: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}

    def open(self, **options: Any) -> Any:
        return self._class()(*self.arguments, **{"keys": KEY, **self.options, **options})

    def counting(self) -> dict[str, Any]:
        """Return the options that make this store count and audit reads. Stores that always do so need none."""
        return {"audit_reads": True} if "audit_reads" in inspect.signature(self._class()).parameters else {}

    def _class(self) -> Any:
        module, name = self.kind.split(":")
        return getattr(importlib.import_module(module), name)


def start(job: Any, *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start a process that runs this job. The connection receives what the job sends."""
    ours, theirs = _context.Pipe()
    assert isinstance(ours, Connection)
    process = _context.Process(target=job, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def run_all(count: int, job: Any, *arguments: Any, seconds: float = 120) -> list[Any]:
    """Start this many processes, let them all go at the same moment, and return what they send."""
    started = [start(job, *arguments) for _ in range(count)]
    connections = [connection for _, connection in started]
    for each in connections:
        assert each.recv() == "ready"
    for each in connections:
        each.send("go")
    results, deadline = [], time.monotonic() + seconds
    while connections:
        done = wait(connections, timeout=max(0.0, deadline - time.monotonic()))
        assert done, f"{len(connections)} of {count} processes did not answer within {seconds} s"
        for connection in done:
            assert isinstance(connection, Connection)
            results.append(connection.recv())
            connections.remove(connection)
            connection.close()
    for process, _ in started:
        process.join()
    return results


def wait_until(holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait until the condition holds. As long as it raises an error, it does not hold."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            if holds():
                return
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.02)


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # the process has ended already
        os.kill(process.pid, signal.SIGKILL)
    process.join()


# The jobs


def get_or_create(connection: Connection, address: Address, upstox: str, credentials: dict[str, str]) -> None:
    """Call get_or_create_token once, and send the token or the error."""
    os.environ["no_proxy"] = "127.0.0.1"
    store = address.open(login=SdkLogin(credentials, base_domain=upstox))
    connection.send("ready")
    connection.recv()
    try:
        connection.send(store.get_or_create_token(USER)["token"])
    except Exception as error:
        connection.send(repr(error))


def renew_in_threads(
    connection: Connection,
    address: Address,
    upstox: str,
    credentials: dict[str, str],
    refused: str,
    threads: int,
    options: dict[str, Any],
) -> None:
    """Call renew_token in this many threads at once. Send how often each token or error was the result."""
    os.environ["no_proxy"] = "127.0.0.1"
    store = address.open(login=SdkLogin(credentials, base_domain=upstox), **options)
    together = threading.Barrier(threads)

    def renewed(_: int) -> str:
        together.wait()
        try:
            return str(store.renew_token(USER, refused)["token"])
        except Exception as error:
            return repr(error)

    connection.send("ready")
    connection.recv()
    with ThreadPoolExecutor(threads) as pool:
        connection.send(Counter(pool.map(renewed, range(threads))))


def log_in_for_ever(connection: Connection, address: Address) -> None:
    """Hold the lock in a login that never ends."""

    def never(_: str | None) -> AccessTokenData:
        connection.send("logging in")
        time.sleep(600)
        raise AssertionError

    address.open(login=never).get_or_create_token(USER)


def log_in_slowly(connection: Connection, address: Address) -> None:
    """Call get_or_create_token. Send that the login has begun, wait for a message, then send the token or the error."""

    def slowly(user_id: str | None) -> AccessTokenData:
        connection.send("logging in")
        connection.recv()
        return made_up_login(user_id)

    try:
        connection.send(address.open(login=slowly).get_or_create_token(USER)["token"])
    except Exception as error:
        connection.send(repr(error))


def store_on_and_on(connection: Connection, address: Address) -> None:
    """Store one token after another, and send the id of each token that was acknowledged."""
    with address.open(login=made_up_login) as store, contextlib.suppress(BrokenPipeError):
        connection.send("ready")
        while True:
            connection.send(store.store_token(USER)["token_id"])


def enter_and_leave(connection: Connection, address: Address, folder: str, seconds: float) -> None:
    """Take the lock as often as possible. Send how often that was, and how often another process was inside as well."""
    store, inside = address.open(login=made_up_login), Path(folder, "inside")
    connection.send("ready")
    connection.recv()
    entries = overlaps = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with store.backend.lock(USER):
            entries += 1
            try:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                overlaps += 1
            time.sleep(random.uniform(0, 0.0005))
            inside.unlink(missing_ok=True)
    connection.send((entries, overlaps))


def rotate(connection: Connection, address: Address, old: bytes, new: bytes) -> None:
    """Rotate the keys in small batches, so that there is a pause between them."""
    storage.ROWS_AT_ONCE = 5
    with address.open(keys=KeyRing(new, old)) as store:
        connection.send("ready")
        connection.send(store.rotate_keys())


def migrate_on(connection: Connection, source: Address, target: Address) -> None:
    """Migrate everything from one store to the other, and send a message before each write."""
    with source.open() as one, target.open() as other:
        put_in = other.backend.merge

        def told(*arguments: Any) -> None:
            connection.send("writing")
            put_in(*arguments)

        other.backend.merge = told
        connection.send("ready")
        migrate(one, other, progress=False)
        connection.send("done")


def fold_on_and_on(connection: Connection, address: Address) -> None:
    """Fold the use counts that wait in Redis, again and again."""
    with address.open(login=made_up_login) as store:
        connection.send("ready")
        while True:
            store.fold_uses()


def fork_and_read(connection: Connection, address: Address) -> None:
    """Store a token, read it in a forked child, read it again, and send the token three times."""
    store = address.open(login=made_up_login)
    stored = store.store_token(USER)["token"]
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writing, store.get_valid_token(USER)["token"].encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as opened:
        in_the_child = opened.read()
    os.wait()
    connection.send((stored, in_the_child, store.get_valid_token(USER)["token"]))


def store_batch(_: Connection, address: Address, upstox: str, credentials: dict[str, dict[str, str]]) -> None:
    """Log all of these accounts in as fast as possible."""
    os.environ["no_proxy"] = "127.0.0.1"
    with address.open(login=Accounts(credentials, base_domain=upstox)) as store:
        store.store_token_batch(list(credentials), progress=False, pace=Pace(limits=()))


def fork_and_compare(connection: Connection, address: Address) -> None:
    """Use a pool, fork, and use it in the child. Send whether the child's pool has or lends the parent's connection."""
    store = address.open(login=made_up_login)
    with store.get_connection() as conn:
        parents = conn
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            idle = store.backend.connections.pool.counts()[1]
            with store.get_connection() as conn:
                same = f"{idle}{int(conn is parents)}"
            os.write(writing, same.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as opened:
        idle, connected = map(int, opened.read())
    os.wait()
    connection.send({"idle in the child": idle, "the same connection": bool(connected)})


def made_up_login(user_id: str | None) -> AccessTokenData:
    return token_data(user_id or USER, f"eyJ0eXAi{random.getrandbits(512):0128x}")


def jwt(user_id: str, issued: datetime, **claims: Any) -> str:
    """Return a token like Upstox's, except for its signature. It was issued then and dies at the next Indian 03:30."""
    died = issued.astimezone(IST).replace(hour=3, minute=30, second=0, microsecond=0)
    dies = died if died > issued else died + timedelta(days=1)
    own = {"sub": user_id, "jti": f"{random.getrandbits(96):024x}", "iat": int(issued.timestamp())}
    told = {**own, "iss": "udapi-gateway-service", "exp": int(dies.timestamp()), **claims}
    header, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in ({"typ": "JWT", "alg": "HS256"}, told)
    )
    return f"{header}.{body}.{random.getrandbits(256):064x}"


def token_data(user_id: str, token: str = "eyJ0eXAi" * 9) -> AccessTokenData:
    """Return the result of a login without logging in, for results that no real login can be made to return."""
    return AccessTokenData(
        email="trader@example.com",
        exchanges=["NSE"],
        products=["D"],
        broker="UPSTOX",
        user_id=user_id,
        user_name="A Trader",
        order_types=["MARKET"],
        user_type="individual",
        poa=False,
        ddpi=False,
        is_active=True,
        access_token=token,
    )


def response(user_id: str, token: str, **more: Any) -> dict[str, Any]:
    return {"user_id": user_id, "access_token": token, **more}
