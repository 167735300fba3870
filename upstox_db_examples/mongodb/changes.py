"""The writes that take several steps. Each is safe to interrupt between two steps, and to repeat."""

from __future__ import annotations

from datetime import datetime

from bson import ObjectId
from pymongo import ASCENDING, DESCENDING, UpdateOne
from pymongo.database import Database
from pymongo.errors import BulkWriteError, DuplicateKeyError

from ..core.errors import StoreUnavailable
from ..core.token import StoredToken
from .connection import Document, index_keys
from .documents import ATTEMPTS, FIRST_ENTRY, GENERATION_KEYS, NOT_ACTIVE, active_of, is_free, record_of
from .lease import SOON
from .logins import RUNNING_NOTES


def take_over(db: Database[Document], record: Document, now: datetime) -> ObjectId | None:
    """Overwrite a record of the same generation whose writer was interrupted. Return its id, or None.

    The life cycle retries after a lost connection, and must not fail because of its own first attempt. If the other
    writer is only slow, one of the two gets to the swap first, and the other one finds out there.
    """
    there = db.tokens.find_one({name: record[name] for name in GENERATION_KEYS}, FIRST_ENTRY)
    active = db.active_tokens.find_one({"_id": record["user_id"]}) or NOT_ACTIVE
    if there is None or not is_free(there, active, now):
        return None
    token_id: ObjectId = there["_id"]
    (created,) = record["audit"]  # goes after that writer's entries: nothing leaves the audit trail
    values = {name: value for name, value in record.items() if name not in ("_id", "audit")}
    change = {"$set": values, "$push": {"audit": {**created, "token_id": token_id}}}
    which = {"_id": token_id, "is_active": True, "usage_count": 0, "audit.0": {"$exists": True}}
    return token_id if db.tokens.update_one(which, change).matched_count else None


def swap(db: Database[Document], user_id: str, active: Document) -> tuple[Document | None, bool]:
    """Make this the user's active token. Return what was there before, and whether it worked.

    It does not work if there is a token of this generation or a later one.
    """
    earlier = {"_id": user_id, "generation": {"$lt": active["generation"]}}
    for _ in range(ATTEMPTS):
        try:
            return db.active_tokens.find_one_and_replace(earlier, active, upsert=True), True
        except DuplicateKeyError as error:
            if index_keys(error) != ("_id",):
                raise
        # The user has a document, but not one of an earlier token. Either it is of a later token, or another writer or
        # the TTL changed it just now.
        there = db.active_tokens.find_one({"_id": user_id}, {"generation": 1})
        if there and there["generation"] >= active["generation"]:
            return None, False
    raise StoreUnavailable(
        f"The token of {user_id} was replaced {ATTEMPTS} times while this one was being stored. Try again."
    )


def find_newest(db: Database[Document], user_id: str) -> tuple[list[Document], Document]:
    """Return the user's latest records, latest first, and the document of the active token, in one message.

    The order matters: otherwise a token that becomes active in between would look like one that never did.
    """
    found = list(
        db.tokens.aggregate(
            [
                {"$match": {"user_id": user_id}},
                {"$sort": {"generation": DESCENDING}},
                {"$limit": ATTEMPTS},
                {"$set": {"audit": {"$slice": ["$audit", 1]}}},  # A record may have a hundred audit entries.
                {"$unionWith": {"coll": "active_tokens", "pipeline": [{"$match": {"_id": user_id}}]}},
            ]
        )
    )
    return [each for each in found if "user_id" in each], next((e for e in found if e["_id"] == user_id), NOT_ACTIVE)


def find_earlier(db: Database[Document], token: StoredToken) -> tuple[list[Document], list[str]]:
    """Return the user's earlier records that are still marked as active, and the notes of the running logins."""
    earlier = {"user_id": token.user_id, "is_active": True, "generation": {"$lt": token.generation}}
    found = list(
        db.tokens.aggregate(
            [
                {"$match": earlier},
                {"$sort": {"generation": ASCENDING}},
                {"$project": {"audit": 1}},
                {"$unionWith": {"coll": "login_notes", "pipeline": [{"$match": RUNNING_NOTES}]}},
            ]
        )
    )
    return [each for each in found if "audit" in each], [each["sealed"] for each in found if "sealed" in each]


