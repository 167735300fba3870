"""`make lab` opens JupyterLab without a question."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

from ..support.project import ROOT


def answer(url: str, process: subprocess.Popen[bytes]) -> dict[str, object]:
    """Return the JSON at this URL, once JupyterLab has started."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url) as got:
                return dict(json.load(got))
        except URLError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_it_does_not_ask_whether_to_fetch_news(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    options = f"--no-browser --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --IdentityProvider.token={token}"
    binaries = f"BIN={Path(sys.executable).parent}"
    command = ["make", "-o", ".venv/all", binaries, f"LAB_OPTIONS={options}", "lab"]
    environment = {**os.environ, "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet, start_new_session=True
    ) as process:
        try:
            settings = f"http://127.0.0.1:{port}/lab/api/settings"
            got = answer(f"{settings}/@jupyterlab/apputils-extension:notification?token={token}", process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    schema = got["schema"]
    assert isinstance(schema, dict)
    assert schema["properties"]["fetchNews"]["default"] == "false"
