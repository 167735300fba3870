"""Three replicas of a program: by `docker compose` where it and the program's image are, otherwise as processes."""

from __future__ import annotations

import base64
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import urlsplit

import yaml

from recipes.playground import ROOT, USER, Playground, playground
from upstox_db_examples import KeyRing

from .databases import docker_answers, notes

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "compose.yaml").read_text())
IMAGE = "python:3.13-slim"  # of compose.yaml
# A store's token goes to this machine itself, or by TLS. So each container's own address leads to the local Upstox.
HOST = "host.docker.internal"
FORWARD = """
import asyncio, sys
host, port = sys.argv[1], int(sys.argv[2])

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def forward(reader, writer):
    there = await asyncio.open_connection(host, port)
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

async def main():
    async with await asyncio.start_server(forward, "127.0.0.1", port) as server:
        await server.serve_forever()

asyncio.run(main())
"""


class Replicas(NamedTuple):
    here: Playground
    urls: list[str]
    printed: Callable[[], str]


@contextmanager
def replicas(postgres_url: str, folder: Path) -> Iterator[Replicas]:
    """Start the program of compose.yaml three times, and a local Upstox that it logs in to.

    Args:
        postgres_url: the database for processes. Compose starts its own.
        folder: an empty folder.
    """
    missing = _missing()
    if missing:
        notes.append(f"Ran on Compose: not at all; three processes instead, because {missing}")
        python, m, *command = COMPOSE["services"]["program"]["command"]
        assert (python, m) == ("python", "-m")
        command = [{"0.0.0.0": "127.0.0.1", "8000": "PORT"}.get(part, part) for part in command]
        with playground(postgres_url) as here:
            yield Replicas(here, [here.serve(*command) for _ in range(3)], here.printed)
    else:
        notes.append(f"Ran on Compose: {COMPOSE['services']['database']['image']} and {IMAGE}")
        # The containers reach this machine's Upstox by the network of Docker.
        with playground(host="0.0.0.0") as here, _composed(here, folder) as printed:
            urls = [f"http://127.0.0.1:{port}" for port in (8000, 8001, 8002)]
            here.wait_until(lambda: all(here.answers(f"{url}/health") for url in urls))
            yield Replicas(here, urls, printed)


def _missing() -> str:
    """Return what is missing for Compose, or an empty text."""
    if not docker_answers():
        return "Docker gives no answer"
    if not _succeeds("docker", "compose", "version"):
        return "there is no `docker compose`"
    if not _succeeds("docker", "image", "inspect", IMAGE) and not _succeeds("docker", "pull", "--quiet", IMAGE):
        return f"no registry has {IMAGE}"
    return ""


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextmanager
def _composed(here: Playground, folder: Path) -> Iterator[Callable[[], str]]:
    """Run compose.yaml in a copy of what it builds from, and yield a function that returns what was printed.

    A second file says only how to reach this machine.
    """
    from testcontainers.compose import DockerCompose

    for name in ("LICENSE", "README.md", "pyproject.toml", ".dockerignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("recipes", "upstox_db_examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = {"extra_hosts": [f"{HOST}:host-gateway"]}
    (folder / "recipes" / "local.yaml").write_text(yaml.safe_dump({"services": {"program": program}}))
    variables = {
        **here.account.environ(),
        "UPSTOX_USER_ID": USER,
        "UPSTOX_BASE_DOMAIN": here.upstox.base_domain,
        "UPSTOX_API": here.api,
        "UPSTOX_DB_KEYS": base64.b64encode(KeyRing.new_key()).decode(),
        "POSTGRES_PASSWORD": secrets.token_hex(16),
    }
    (folder / "upstox.env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    files = ["recipes/compose.yaml", "recipes/local.yaml"]
    compose = DockerCompose(folder, files, env_file="upstox.env", build=True)
    # The default name is that of the folder, and the user may run the recipe on this machine.
    with patch.dict("os.environ", COMPOSE_PROJECT_NAME=folder.name.lower().replace("_", "-")):
        try:
            with compose:
                port = str(urlsplit(here.api).port)
                for number in ("1", "2", "3"):
                    inside = ["exec", "--detach", "--index", number, "program", "python", "-c", FORWARD, HOST, port]
                    subprocess.run([*compose.compose_command_property, *inside], cwd=folder, check=True)
                yield lambda: "".join(compose.get_logs())
        finally:
            clean = [*compose.compose_command_property, "down", "--volumes", "--rmi", "local"]
            subprocess.run(clean, cwd=folder, capture_output=True, check=False)
