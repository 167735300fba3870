"""What notebook 07 and the tests of the recipes run on: a local Upstox, an account, an empty store, and programs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

from upstox_db_examples.local.processes import find_free_port
from upstox_db_examples.local.upstox import LocalUpstox

ROOT = Path(__file__).parent.parent
USER = "AB1234"


class Playground:
    """A local Upstox, and programs that use it. Their settings are in this process's environment as well.

    Attributes:
        upstox: the local Upstox.
        account: the made-up account of USER there.
        folder: an empty folder that is removed at the end.
        api: the address of its API.
    """

    def __init__(self, upstox: LocalUpstox, folder: Path, stack: ExitStack) -> None:
        self.upstox, self.folder, self.api = upstox, folder, upstox.base_domain.format(stage="api")
        self.account = upstox.add_account(USER)
        self._stack = stack
        self._browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a program: `python -m` and this command. What it prints goes into a file. It ends with the playground.

        Args:
            command: the module and its arguments.
            variables: environment variables in addition to the playground's.
        """
        log = self._stack.enter_context((self.folder / f"{time.monotonic_ns()}.log").open("wb"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        program = subprocess.Popen(  # noqa: S603  # the command is the caller's
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        self._stack.callback(_end, program)
        return program

    def serve(self, *command: str, path: str = "/health", **variables: str) -> str:
        """Start a server, wait until it answers, and return its address. In the command, PORT stands for its port.

        Raises:
            RuntimeError: it ended, or gave no answer within two minutes.
        """
        port = str(find_free_port())
        program = self.start(*(part.replace("PORT", port) for part in command), **variables)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while program.poll() is None and time.monotonic() < deadline:
            if self.answers(url + path):
                return url
            time.sleep(0.05)
        raise RuntimeError(f"{command[0]} did not start:\n{self.printed()}")

    def get(self, url: str) -> str:
        """Return what this address answers."""
        with self._browser.open(url, timeout=60) as answer:
            return str(answer.read().decode())

    def answers(self, url: str) -> bool:
        """Tell whether a server answers there."""
        try:
            self.get(url)
        except OSError:
            return False
        return True

    def get_at_once(self, *urls: str) -> list[str]:
        """Ask all these addresses at the same moment."""
        with ThreadPoolExecutor(len(urls)) as threads:
            return list(threads.map(self.get, urls))

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Wait until this holds.

        Raises:
            TimeoutError: it did not hold within a minute.
        """
        deadline = time.monotonic() + 60
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError("What was waited for did not happen within a minute.")
            time.sleep(0.02)

    def printed(self) -> str:
        """Return what all programs have printed."""
        return "".join(file.read_text() for file in sorted(self.folder.glob("*.log")))


@contextmanager
def playground(store: str | None = None, host: str = "127.0.0.1") -> Iterator[Playground]:
    """Start a local Upstox, set the environment for programs that use it, and end all of them in the end.

    Args:
        store: the address of an empty store. By default it is a file of SQLite.
        host: the address of this machine that the local Upstox listens on.
    """
    _avoid_the_end_of_the_day()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstox = stack.enter_context(LocalUpstox(totp_once=False, limits=False, host=host))
        here = Playground(upstox, folder, stack)
        variables = {
            **here.account.environ(),
            "UPSTOX_USER_ID": USER,
            "UPSTOX_BASE_DOMAIN": upstox.base_domain,
            "UPSTOX_API": here.api,
            "UPSTOX_DB_STORE": store or f"sqlite:///{folder}/upstox.db",
            "UPSTOX_DB_KEY_FILE": str(folder / "keys"),
            "no_proxy": "127.0.0.1",
        }
        stack.enter_context(patch.dict(os.environ, variables))
        yield here


def show(recipe: str, begin: str, end: str = "") -> None:
    """Print a recipe from the text `begin` to the text `end`, or to its end."""
    text = (Path(__file__).parent / recipe).read_text()
    start = text.index(begin)
    print(text[start : text.index(end, start) if end else None].rstrip())


def _avoid_the_end_of_the_day() -> None:
    """Wait if tokens die within two minutes. The programs use the real clock, and a new token would die meanwhile."""
    now = datetime.now(UTC)
    left = (now.replace(hour=22, minute=0, second=0) - now).total_seconds()  # 03:30 in India
    if 0 < left < 120:
        time.sleep(left + 1)


def _end(program: subprocess.Popen[bytes]) -> None:
    program.terminate()
    try:
        program.wait(10)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()
