"""Pattern 3: MongoDB with a TTL. What is dangerous disappears by itself, what is history stays."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from typing import Any, Unpack

from bson import ObjectId
from pymongo import ASCENDING, DESCENDING, ReturnDocument, UpdateOne
from pymongo.database import Database
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError

from .checks import require_aware, require_positive
from .errors import InvalidInput, LoginSuperseded, StorageError, StoreUnavailable
from .mongodb_connection import Document, MongoDBConnection
from .mongodb_lease import LONG_AGO, Leases
from .mongodb_schema import make_collections
from .storage import Options, TokenStorage
from .token import AuditEntry, Secret, StoredToken

logger = logging.getLogger(__name__)

MOVE_AFTER = 100  # uses; until then their audit entries stay inside the token's record
ATTEMPTS = 5  # at a read while the token is being replaced


class MongoUpstoxStorage(TokenStorage):
    """Tokens in MongoDB 6.0 or newer, a replica set or a single server.

    Three collections. `active_tokens` has one document a user, whose `_id` is the user's id: the ciphertext. A TTL
    index removes it when the token dies. `tokens` has one record a token, without the ciphertext, and inside it the
    audit entries of its last uses; older entries are in `token_audit`.

    The token changes by one atomic change of the one document in `active_tokens`. What stands around it is written
    before or can be made up for later, so a client or a server that dies between two writes leaves nothing wrong, and
    no transaction is needed. Each write is acknowledged when a majority of the replica set has it in its journal. A
    single server has it in its own journal; there the driver does not retry a write whose answer was lost.

    Args:
        connection_string: a `mongodb://` or `mongodb+srv://` URL, as `pymongo.MongoClient` takes it.
        database_name: the database.
        timeout: seconds for the answers of each step, elections of a new primary included: a read is one step, a
            login a few.
        lease: seconds after which another caller may log a user in whose login's process has died. A login that takes
            longer keeps its lease.
        options: see `Options`.

    Raises:
        ConfigurationError: the URL or the database is not usable.
        StoreUnavailable: the server cannot be reached.
    """

    _kind = "access token in MongoDB"

    def __init__(
        self,
        connection_string: str,
        database_name: str = "upstox_db",
        *,
        timeout: float = 5.0,
        lease: float = 10.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        require_positive("timeout", timeout)
        require_positive("lease", lease)
        url = Secret(connection_string)
        del connection_string  # A traceback that prints local variables must not show its password.
        self._connection = MongoDBConnection(url, database_name, timeout)
        self._database = self._connection.database
        self._leases = Leases(self._database, lease)
        # As in the guide, nobody has to close a store.
        weakref.finalize(self, self._connection.close)
        self.init_database()

    def init_database(self) -> None:
        """Make the collections, their validators and indexes. Safe to repeat and to run at once."""
        with self._database() as db:
            make_collections(db, self._connection.where)

    def get_user_dashboard(self, user_id: str) -> dict[str, Any]:
        """All about a user in one JSON-friendly dict, without the token.

        Returns:
            `user_id`; `statistics` (`total_tokens`, `active_tokens`, `total_usage`, `avg_usage`, `last_generation`,
            `last_usage`); `recent_activity`, the last ten audit entries; `active_token` (`exists`, `expires_at`,
            `usage_count`). Times are ISO text in UTC. An unknown user has zeros, None and an empty list.
        """
        statistics = self.get_user_statistics(user_id)
        statistics["avg_usage"] = statistics.pop("avg_usage_per_token")
        # From the document that leads to it, and not the newest record: that one may be on its way.
        with self._database() as db:
            active = db.active_tokens.find_one({"_id": user_id, "expires_at": {"$gt": self._now()}, **_held()})
            record = db.tokens.find_one({"_id": active["token_id"]}, {"usage_count": 1}) if active else None
        return {
            "user_id": user_id,
            "statistics": statistics,
            "recent_activity": self.get_audit_trail(user_id, limit=10),
            "active_token": {
                "exists": active is not None,
                "expires_at": active["expires_at"].isoformat() if active else None,
                "usage_count": record["usage_count"] if record else 0,
            },
        }

    def get_tokens_by_timeframe(self, start_date: datetime, end_date: datetime) -> list[dict[str, Any]]:
        """The records of all tokens made from `start_date` to `end_date`, both included, newest first.

        Args:
            start_date, end_date: aware datetimes.

        Raises:
            InvalidInput: one has no time zone, or they are in the wrong order.
        """
        start, end = require_aware(start_date, "start_date"), require_aware(end_date, "end_date")
        if start > end:
            raise InvalidInput("start_date must not be later than end_date.")
        made = {"created_at": {"$gte": start, "$lte": end}}
        with self._database() as db:
            records = list(db.tokens.find(made, {"audit": 0}).sort("created_at", DESCENDING))
            users = {record["user_id"] for record in records}
            active = {each["token_id"] for each in db.active_tokens.find({"_id": {"$in": list(users)}, **_held()})}
        now = self._now()
        return [_shown(record, is_active=record["_id"] in active and record["expires_at"] > now) for record in records]

    def close(self) -> None:
        self._connection.close()

    def __repr__(self) -> str:
        return f"MongoUpstoxStorage({self._connection.where})"

    # Reading and writing

    def _find(self, user_id: str, alive_after: datetime, now: datetime) -> StoredToken | None:
        entry = self._entry(user_id, "used", now)
        use = {"$inc": {"usage_count": 1}, "$set": {"last_used_at": now}, "$push": {"audit": entry}}
        shown = {"user_name": 1, "email": 1, "usage_count": 1}
        with self._database() as db:
            for _ in range(ATTEMPTS):
                # The TTL runs once a minute: until then, only this filter keeps a dead token back.
                active = db.active_tokens.find_one({"_id": user_id, "expires_at": {"$gt": alive_after}, **_held()})
                if active is None:
                    return None
                entry["token_id"] = active["token_id"]
                record = db.tokens.find_one_and_update(
                    {"_id": active["token_id"], "is_active": True}, use, shown, return_document=ReturnDocument.AFTER
                )
                if record is not None:
                    if record["usage_count"] % MOVE_AFTER == 0:
                        try:
                            _move_audit(db, [active["token_id"]])
                        except PyMongoError as error:  # They are as good inside the record; the next one tries.
                            logger.warning("Audit entries stay in their record (%s)", type(error).__name__)
                    return _token(active, **{name: record.get(name) for name in shown})
                # Between the two it was replaced or revoked: look again.
        raise StoreUnavailable(f"{self._connection.where} has no record in which to count this use. Store a new token.")

    def _insert(self, token: StoredToken) -> str:
        record = asdict(token)
        ciphertext, key_id = record.pop("ciphertext"), record.pop("key_id")
        token_id = record["_id"] = ObjectId()
        del record["token_id"], record["source"]
        reason = {"reason": "new_token_generated"}
        ended = self._entry(token.user_id, "deactivated", token.created_at, metadata=reason)
        created = self._entry(token.user_id, "created", token.created_at, token_id)
        active = {"token_id": token_id, "ciphertext": ciphertext, "key_id": key_id}
        active |= {name: record[name] for name in ("generation", "created_at", "expires_at")}
        try:
            with self._database() as db:
                self._leases.prove_held()
                # Until the next line has run, nothing leads to this record. Its generation is unique: whoever lost
                # the lease comes to an end here, or on the next line after a stop between the two.
                db.tokens.insert_one({**record, "is_active": True, "last_used_at": None, "audit": [created]})
                before = db.active_tokens.find_one_and_replace(
                    {"_id": token.user_id, "generation": {"$lt": token.generation}}, active, upsert=True
                )
        except StoreUnavailable as error:
            if isinstance(error.__cause__, DuplicateKeyError):
                raise LoginSuperseded(f"A newer login of {token.user_id} is stored. Read its token.") from error
            raise
        try:
            with self._database() as db:
                earlier = {"user_id": token.user_id, "is_active": True, "generation": {"$lt": token.generation}}
                for old in [each["_id"] for each in db.tokens.find(earlier, {"_id": 1}).sort("generation")]:
                    cut_off = before["ended"] if before and before["token_id"] == old and "ended" in before else None
                    _end(db, [{**(cut_off or ended), "token_id": old}])
                    ended = {**ended, "_id": ObjectId()}
        except StorageError as error:  # The token is stored. The next store makes up for this.
            logger.warning("The record of the earlier token of %s is still called active: %s", token.user_id, error)
        return str(token_id)

    def _revoke(self, user_id: str, now: datetime) -> bool:
        entry = self._entry(user_id, "revoked", now)
        with self._database() as db:
            # The document stays, empty, until its expiry: a login that was under way cannot slip in an older token.
            erased = db.active_tokens.find_one_and_update(
                {"_id": user_id, **_held()},
                {"$unset": {"ciphertext": 1, "key_id": 1}, "$set": {"ended": entry}},
            )
            # Or by one who was cut off here.
            held = erased or db.active_tokens.find_one({"_id": user_id, "ended": {"$exists": True}})
            if held:
                _end(db, [{**held.get("ended", entry), "token_id": held["token_id"]}])
        return erased is not None

    def _expire(self, now: datetime, limit: int) -> int:
        with self._database() as db:
            while records := _dead(db, now, limit):
                # Usually the TTL was here before. Else a revocation may have been cut off, and is told now.
                still_there = {"_id": {"$in": list(records.values())}, "token_id": {"$in": list(records)}}
                told = {each["token_id"]: each.get("ended", {}) for each in db.active_tokens.find(still_there)}
                db.active_tokens.delete_many(still_there)
                entries = {one: self._entry(user_id, "expired", now) for one, user_id in records.items()}
                if ended := _end(db, [{**e, **told.get(one, {}), "token_id": one} for one, e in entries.items()]):
                    return ended  # Else another cleanup was faster.
        return 0

    def _forget_entries(self, before: datetime, limit: int) -> int:
        old = {"performed_at": {"$lt": before}}
        with self._database() as db:
            # By the index on the few records that hold entries.
            holding = {"audit.user_id": {"$gte": ""}, "audit": {"$elemMatch": old}}
            inside = db.tokens.find(holding, {"_id": 1}).limit(limit)
            _move_audit(db, [record["_id"] for record in inside])
            ids = [entry["_id"] for entry in db.token_audit.find(old, {"_id": 1}).limit(limit)]
            return db.token_audit.delete_many({"_id": {"$in": ids}}).deleted_count if ids else 0

    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        with self._database() as db:
            db.token_audit.insert_one(self._entry(user_id, action, now, metadata=metadata))

    def _entry(
        self,
        user_id: str | None,
        action: str,
        now: datetime,
        token_id: ObjectId | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Document:
        """An audit entry. Its id is made here, so that writing it twice is noticed."""
        entry = {"_id": ObjectId(), "token_id": token_id, "user_id": user_id, "action": action}
        return {**entry, "actor": self._actor, "performed_at": now, "metadata": metadata or {}}

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return self._leases.held(name, self._login_wait)

    def _generation(self, user_id: str) -> int:
        with self._database() as db:
            newest = db.tokens.find_one({"user_id": user_id}, {"generation": 1}, sort=[("generation", DESCENDING)])
            # After a restore that was not of one moment the records may be behind.
            active = db.active_tokens.find_one({"_id": user_id}, {"generation": 1})
        return max(int(each["generation"]) if each else 0 for each in (newest, active))

    def _user_of_account(self, account: str) -> str | None:
        with self._database() as db:
            newest = [("created_at", DESCENDING), ("_id", DESCENDING)]
            record = db.tokens.find_one({"account": account}, {"user_id": 1}, sort=newest)
        return record["user_id"] if record else None

    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        names = ("created_at", "expires_at", "user_name", "email", "broker", "usage_count", "last_used_at")
        with self._database() as db:
            found = db.tokens.find({"user_id": user_id}, dict.fromkeys(names, 1))
            records = list(found.sort("generation", DESCENDING).limit(limit))
            active = db.active_tokens.find_one({"_id": user_id, "expires_at": {"$gt": now}, **_held()}) or {}
        return [_shown(record, is_active=record["_id"] == active.get("token_id")) for record in records]

    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        sums = {
            "total_tokens": {"$sum": 1},
            "total_usage": {"$sum": "$usage_count"},
            "avg_usage_per_token": {"$avg": "$usage_count"},
            "last_generation": {"$max": "$created_at"},
            "last_usage": {"$max": "$last_used_at"},
        }
        with self._database() as db:
            found = list(db.tokens.aggregate([{"$match": {"user_id": user_id}}, {"$group": {"_id": None, **sums}}]))
            active = db.active_tokens.count_documents({"_id": user_id, "expires_at": {"$gt": now}, **_held()})
        names = ("total_tokens", "active_tokens", "total_usage", "avg_usage_per_token", "last_generation", "last_usage")
        totals = found[0] if found else {**dict.fromkeys(names, 0), "last_generation": None, "last_usage": None}
        totals["active_tokens"] = active
        return {name: _text(totals[name]) for name in names}

    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        with self._database() as db:
            # First what is inside the records: an entry that is moved meanwhile is then seen twice, and not missed.
            inside = [e for record in db.tokens.find({"audit.user_id": user_id}, {"audit": 1}) for e in record["audit"]]
            order = [("performed_at", DESCENDING), ("_id", DESCENDING)]
            entries = {
                e["_id"]: e for e in [*inside, *db.token_audit.find({"user_id": user_id}).sort(order).limit(limit)]
            }
            newest = sorted(entries.values(), key=lambda e: (e["performed_at"], e["_id"]), reverse=True)[:limit]
            ids = {entry["token_id"] for entry in newest}
            created = {
                each["_id"]: each["created_at"]
                for each in db.tokens.find({"_id": {"$in": list(ids)}}, {"created_at": 1})
            }
        names = ("action", "performed_at", "actor", "metadata", "user_id", "token_id")
        return [
            {**{name: _text(entry[name]) for name in names}, "token_created": _text(created.get(entry["token_id"]))}
            for entry in newest
        ]

    def _under_other_keys(self, key_id: str, limit: int) -> list[StoredToken]:
        with self._database() as db:
            return [_token(each) for each in db.active_tokens.find({"key_id": {"$gt": "", "$ne": key_id}}).limit(limit)]

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        changes = [
            UpdateOne(
                {"_id": old.user_id, "ciphertext": old.ciphertext},
                {"$set": {"ciphertext": new.ciphertext, "key_id": new.key_id}},
            )
            for old, new in pairs
        ]
        with self._database() as db:
            return db.active_tokens.bulk_write(changes, ordered=False).modified_count

    def _count_keys(self) -> dict[str, int]:
        each_key: list[Document] = [
            {"$match": {"key_id": {"$gt": ""}}},
            {"$group": {"_id": "$key_id", "count": {"$sum": 1}}},
        ]
        with self._database() as db:
            return {row["_id"]: row["count"] for row in db.active_tokens.aggregate(each_key)}

    def _users(self) -> list[str | None]:
        with self._database() as db:
            found = {*db.tokens.distinct("user_id"), *db.token_audit.distinct("user_id")}
        return sorted(found, key=str)

    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        with self._database() as db:
            records = list(db.tokens.find({"user_id": user_id}, {"audit": 0}).sort("generation"))
            active = db.active_tokens.find_one({"_id": user_id}) or {"token_id": None, "generation": float("-inf")}
        now, tokens = self._now(), []
        for record in records:
            token_id, unended = record.pop("_id"), record.pop("is_active")
            # Whoever wrote this record was cut off before it became the active one: nothing leads to it yet.
            if unended and record["generation"] > active["generation"] and record["expires_at"] > now:
                continue
            held = active if token_id == active["token_id"] else {}
            tokens.append(StoredToken(**record, **{name: held.get(name, "") for name in ("ciphertext", "key_id")}))
        return tokens

    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = (after.performed_at, after.position) if after else (LONG_AGO, ObjectId(bytes(12)))
        later = {"user_id": user_id, "performed_at": {"$gte": place[0]}}
        at_once: Document = {"performed_at": place[0], "_id": {"$lte": place[1]}}
        order = [("performed_at", ASCENDING), ("_id", ASCENDING)]
        with self._database() as db:
            # First what is inside the records, as in `_audit`.
            records = list(db.tokens.find({"user_id": user_id}, {"audit": 1, "generation": 1}))
            found = list(db.token_audit.find({**later, "$nor": [at_once]}).sort(order).limit(limit))
        generations = {record["_id"]: record["generation"] for record in records}
        inside = [entry for record in records for entry in record["audit"]]
        entries = {e["_id"]: e for e in [*inside, *found] if (e["performed_at"], e["_id"]) > place}
        return [
            AuditEntry(
                e["action"], e["actor"], e["performed_at"], e["metadata"], generations.get(e["token_id"]), e["_id"]
            )
            for e in sorted(entries.values(), key=lambda e: (e["performed_at"], e["_id"]))[:limit]
        ]

    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        living = [token for token in tokens if token.ciphertext]
        ended = [token for token in tokens if not token.ciphertext]
        with self._database() as db:
            self._leases.prove_held()
            # Cut off anywhere, this leaves the user with a token if there was one: first the new record, then the one
            # document that leads to it, as in `_insert`, and only then the end of the earlier ones.
            _put_in_records(db, living)
            for token in living:
                _make_active(db, token)
            which = {"_id": user_id, "generation": {"$in": [token.generation for token in ended]}}
            if ended:
                db.active_tokens.update_one(which, {"$unset": {"ciphertext": 1, "key_id": 1}})
            _put_in_records(db, ended)
            if entries:
                ids = {
                    each["generation"]: each["_id"] for each in db.tokens.find({"user_id": user_id}, {"generation": 1})
                }
                names = ("action", "actor", "performed_at", "metadata")
                db.token_audit.insert_many(
                    {
                        "user_id": user_id,
                        "token_id": ids.get(e.generation),
                        **{name: getattr(e, name) for name in names},
                    }
                    for e in entries
                )

    def _health(self) -> dict[str, Any]:
        try:
            self._count_keys()
        except StorageError as error:
            return {"mongodb": f"error: {error}"}
        return {"mongodb": "healthy"}


def _held() -> Document:
    """Not revoked."""
    return {"ciphertext": {"$exists": True}}


def _token(active: Document, **more: Any) -> StoredToken:
    names = ("token_id", "ciphertext", "key_id", "generation", "created_at", "expires_at")
    return StoredToken(
        user_id=active["_id"], **{name: active[name] for name in names} | {"token_id": str(active["token_id"])}, **more
    )


def _dead(db: Database[Document], now: datetime, limit: int) -> dict[ObjectId, str]:
    """Records of dead tokens that do not say so yet, and whose they are."""
    found = db.tokens.find({"is_active": True, "expires_at": {"$lte": now}}, {"user_id": 1})
    return {each["_id"]: each["user_id"] for each in found.sort("expires_at").limit(limit)}


def _put_in_records(db: Database[Document], tokens: list[StoredToken]) -> None:
    """Without ciphertexts. Of one that is there, the uses only grow, and once it has ended it stays so."""
    changes = []
    for token in tokens:
        record = asdict(token)
        for name in ("ciphertext", "key_id", "token_id", "source"):
            del record[name]
        which = {name: record.pop(name) for name in ("user_id", "generation")}
        uses = {name: record.pop(name) for name in ("usage_count", "last_used_at")}
        grown = {"$max": uses, "$min": {"is_active": bool(token.ciphertext)}}
        changes.append(UpdateOne(which, {"$setOnInsert": {**record, "audit": []}, **grown}, upsert=True))
    if changes:
        db.tokens.bulk_write(changes)


def _make_active(db: Database[Document], token: StoredToken) -> None:
    if db.active_tokens.find_one({"_id": token.user_id, "generation": token.generation}, {"_id": 1}):
        return  # It is, or was until it was revoked.
    record = db.tokens.find_one({"user_id": token.user_id, "generation": token.generation}, {"_id": 1}) or {}
    active = {"token_id": record["_id"]}
    active |= {
        name: getattr(token, name) for name in ("ciphertext", "key_id", "generation", "created_at", "expires_at")
    }
    db.active_tokens.replace_one({"_id": token.user_id, "generation": {"$lt": token.generation}}, active, upsert=True)


def _end(db: Database[Document], entries: list[Document]) -> int:
    """The records of these audit entries' tokens are no longer active; how many were until now."""
    ending = [
        UpdateOne({"_id": e["token_id"], "is_active": True}, {"$set": {"is_active": False}, "$push": {"audit": e}})
        for e in entries
    ]
    ended = db.tokens.bulk_write(ending, ordered=False).modified_count
    _move_audit(db, [entry["token_id"] for entry in entries])
    return ended


def _move_audit(db: Database[Document], token_ids: list[ObjectId]) -> None:
    """From inside the records to a collection of their own. Cut off anywhere, it is done again without harm."""
    records = list(db.tokens.find({"_id": {"$in": token_ids}, "audit.0": {"$exists": True}}, {"audit": 1}))
    if not records:
        return
    try:
        db.token_audit.insert_many([entry for record in records for entry in record["audit"]], ordered=False)
    except BulkWriteError as error:
        if any(fault["code"] != 11000 for fault in error.details["writeErrors"]):
            raise
    db.tokens.bulk_write(
        [
            UpdateOne(
                {"_id": record["_id"]},
                {"$pull": {"audit": {"_id": {"$in": [entry["_id"] for entry in record["audit"]]}}}},
            )
            for record in records
        ],
        ordered=False,
    )


def _shown(record: Mapping[str, Any], *, is_active: bool) -> dict[str, Any]:
    """The record as callers see it, ready for JSON."""
    named = {"token_id" if name == "_id" else name: _text(value) for name, value in record.items()}
    return {**named, "is_active": is_active}


def _text(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, ObjectId) else value
