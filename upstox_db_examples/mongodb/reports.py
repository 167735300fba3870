"""What the store tells about its users: history, statistics, audit trail, and their names."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, DESCENDING
from pymongo.database import Database

from ..core.token import AuditEntry
from .connection import Document
from .documents import format_record, format_value, not_revoked
from .lease import LONG_AGO


def read_history(db: Database[Document], user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
    names = ("created_at", "expires_at", "user_name", "email", "broker", "usage_count", "last_used_at")
    found = db.tokens.find({"user_id": user_id}, dict.fromkeys(names, 1))
    records = list(found.sort("generation", DESCENDING).limit(limit))
    active = db.active_tokens.find_one({"_id": user_id, "expires_at": {"$gt": now}, **not_revoked()}) or {}
    return [format_record(record, is_active=record["_id"] == active.get("token_id")) for record in records]


def read_statistics(db: Database[Document], user_id: str, now: datetime) -> dict[str, Any]:
    sums = {
        "total_tokens": {"$sum": 1},
        "total_usage": {"$sum": "$usage_count"},
        "avg_usage_per_token": {"$avg": "$usage_count"},
        "last_generation": {"$max": "$created_at"},
        "last_usage": {"$max": "$last_used_at"},
    }
    found = list(db.tokens.aggregate([{"$match": {"user_id": user_id}}, {"$group": {"_id": None, **sums}}]))
    active = db.active_tokens.count_documents({"_id": user_id, "expires_at": {"$gt": now}, **not_revoked()})
    names = ("total_tokens", "active_tokens", "total_usage", "avg_usage_per_token", "last_generation", "last_usage")
    totals = found[0] if found else {**dict.fromkeys(names, 0), "last_generation": None, "last_usage": None}
    totals["active_tokens"] = active
    return {name: format_value(totals[name]) for name in names}


def read_audit_trail(db: Database[Document], user_id: str, limit: int) -> list[dict[str, Any]]:
    # Read the records first: if an entry is moved meanwhile, we see it twice instead of missing it.
    inside = [e for record in db.tokens.find({"audit.user_id": user_id}, {"audit": 1}) for e in record["audit"]]
    order = [("performed_at", DESCENDING), ("_id", DESCENDING)]
    entries = {e["_id"]: e for e in [*inside, *db.token_audit.find({"user_id": user_id}).sort(order).limit(limit)]}
    newest = sorted(entries.values(), key=lambda e: (e["performed_at"], e["_id"]), reverse=True)[:limit]
    ids = {entry["token_id"] for entry in newest}
    created = {
        each["_id"]: each["created_at"] for each in db.tokens.find({"_id": {"$in": list(ids)}}, {"created_at": 1})
    }
    names = ("action", "performed_at", "actor", "metadata", "user_id", "token_id")
    return [
        {
            **{name: format_value(entry[name]) for name in names},
            "token_created": format_value(created.get(entry["token_id"])),
        }
        for entry in newest
    ]


def read_entries(db: Database[Document], user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
    place = (after.performed_at, after.position) if after else (LONG_AGO, ObjectId(bytes(12)))
    later = {"user_id": user_id, "performed_at": {"$gte": place[0]}}
    at_once: Document = {"performed_at": place[0], "_id": {"$lte": place[1]}}
    order = [("performed_at", ASCENDING), ("_id", ASCENDING)]
    # Read the records first, as in `read_audit_trail`.
    records = list(db.tokens.find({"user_id": user_id}, {"audit": 1, "generation": 1}))
    found = list(db.token_audit.find({**later, "$nor": [at_once]}).sort(order).limit(limit))
    generations = {record["_id"]: record["generation"] for record in records}
    inside = [entry for record in records for entry in record["audit"]]
    entries = {e["_id"]: e for e in [*inside, *found] if (e["performed_at"], e["_id"]) > place}
    return [
        AuditEntry(e["action"], e["actor"], e["performed_at"], e["metadata"], generations.get(e["token_id"]), e["_id"])
        for e in sorted(entries.values(), key=lambda e: (e["performed_at"], e["_id"]))[:limit]
    ]


def read_users(db: Database[Document], after: str, limit: int) -> list[str]:
    # Not `distinct`: its answer has at most 16 MB, which is half a million users. A user with many entries fills one
    # answer, and the next one begins after that user.
    which: Document = {"user_id": {"$gt": after}}
    found = [
        [each["user_id"] for each in documents.find(which, {"_id": 0, "user_id": 1}).sort("user_id").limit(limit)]
        for documents in (db.tokens, db.token_audit)
    ]
    # Beyond the end of a full answer there may be more.
    ends = [users[-1] for users in found if len(users) == limit]
    return sorted({user for users in found for user in users if all(user <= end for end in ends)})[:limit]
