"""Documents become tokens here, and tokens become documents."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bson import ObjectId

from ..core.token import StoredToken, fields_of_token
from .connection import Document

ATTEMPTS = 10  # to read or write while the token is being replaced or a login is ending
# The fields that are in `active_tokens` and not in the token's record, and those that are in both.
ONLY_ACTIVE = ("ciphertext", "key_id")
IN_BOTH = ("generation", "created_at", "expires_at", "account", "issued_at")
NOT_KEPT = ("token_id", "source", "in_doubt")
GENERATION_KEYS = ("user_id", "generation")  # of the unique index that keeps two writers apart
FIRST_ENTRY = {"audit": {"$slice": 1}}  # A record may have a hundred audit entries.
NOT_ACTIVE: Document = {"token_id": None, "generation": float("-inf")}  # stands in for a missing document


def not_revoked() -> Document:
    """Match documents that are not revoked."""
    return {"ciphertext": {"$exists": True}}


def read_active(active: Document, **more: Any) -> StoredToken:
    """Return the token of this document. Its ciphertext is empty if it was revoked."""
    known = {name: active.get(name, "") for name in ONLY_ACTIVE}
    # Version 1 did not store all of these here, and bound no ciphertext to an account.
    known |= {name: active.get(name) for name in IN_BOTH}
    return StoredToken(
        user_id=active["_id"], token_id=str(active["token_id"]), in_doubt="login" in active, **known, **more
    )


def read_record(record: Document, active: Document, **more: Any) -> StoredToken:
    """Return the token of this record, with a ciphertext if it is the user's active one."""
    known = {name: value for name, value in record.items() if name not in ("_id", "is_active", "audit")}
    held = active if record["_id"] == active["token_id"] and "ciphertext" in active else {}
    # The fields that the ciphertext is bound to come from beside it, whatever the record says. (Version 1 bound it to
    # no account.)
    known |= dict.fromkeys(ONLY_ACTIVE, "") | {name: held[name] for name in (*ONLY_ACTIVE, *IN_BOTH) if name in held}
    return StoredToken(**known, **more, in_doubt="login" in held)


def is_cut_off(record: Document, active: Document, now: datetime) -> bool:
    """Tell whether its writer was interrupted, or is still busy, before the swap. Nothing points to the record."""
    return bool(record["is_active"] and record["generation"] > active["generation"] and record["expires_at"] > now)


def is_free(record: Document, active: Document, now: datetime) -> bool:
    """Tell whether another login may take this record and its generation, because its own login was interrupted.

    A record from a migration is not free; it has no audit entry. A used record is not free either: it was active once.
    """
    return is_cut_off(record, active, now) and bool(record["audit"]) and not record["usage_count"]


def record_of(token: StoredToken) -> Document:
    """Return what a record keeps of a token."""
    return {name: value for name, value in fields_of_token(token).items() if name not in (*ONLY_ACTIVE, *NOT_KEPT)}


def active_of(token: StoredToken, token_id: ObjectId) -> Document:
    """Return the document that makes this the user's active token."""
    return {"token_id": token_id, **{name: getattr(token, name) for name in (*ONLY_ACTIVE, *IN_BOTH)}}


def format_record(record: Mapping[str, Any], *, is_active: bool) -> dict[str, Any]:
    """Convert a record to what callers see, ready for JSON."""
    named = {"token_id" if name == "_id" else name: format_value(value) for name, value in record.items()}
    return {**named, "is_active": is_active}


def format_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, ObjectId) else value
