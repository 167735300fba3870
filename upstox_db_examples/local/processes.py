"""A server process of our own. It uses a free port, fails on demand, and never outlives the process that started it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from ..core.errors import ConfigurationError, StoreUnavailable

PATIENCE = 20.0  # seconds to wait for a start, and for an end

# The watchdog waits until the pipe to the process that started it is closed: by close(), or when that process ends or
# gets a kill -9. (Exit handlers do not run after a kill -9.) It has its own session, so that neither Ctrl-C nor
# Jupyter's interrupt reaches it. (A child that is forked while the server runs holds the pipe, too: after a kill -9 the
# server lives until that child ends as well. close() does not wait for the child, because it sends "end".) The last
# number from the pipe is the server's process id. It is 0 while there is no server, because the system reuses ids.
WATCHDOG = """
import shutil, signal, sys, psutil
pid, folder = 0, sys.argv[1]
for line in iter(sys.stdin.readline, ""):
    if line == "end\\n":
        break
    pid = int(line)
if pid and psutil.pid_exists(pid):
    main = psutil.Process(pid)
    everyone = [main, *main.children(recursive=True)]
    for number, whom in ((signal.SIGCONT, everyone), (signal.SIGQUIT, [main]), (signal.SIGKILL, everyone)):
        for process in whom:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(everyone, timeout=0 if number == signal.SIGCONT else 2)
if folder:
    shutil.rmtree(folder, ignore_errors=True)
"""


class Server(ABC):
    """A server of our own that we can also make fail.

    Args:
        folder: where its data is kept for the next time; None for a temporary folder that is removed.
        tls: also speak TLS, with a certificate for localhost and 127.0.0.1 that `ca_file` verifies.
        settings: the server's own settings.

    Raises:
        ConfigurationError: the wheel is not installed, or there is no wheel for this platform.
        StoreUnavailable: the server did not start; the message says why.
    """

    name: str
    variable: str
    wheel: str

    def __init__(
        self, folder: Path | None = None, *, tls: bool = False, settings: Mapping[str, str] | None = None
    ) -> None:
        self._kept = folder
        self._tls = tls
        self._settings = dict(settings or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.watchdog: subprocess.Popen[str] | None = None
        self._given = os.environ.get(self.variable)
        self.url = self._given or ""
        self.ca_file: Path | None = None

    def __enter__(self) -> Self:
        if not self._given:
            try:
                self._make()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} server, {'running' if self.process else 'not running'}>"

    def start(self) -> None:
        """Start again, on the same port and with the same data."""
        self._refuse_if_given()
        log = self.folder / "server.log"
        with log.open("ab") as output:
            already = output.tell()
            self.process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **self._started_with,
            )
        self.tell_watchdog(self.process.pid)
        deadline = time.monotonic() + PATIENCE
        while not (self._listens() and self._is_ready()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._reap()
                said = log.read_bytes()[already:].decode(errors="replace")
                # MongoDB logs much more after the reason, so we search the whole output of this start.
                why = [line for line in said.splitlines() if "in use" in line.lower()]
                last_words = why[-2:] + said.splitlines()[-5:]
                raise StoreUnavailable(f"{self.name} did not start: {' / '.join(last_words)}")
            time.sleep(0.03)

    def stop(self) -> None:
        """Stop as an administrator would: sessions end, and the data is safe."""
        self._signal(signal.SIGINT)
        self._reap(wait=10)

    def kill(self) -> None:
        """Kill all its processes with -9. When this returns they are gone, and what they held is free again."""
        self._signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """Stall the server: all its processes stop, and their connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and, if it was temporary, remove its data."""
        if self.process:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._signal(signal.SIGCONT)
                # Data that we keep needs an orderly shutdown. Data that we remove does not.
                self._signal(signal.SIGINT if self._kept else signal.SIGQUIT)
            self._reap(wait=10 if self._kept else 2)
        if self.watchdog:
            self.tell_watchdog("end")
            self.watchdog.communicate()
            self.watchdog = None

    def _make(self) -> None:
        self._started_with: dict[str, Any] = {}  # options of Popen: the user, the environment
        folder = self._kept or Path(tempfile.mkdtemp(prefix=f"{self.name.lower()}-"))
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.watchdog = subprocess.Popen(
            [sys.executable, "-c", WATCHDOG, "" if self._kept else str(self.folder)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._prepare()
        port_file = self.folder / "port"  # A kept server keeps its port: a replica set knows its members by it.
        for attempt in range(5):
            self.port = int(port_file.read_text()) if attempt == 0 and port_file.exists() else find_free_port()
            try:
                self.start()
                break
            except StoreUnavailable as error:  # Another program may take the port before we do.
                if attempt == 4 or "in use" not in str(error):
                    raise
        port_file.write_text(str(self.port))
        self.url = self._url()

    def _password(self) -> str:
        file = self.folder / "password"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(16))
        return file.read_text()

    def _signal(self, number: signal.Signals) -> None:
        self._refuse_if_given()
        if self.process is None:
            return
        # Each PostgreSQL process has its own process group, so there is no group to signal.
        main = psutil.Process(self.process.pid)
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT):
            main.send_signal(number)
            return
        if number != signal.SIGCONT:
            main.send_signal(signal.SIGSTOP)  # Now it starts no more children while we list them.
        everyone = [*main.children(recursive=True), main]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGKILL:
            # A process that is writing to the disk dies a moment later. PostgreSQL does not start while one is left.
            deadline = time.monotonic() + PATIENCE
            while any(map(is_alive, everyone)):
                if time.monotonic() > deadline:
                    raise StoreUnavailable(f"{self.name} is still running {PATIENCE:g} s after a kill -9.")
                time.sleep(0.001)

    def _reap(self, wait: float = 0) -> None:
        if self.process:
            try:
                self.process.wait(wait or 0.1)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait()
            self.process = None
            self.tell_watchdog(0)

    def tell_watchdog(self, word: int | str) -> None:
        if self.watchdog and self.watchdog.stdin:
            with contextlib.suppress(BrokenPipeError):  # The watchdog was killed.
                self.watchdog.stdin.write(f"{word}\n")
                self.watchdog.stdin.flush()

    def _listens(self) -> bool:
        """Tell whether the port is ours. Another server may have taken it first, and would answer instead of ours."""
        with contextlib.suppress(psutil.Error):
            for each in psutil.Process(self.process.pid).net_connections("tcp4") if self.process else []:
                if each.status == psutil.CONN_LISTEN and each.laddr.port == self.port:
                    return True
        return False

    def _refuse_if_given(self) -> None:
        if self._given:
            raise ConfigurationError(f"The server of {self.variable} is not ours, so we do not start or stop it.")

    @abstractmethod
    def _prepare(self) -> None:
        """Make the data folder and the certificates, once."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    @abstractmethod
    def _url(self) -> str: ...


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process is alive. A zombie is not: it holds nothing, and some containers never collect it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def find_free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])
