"""Signals that wait for a login: which handlers are set afterwards, and what a forked child does with them."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from types import FrameType

import pytest

from upstox_db_examples.core.interrupts import PutOff, raise_pending

from ..support.processes import start


def a_handler(_number: int, _frame: FrameType | None) -> None:
    pass


def test_a_handler_that_the_login_has_set_for_good_stays() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with PutOff():
            signal.signal(signal.SIGTERM, a_handler)
        assert signal.getsignal(signal.SIGTERM) is a_handler
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_the_outer_login_alone_puts_signals_off() -> None:
    with pytest.raises(KeyboardInterrupt), PutOff():
        with PutOff():
            signal.raise_signal(signal.SIGINT)
            raise_pending()
        done = True
    assert done
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def end_in_a_login(connection: Connection, number: int, times: int) -> None:
    """Be asked to end during a login, without a handler. Send what is still done."""
    signal.signal(number, signal.SIG_DFL)
    with PutOff():
        for _ in range(times):
            os.kill(os.getpid(), number)
        connection.send("the token is stored")
    connection.send("the process lives on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_asked_to_end_finishes_its_login(number: int) -> None:
    for times in (1, 2):
        process, connection = start(end_in_a_login, number, times)
        if times == 1:
            assert connection.recv() == "the token is stored"
        with pytest.raises(EOFError):
            connection.recv()
        process.join()
        assert process.exitcode == -number


def fork_in_a_login(connection: Connection) -> None:
    """Fork during a login, in the main thread and in another one. Send what Ctrl-C did in each child."""
    results = []

    def fork() -> None:
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                signal.raise_signal(signal.SIGINT)
                os.write(writing, b"it waited")
            except KeyboardInterrupt:
                with PutOff():  # The child's own login is protected like any other.
                    os.write(writing, b"it came at once" if signal.getsignal(signal.SIGINT) else b"")
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as opened:
            results.append(opened.read())
        os.wait()

    with PutOff():
        fork()
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    connection.send(results)


def test_a_child_that_was_forked_during_a_login_does_not_wait_for_it() -> None:
    process, connection = start(fork_in_a_login)
    assert connection.recv() == ["it came at once"] * 2
    process.join()
