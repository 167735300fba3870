"""Looks for a secret in bytes: in windows of 16 bytes, as it is, in base64, in hex and as JSON escapes it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

WINDOW = 16


def forms(secret: str) -> Iterator[bytes]:
    """Every form in which the secret may lie somewhere, long enough to be its own."""
    raw = secret.encode()
    yield raw
    yield json.dumps(secret)[1:-1].encode()
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for shift in range(3):  # base64 looks different for each of the three places in a group that a text may start at
        whole = raw[shift : len(raw) - (len(raw) - shift) % 3]
        yield base64.b64encode(whole)
        yield base64.urlsafe_b64encode(whole)


def windows(secret: str) -> set[bytes]:
    return {form[at : at + WINDOW] for form in forms(secret) for at in range(max(1, len(form) - WINDOW + 1))}


def find(secret: str, haystack: bytes) -> set[bytes]:
    """The windows of the secret that are in there. A secret shorter than a window is looked for whole."""
    return {window for window in windows(secret) if window in haystack}


def files_with(secret: str, folder: Path) -> list[str]:
    """The files below the folder that hold a window of the secret."""
    return sorted(str(file) for file in folder.rglob("*") if file.is_file() and find(secret, file.read_bytes()))
