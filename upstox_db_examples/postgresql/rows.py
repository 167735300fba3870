"""Rows become tokens here, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ..core.token import StoredToken


def read_token(row: dict[str, Any]) -> StoredToken:
    return StoredToken(**to_utc(row))


def to_utc(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.astimezone(UTC) if isinstance(value, datetime) else value for name, value in row.items()}


def format_row(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row to what callers see: times become ISO text."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in to_utc(row).items()}
