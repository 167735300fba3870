"""A pool in a forked child."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..support.project import ROOT

IN_A_CHILD = """
import os, signal, sqlite3, sys, threading
from upstox_db_examples.core.pool import Pool

closed = []
def close(conn):
    closed.append(conn)
    conn.close()

pool = Pool(lambda: sqlite3.connect("some.db", check_same_thread=False), close, size=2, timeout=5)

def in_a_child(do):
    if (child := os.fork()) == 0:
        signal.alarm(10)  # A child that hangs must not outlive the test.
        try:
            do()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run_forking(code: str, folder: Path) -> None:
    script = IN_A_CHILD + code
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", script]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_that_is_forked_while_a_thread_has_the_lock_does_not_hang(tmp_path: Path) -> None:
    code = """
with pool.borrow() as of_the_parent:
    pass
locked, done = threading.Event(), threading.Event()
def hold():
    with pool._lock:
        locked.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
locked.wait()

def child():
    assert pool.counts() == (0, 0)
    with pool.borrow() as conn, pool.borrow() as another:
        assert of_the_parent not in (conn, another)
    pool.close()
    assert of_the_parent not in closed and len(closed) == 2
    of_the_parent.execute("SELECT 1")

in_a_child(child)
done.set()
thread.join()
with pool.borrow() as conn:
    assert conn is of_the_parent
"""
    run_forking(code, tmp_path)


def test_a_child_that_is_forked_while_others_borrow_and_wait_has_the_whole_pool(tmp_path: Path) -> None:
    code = """
done = threading.Event()
def hold():
    with pool.borrow():
        done.wait()
threads = [threading.Thread(target=hold) for _ in range(4)]
for thread in threads:
    thread.start()
while pool.waiting < 2:
    pass

def child():
    with pool.borrow(), pool.borrow():
        assert pool.counts() == (2, 0)

in_a_child(child)
assert pool.counts() == (2, 0)
done.set()
for thread in threads:
    thread.join()
assert pool.counts() == (0, 2)
"""
    run_forking(code, tmp_path)


def test_a_child_that_leaves_its_parents_loan_neither_closes_nor_keeps_it(tmp_path: Path) -> None:
    code = """
loan = pool.borrow()
conn = loan.__enter__()

def child():
    loan.__exit__(None, ZeroDivisionError(), None)
    assert closed == [] and pool.counts() == (0, 0)
    conn.execute("SELECT 1")

in_a_child(child)
assert pool.counts() == (1, 0)
loan.__exit__(None, None, None)
assert pool.counts() == (0, 1)
"""
    run_forking(code, tmp_path)
