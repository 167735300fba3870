"""The repository, and a new Python process."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
VERSION_1 = ROOT / "tests" / "fixtures" / "version_1"
"""What version 1 of the package wrote."""
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(
    code: str, folder: Path, *, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A new Python process in this folder, with nothing of UPSTOX_* but what is given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
    environment = {**clean, "UPSTOX_DB_KEY_FILE": str(folder / "keys"), "no_proxy": "127.0.0.1", **environment}
    command = [str(python), "-W", "error", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=60)