def find_dead(db: Database[Document], now: datetime, limit: int) -> dict[ObjectId, str]:
    """Return the records of dead tokens that are still marked active, and their users."""
    found = db.tokens.find({"is_active": True, "expires_at": {"$lte": now}}, {"user_id": 1})
    return {each["_id"]: each["user_id"] for each in found.sort("expires_at").limit(limit)}


def merge_records(db: Database[Document], tokens: list[StoredToken]) -> None:
    """Put records in, without ciphertexts. In an existing record the uses only grow, and an ended one stays ended."""
    changes = []
    for token in tokens:
        record = record_of(token)
        which = {name: record.pop(name) for name in ("user_id", "generation")}
        uses = {name: record.pop(name) for name in ("usage_count", "last_used_at")}
        grown = {"$max": uses, "$min": {"is_active": bool(token.ciphertext)}}
        changes.append(UpdateOne(which, {"$setOnInsert": {**record, "audit": []}, **grown}, upsert=True))
    if changes:
        db.tokens.bulk_write(changes)


def make_active(db: Database[Document], token: StoredToken) -> None:
    if db.active_tokens.find_one({"_id": token.user_id, "generation": token.generation}, {"_id": 1}):
        return  # It is active already, or was until it was revoked.
    record = db.tokens.find_one({"user_id": token.user_id, "generation": token.generation}, {"_id": 1}) or {}
    active = active_of(token, record["_id"])
    if token.in_doubt:
        active["login"] = {}
    db.active_tokens.replace_one({"_id": token.user_id, "generation": {"$lt": token.generation}}, active, upsert=True)


def end_records(db: Database[Document], entries: list[Document]) -> int:
    """End the records of these audit entries' tokens. Return how many were active until now.

    Of its writes only one is waited for, that of the entries into the audit trail: it brings the earlier ones along.
    """
    ending = [
        UpdateOne({"_id": e["token_id"], "is_active": True}, {"$set": {"is_active": False}, "$push": {"audit": e}})
        for e in entries
    ]
    ended = db.tokens.with_options(write_concern=SOON).bulk_write(ending, ordered=False).modified_count
    move_audit(db, [entry["token_id"] for entry in entries])
    return ended


def end_record(db: Database[Document], record: Document, entry: Document) -> None:
    """End this record with this audit entry, if it is still active. `end_records` takes more messages."""
    which, ending = {"_id": record["_id"], "is_active": True}, {"$set": {"is_active": False}, "$push": {"audit": entry}}
    if db.tokens.with_options(write_concern=SOON).update_one(which, ending).matched_count:
        # A use that was counted since we read the record stays there. The entries of a record are shown, too.
        _move_entries(db, [{**record, "audit": [*record["audit"], entry]}])


def move_audit(db: Database[Document], token_ids: list[ObjectId]) -> None:
    """Move audit entries from the records to their own collection. It is safe to repeat after an interruption."""
    records = list(db.tokens.find({"_id": {"$in": token_ids}, "audit.0": {"$exists": True}}, {"audit": 1}))
    if records:
        _move_entries(db, records)


def _move_entries(db: Database[Document], records: list[Document]) -> None:
    try:
        db.token_audit.insert_many([entry for record in records for entry in record["audit"]], ordered=False)
    except BulkWriteError as error:
        if any(fault["code"] != 11000 for fault in error.details["writeErrors"]):
            raise
    # If this is lost, the entries are in both places, and are shown once.
    db.tokens.with_options(write_concern=SOON).bulk_write(
        [
            UpdateOne(
                {"_id": record["_id"]},
                {"$pull": {"audit": {"_id": {"$in": [entry["_id"] for entry in record["audit"]]}}}},
            )
            for record in records
        ],
        ordered=False,
    )
