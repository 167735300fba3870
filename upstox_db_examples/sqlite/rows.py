"""Rows become tokens here, and tokens become columns."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from ..core.token import StoredToken, fields_of_token

_TIMES = ("created_at", "expires_at", "last_used_at", "issued_at")
_JSON = ("products", "exchanges", "metadata")


def columns_of(token: StoredToken) -> dict[str, object]:
    """Convert a token to columns: times become seconds, lists and dicts become JSON."""
    columns: dict[str, object] = fields_of_token(token)
    for name in _TIMES:
        if columns[name] is not None:
            columns[name] = to_seconds(getattr(token, name))
    for name in _JSON:
        columns[name] = json.dumps(columns[name])
    return columns


def read_token(row: Iterable[Any]) -> StoredToken:
    # In the order of the columns in queries.FIND. Every read comes through here, and looking up columns by name takes
    # twice as long.
    (
        token_id,
        user_id,
        ciphertext,
        key_id,
        generation,
        created_at,
        expires_at,
        user_name,
        email,
        used,
        account,
        mark,
    ) = row
    return StoredToken(
        user_id,
        ciphertext or "",
        key_id,
        generation,
        datetime.fromtimestamp(created_at, UTC),
        datetime.fromtimestamp(expires_at, UTC),
        user_name,
        email,
        account=account,
        token_id=token_id,
        usage_count=used,
        in_doubt=mark is not None,
    )


def read_known(row: sqlite3.Row) -> StoredToken:
    """Read a token with more than a reader needs: when Upstox issued it."""
    *handed_out, issued_at = row
    token = read_token(handed_out)
    token.issued_at = None if issued_at is None else to_moment(issued_at)
    return token


def read_every_column(row: sqlite3.Row) -> StoredToken:
    """Read a token with all its columns."""
    columns = {name: row[name] for name in row.keys()}  # noqa: SIM118  # Iterating over a Row gives its values.
    columns["in_doubt"] = bool(columns["in_doubt"])
    for name in _TIMES:
        columns[name] = None if columns[name] is None else to_moment(columns[name])
    for name in _JSON:
        columns[name] = json.loads(columns[name])
    return StoredToken(**columns)


def format_row(row: sqlite3.Row) -> dict[str, Any]:
    """Convert a row to what callers see: times become ISO text."""
    times = (
        "created_at",
        "expires_at",
        "last_used_at",
        "performed_at",
        "token_created",
        "last_generation",
        "last_usage",
    )
    return {
        name: datetime.fromtimestamp(row[name], UTC).isoformat()
        if name in times and row[name] is not None
        else row[name]
        for name in row.keys()  # noqa: SIM118  # Iterating over a Row gives its values.
    }


def to_seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def to_moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
