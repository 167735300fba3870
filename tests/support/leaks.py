"""Look for a secret: in an error, and in bytes, by windows of 16 bytes, in base64, in hex and as JSON escapes it."""

from __future__ import annotations

import base64
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from upstox_db_examples.local.upstox import Account

WINDOW = 16
PRINTABLE = re.compile(rb"[ -~]{%d,}" % WINDOW)


def forms(secret: str | bytes) -> Iterator[bytes]:
    """Every printable form in which the secret may lie somewhere; of bytes, such as a key, as Python shows them."""
    raw = secret.encode() if isinstance(secret, str) else secret
    if isinstance(secret, str):
        yield raw
        yield json.dumps(secret)[1:-1].encode()
    else:
        yield repr(secret)[2:-1].encode()
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for shift in range(3):  # base64 looks different for each of the three places in a group that a text may start at
        whole = raw[shift : len(raw) - (len(raw) - shift) % 3]
        yield base64.b64encode(whole)
        yield base64.urlsafe_b64encode(whole)


def windows(secret: str | bytes) -> set[bytes]:
    return {form[at : at + WINDOW] for form in forms(secret) for at in range(max(1, len(form) - WINDOW + 1))}


def find(secrets: str | Iterable[str | bytes], haystack: bytes) -> set[bytes]:
    """The windows of the secrets that are in there. A secret shorter than a window, and raw bytes, are sought whole."""
    each = [secrets] if isinstance(secrets, str) else list(secrets)
    sought = set[bytes]().union(*map(windows, each))
    short = {raw for raw in each if isinstance(raw, bytes) and raw in haystack}
    short |= {window for window in sought if len(window) < WINDOW and window in haystack}
    # Each form of a secret is printable, and databases are mostly not: so the runs of printable bytes are enough.
    return short | {
        window
        for run in PRINTABLE.findall(haystack)
        for at in range(len(run) - WINDOW + 1)
        if (window := run[at : at + WINDOW]) in sought
    }


def files_with(secrets: str | Iterable[str | bytes], folder: Path) -> list[str]:
    """The files below the folder that hold a window of a secret."""
    each = [secrets] if isinstance(secrets, str) else list(secrets)
    return sorted(str(file) for file in folder.rglob("*") if file.is_file() and find(each, file.read_bytes()))


def shown_with_locals(error: BaseException) -> str:
    """The error, its causes and contexts with all local variables, as `pytest --showlocals` would print them.

    The frames of the tests are left out: they hold the secret that is looked for.
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
