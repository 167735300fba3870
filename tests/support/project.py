"""The repository, and new Python processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
VERSION_1 = ROOT / "tests" / "fixtures" / "version_1"
"""The files that version 1 of the package wrote."""
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(
    code: str, folder: Path, *, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python process in this folder. Only the given UPSTOX_* variables are set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UPSTOX_")}
    environment = {**clean, "UPSTOX_DB_KEY_FILE": str(folder / "keys"), "no_proxy": "127.0.0.1", **environment}
    command = [str(python), "-W", "error", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=60)
