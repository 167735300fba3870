"""Search errors and bytes for a secret, in windows of 16 bytes: as text, in base64, in hex and escaped as in JSON."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from upstox_db_examples.local.upstox import Account

WINDOW, PART = 16, 8
PRINTABLE = re.compile(rb"[ -~]{%d,}" % WINDOW)


def forms(secret: str | bytes) -> Iterator[bytes]:
    """Yield every printable form in which the secret may appear. Secret bytes also appear as Python shows them."""
    raw = secret.encode() if isinstance(secret, str) else secret
    if isinstance(secret, str):
        yield raw
        yield json.dumps(secret)[1:-1].encode()
    else:
        yield repr(secret)[2:-1].encode()
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    # base64 looks different for each of the three positions within a group at which a text can start.
    for shift in range(3):
        whole = raw[shift : len(raw) - (len(raw) - shift) % 3]
        yield base64.b64encode(whole)
        yield base64.urlsafe_b64encode(whole)


def windows(secret: str | bytes) -> set[bytes]:
    return {form[at : at + WINDOW] for form in forms(secret) for at in range(max(1, len(form) - WINDOW + 1))}


@functools.cache
def _to_be_found(secrets: tuple[str | bytes, ...]) -> tuple[set[bytes], set[bytes]]:
    """Return the windows of the secrets, and all parts of them."""
    sought = set[bytes]().union(*map(windows, secrets))
    return sought, {window[at : at + PART] for window in sought for at in range(len(window) - PART + 1)}


def find(secrets: str | Iterable[str | bytes], haystack: bytes) -> set[bytes]:
    """Return the windows of the secrets that are in there. Short secrets and raw bytes are searched for as a whole."""
    each = [secrets] if isinstance(secrets, str) else list(secrets)
    sought, parts = _to_be_found(tuple(each))
    short = {raw for raw in each if isinstance(raw, bytes) and raw in haystack}
    short |= {window for window in sought if len(window) < WINDOW and window in haystack}
    # Every form of a secret is printable, and most of a database is not. So it is enough to search the printable runs.
    # Each window has a part of eight bytes at a multiple of eight, so it is enough to look closely around such parts.
    return short | {
        window
        for run in PRINTABLE.findall(haystack)
        for near in range(0, len(run) - PART + 1, PART)
        if run[near : near + PART] in parts
        for at in range(max(0, near - WINDOW + PART), min(near, len(run) - WINDOW) + 1)
        if (window := run[at : at + WINDOW]) in sought
    }


def files_with(secrets: str | Iterable[str | bytes], folder: Path) -> list[str]:
    """Return the files below the folder that contain a window of a secret."""
    each = [secrets] if isinstance(secrets, str) else list(secrets)
    return sorted(str(file) for file in folder.rglob("*") if file.is_file() and find(each, content(file)))


def content(file: Path) -> bytes:
    """Return what is in the file, without the room at its end that a database reserves in megabytes of zeros.

    Some zeros stay, because the bytes of a key may end with zeros as well.
    """
    return file.read_bytes().rstrip(b"\0") + bytes(WINDOW * 2)


def shown_with_locals(error: BaseException) -> str:
    """Return the error with its causes and contexts and all local variables, as `pytest --showlocals` would print them.

    Frames of the tests are left out, because they hold the secret that is being searched for.
    """
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    chain: list[traceback.TracebackException] = [shown]
    for link in chain:
        link.stack[:] = [frame for frame in link.stack if f"{os.sep}tests{os.sep}" not in frame.filename]
        chain += [nested for nested in (link.__cause__, link.__context__) if nested]
    return "".join(shown.format()) + repr(error.args)


def secrets_of(account: Account) -> list[str]:
    return [value for name, value in account.credentials().items() if name not in ("redirect_uri",)]


def assert_shows_nothing(error: BaseException, account: Account) -> None:
    shown = shown_with_locals(error)
    assert [secret for secret in secrets_of(account) if secret in shown] == []
    assert "eyJ" not in shown
    assert error.__cause__ is None
    assert error.__context__ is None
