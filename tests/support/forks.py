"""Programs that fork while they use a store, as gunicorn and Celery do. They run in processes of their own."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from upstox_db_examples import StoreUnavailable, TokenStorage

from .processes import USER, Address, made_up_login

SECONDS = 30  # A child that takes longer hangs.


def fork_under_busy_threads(connection: Connection, address: Address, forks: int) -> None:
    """Fork while four threads read; sends how the children ended, and what the threads saw."""
    store = address.open(login=made_up_login)
    token = store.store_token(USER)["token"]
    over, seen = threading.Event(), Counter[str]()

    def read() -> None:
        while not over.is_set():
            try:
                found = store.get_valid_token(USER)
                seen["right" if found and found["token"] == token else "wrong"] += 1
            except Exception as error:
                seen[repr(error)] += 1

    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    ends = Counter(in_a_child(partial(read_and_store, store, token, number)) for number in range(forks))
    over.set()
    for thread in threads:
        thread.join(SECONDS)
    lost = [f"CD{number:04}" for number in range(0, forks, 10) if not store.get_valid_token(f"CD{number:04}")]
    connection.send((dict(ends), {word: count for word, count in seen.items() if word != "right"}, lost))


def read_and_store(store: TokenStorage, token: str, number: int) -> bool:
    found = store.get_valid_token(USER)
    right = found is not None and found["token"] == token
    if number % 10 == 0:
        user = f"CD{number:04}"
        stored = store.store_token(user)["token"]
        found = store.get_valid_token(user)
        right = right and found is not None and found["token"] == stored
    return right


def fork_in_a_login(connection: Connection, address: Address) -> None:
    """Fork inside a login. The child uses the store and leaves the login by an exception; sends what came of it."""

    class ChildIsDone(BaseException):
        pass

    def login(user_id: str | None) -> Any:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            raise ChildIsDone
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        held.append(is_held(address))
        return made_up_login(user_id)

    ends: list[int] = []
    held: list[bool] = []
    parent = os.getpid()
    store = address.open(login=made_up_login)
    store.store_token("CD5678")
    logging_in = address.open(login=login)
    try:
        token = logging_in.store_token(USER)["token"]
    except ChildIsDone:
        os._exit(0 if logging_in.get_valid_token("CD5678") else 1)
    assert os.getpid() == parent
    found = store.get_valid_token(USER)
    connection.send((ends, held, found is not None and found["token"] == token))


def is_held(address: Address) -> bool:
    """Tell whether somebody else has the user's lock."""
    with address.open(login_wait=0.3) as other:
        try:
            with other.backend.lock(USER):
                return False
        except StoreUnavailable:
            return True


def in_a_child(check: Callable[[], bool]) -> str:
    """Run this in a forked child, and say how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own warning of threads
        child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            faulthandler.dump_traceback()
            os._exit(2)
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "right", 1: "wrong", 2: "error", -signal.SIGALRM: "hung"}.get(end, str(end))
