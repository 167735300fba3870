"""The operations of a store in MongoDB; see core/backend.py."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, DESCENDING, ReturnDocument, UpdateOne
from pymongo.errors import DuplicateKeyError, PyMongoError

from ..core.backend import Backend
from ..core.context import Context
from ..core.errors import LoginSuperseded, StorageError, StoreUnavailable
from ..core.listener import Listener, TokenState
from ..core.token import AuditEntry, StoredToken
from . import reports
from .changes import (
    end_record,
    end_records,
    find_dead,
    find_earlier,
    find_newest,
    make_active,
    merge_records,
    move_audit,
    swap,
    take_over,
)
from .connection import Document, MongoDBConnection, index_keys
from .documents import (
    ATTEMPTS,
    GENERATION_KEYS,
    NOT_ACTIVE,
    ONLY_ACTIVE,
    active_of,
    is_cut_off,
    is_free,
    not_revoked,
    read_active,
    read_record,
    record_of,
)
from .lease import Leases
from .logins import Logins, list_running, mark_of_running
from .notices import ChangeStream
from .schema import make_collections, make_runtime_role, refuse_another_case

logger = logging.getLogger(__name__)

MOVE_AFTER = 100  # uses; until then their audit entries stay inside the token's record


class MongoBackend(Backend):
    """The operations on a MongoDB database."""

    store_kind = "access token in MongoDB"

    def __init__(self, connection: MongoDBConnection, lease: float, context: Context) -> None:
        super().__init__(context, connection.where)
        self.connection, self._database = connection, connection.database
        self._leases = Leases(self._database, lease)
        self._logins = Logins(self._database, self._leases)

    def has_tables(self) -> bool:
        with self._database() as db:
            if db.schema_version.find_one({"_id": "upstox"}) is not None:
                return True
            refuse_another_case(db, self.where)
            return False

    def init_database(self, runtime_role: str | None = None) -> None:
        with self._database() as db:
            make_collections(db, self.where)
            if runtime_role is not None:
                make_runtime_role(db, runtime_role, self.where)

    def close(self) -> None:
        self.connection.close()

    def find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        entry = self._entry(user_id, "used", now)
        use = {"$inc": {"usage_count": 1}, "$set": {"last_used_at": now}, "$push": {"audit": entry}}
        shown = {"user_name": 1, "email": 1, "usage_count": 1}
        over: Document | None = None
        with self._database() as db:
            for _ in range(ATTEMPTS):
                # The TTL runs once a minute. Until then, only this filter holds a dead token back.
                active = db.active_tokens.find_one(
                    {"_id": user_id, "expires_at": {"$gt": alive_after}, **not_revoked()}
                )
                if active is None:
                    return None
                if (mark := active.get("login")) is not None:
                    if locked or not mark or mark == over:
                        return None
                    if not self._leases.lives(db, **mark):
                        # The login may have ended between the two reads. Only a mark that is still there means doubt.
                        over = mark
                        continue
                entry["token_id"] = active["token_id"]
                record = db.tokens.find_one_and_update(
                    {"_id": active["token_id"], "is_active": True}, use, shown, return_document=ReturnDocument.AFTER
                )
                if record is not None:
                    if record["usage_count"] % MOVE_AFTER == 0:
                        try:
                            move_audit(db, [active["token_id"]])
                        except PyMongoError as error:  # They can stay in the record until the next try.
                            logger.warning("Audit entries stay in their record for now (%s)", type(error).__name__)
                    return read_active(active, **{name: record.get(name) for name in shown})
                # The token was replaced or revoked in between, so look again.
        raise StoreUnavailable(f"{self.where} has no record to count this use in. Store a new token.")

    def find_in_doubt(self, user_id: str) -> StoredToken | None:
        with self._database() as db:
            active = db.active_tokens.find_one({"_id": user_id, "login": {"$exists": True}, **not_revoked()})
        return read_active(active) if active else None

    def find_newest(self, user_id: str) -> StoredToken | None:
        with self._database() as db:
            records, active = find_newest(db, user_id)
        whole = next((record for record in records if not is_free(record, active, self.context.now())), None)
        # The records may be behind after a restore from backups of different moments.
        if active["generation"] > (whole["generation"] if whole else float("-inf")):
            return read_active(active)
        return read_record(whole, active, token_id=str(whole["_id"])) if whole else None

    def listen(self) -> Listener:
        return ChangeStream(self.connection)

    def read_states(self, user_ids: Collection[str]) -> dict[str, TokenState]:
        shown = {"generation": 1, "key_id": 1, "login": 1}
        with self._database() as db:
            found = list(db.active_tokens.find({"_id": {"$in": list(user_ids)}}, shown))
        return {each["_id"]: TokenState(each["generation"], "key_id" in each, "login" in each) for each in found}

    def insert(
        self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None
    ) -> StoredToken:
        token_id = ObjectId()
        reason = {"reason": "new_token_generated"}
        ended = self._entry(token.user_id, "deactivated", token.created_at, metadata=reason)
        created = self._entry(token.user_id, action, token.created_at, token_id, metadata)
        record = {**record_of(token), "_id": token_id, "is_active": True, "last_used_at": None, "audit": [created]}
        try:
            with self._database() as db:
                # We do not check the lease: this token lives at Upstox, and refusing it because of a lost lease would
                # lose it. The generation keeps two writers apart, because the swap only ever raises it. The life cycle
                # knows which of two tokens Upstox issued later. Until the swap, nothing points to this record.
                try:
                    db.tokens.insert_one(record)
                except DuplicateKeyError as error:
                    taken = take_over(db, record, self.context.now()) if index_keys(error) == GENERATION_KEYS else None
                    if taken is None:
                        raise
                    token_id = taken
                harmless = self._logins.harmless(db, action)
                active, mark = active_of(token, token_id), mark_of_running(list_running(db), harmless)
                before, is_active = swap(db, token.user_id, active if mark is None else {**active, "login": mark})
                # Such a login may have begun or ended just before the swap.
                earlier, running = find_earlier(db, token)
                which = {"_id": token.user_id, "token_id": token_id}
                mark = self._logins.update_mark(db, which, mark, harmless, running)
        except StorageError as error:
            refused = error.__cause__
            if not isinstance(refused, DuplicateKeyError) or index_keys(refused) != GENERATION_KEYS:
                raise
            raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.") from error
        if not is_active:
            raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.")
        try:
            with self._database() as db:
                for old in earlier:
                    cut_off = before and before["token_id"] == old["_id"] and before.get("ended")
                    end_record(db, old, {**(cut_off or ended), "token_id": old["_id"]})
                    ended = {**ended, "_id": ObjectId()}
        except StorageError as error:  # The token is stored. The next insert catches up.
            logger.warning("The record of the earlier token of %s is still marked as active: %s", token.user_id, error)
        token.token_id, token.in_doubt = str(token_id), mark is not None
        return token

    def revoke(self, user_id: str, now: datetime) -> bool:
        entry = self._entry(user_id, "revoked", now)
        with self._database() as db:
            # The document stays, without ciphertext, until it expires, so that a login in progress cannot put an older
            # token there.
            erased = db.active_tokens.find_one_and_update(
                {"_id": user_id, **not_revoked()},
                {"$unset": dict.fromkeys((*ONLY_ACTIVE, "login"), 1), "$set": {"ended": entry}},
            )
            # An earlier call may have erased it and been interrupted here.
            held = erased or db.active_tokens.find_one({"_id": user_id, "ended": {"$exists": True}})
            if held:
                end_records(db, [{**held.get("ended", entry), "token_id": held["token_id"]}])
        return erased is not None

    def expire(self, now: datetime, limit: int) -> int:
        with self._database() as db:
            while records := find_dead(db, now, limit):
                # Usually the TTL came first. If not, a revocation may have been interrupted, and we record it now.
                still_there = {"_id": {"$in": list(records.values())}, "token_id": {"$in": list(records)}}
                told = {each["token_id"]: each.get("ended", {}) for each in db.active_tokens.find(still_there)}
                db.active_tokens.delete_many(still_there)
                entries = {one: self._entry(user_id, "expired", now) for one, user_id in records.items()}
                if ended := end_records(
                    db, [{**e, **told.get(one, {}), "token_id": one} for one, e in entries.items()]
                ):
                    return ended  # Otherwise another cleanup was faster.
        return 0

    def delete_entries(self, before: datetime, limit: int) -> int:
        old = {"performed_at": {"$lt": before}}
        with self._database() as db:
            # This uses the index on the few records that hold entries.
            holding = {"audit.user_id": {"$gte": ""}, "audit": {"$elemMatch": old}}
            inside = db.tokens.find(holding, {"_id": 1}).limit(limit)
            move_audit(db, [record["_id"] for record in inside])
            ids = [entry["_id"] for entry in db.token_audit.find(old, {"_id": 1}).limit(limit)]
            return db.token_audit.delete_many({"_id": {"$in": ids}}).deleted_count if ids else 0

    def record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
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
        """Make an audit entry. Its id is made here, so that we notice if it is written twice."""
        entry = {"_id": ObjectId(), "token_id": token_id, "user_id": user_id, "action": action}
        return {**entry, "actor": self.context.actor, "performed_at": now, "metadata": metadata or {}}

    def lock(self, name: str) -> AbstractContextManager[None]:
        return self._leases.hold(name, self.context.login_wait)

    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        self._logins.begin(user_id, lock, self._entry(user_id, "login", now, metadata=metadata))

    def end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        self._logins.end(lock, in_doubt=in_doubt, user_id=user_id)

    def clear_doubt(self, token: StoredToken) -> None:
        with self._database() as db:
            active = db.active_tokens.find_one({"_id": token.user_id, "generation": token.generation}) or {}
            mark = active.get("login") or {}
            if not mark or not self._leases.lives(db, **mark):
                which = {"_id": token.user_id, "generation": token.generation, "login": mark}
                db.active_tokens.update_one(which, {"$unset": {"login": 1}})

    def logins_since(self, moment: datetime, process: str) -> list[datetime]:
        # This includes logins of earlier programs, which name no process.
        logins = {"action": "login", "performed_at": {"$gt": moment}, "metadata.process": {"$ne": process}}
        with self._database() as db:
            found = db.token_audit.find(logins, {"performed_at": 1}).sort("performed_at", DESCENDING).limit(100)
            return [entry["performed_at"] for entry in found]

    def read_notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        with self._database() as db:
            # $facet makes one document, even of no notes. (A pipeline that begins with $documents needs the right to
            # read all collections.)
            both: list[Document] = [{"$facet": {"notes": [{"$match": {"_id": {"$in": list(names)}}}]}}]
            (told,) = db.login_notes.aggregate([*both, {"$set": {"now": "$$NOW"}}])
        return told["now"].timestamp(), {note["_id"]: note["sealed"] for note in told["notes"]}

    def write_note(self, name: str, text: str) -> None:
        with self._database() as db:
            db.login_notes.replace_one({"_id": name}, {"sealed": text}, upsert=True)

    def erase_note(self, name: str) -> None:
        with self._database() as db:
            db.login_notes.delete_one({"_id": name})

    def find_by_account(self, account: str) -> list[StoredToken]:
        with self._database() as db:
            found = db.active_tokens.find({"account": account, **not_revoked()}).sort("created_at", DESCENDING)
            return [read_active(active) for active in found.limit(100)]

    def read_history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        with self._database() as db:
            return reports.read_history(db, user_id, limit, now)

    def read_statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        with self._database() as db:
            return reports.read_statistics(db, user_id, now)

    def read_audit_trail(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        with self._database() as db:
            return reports.read_audit_trail(db, user_id, limit)

    def find_under_other_keys(self, key_id: str, limit: int, after: str | None = None) -> list[StoredToken]:
        # The key is the ciphertext's own. An earlier version could record another one beside it.
        other = {"$or": [{"key_id": {"$ne": key_id}}, {"ciphertext": {"$not": re.compile(rf"^v\d\.{key_id}\.")}}]}
        with self._database() as db:
            found = db.active_tokens.find({"_id": {"$gt": after or ""}, "key_id": {"$gt": ""}, **other})
            return [read_active(each) for each in found.sort("_id", ASCENDING).limit(limit)]

    def replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        changes = [
            UpdateOne(
                {"_id": old.user_id, "ciphertext": old.ciphertext},
                # Set the account too, because the new ciphertext is bound to it. Version 1 did not store it here.
                {"$set": {"ciphertext": new.ciphertext, "key_id": new.key_id, "account": new.account}},
            )
            for old, new in pairs
        ]
        with self._database() as db:
            return db.active_tokens.bulk_write(changes, ordered=False).modified_count

    def count_keys(self) -> dict[str, int]:
        each_key: list[Document] = [
            {"$match": {"key_id": {"$gt": ""}}},
            # The ciphertext's own key. An earlier version could record another one beside it.
            {"$set": {"own": {"$arrayElemAt": [{"$split": ["$ciphertext", "."]}, 1]}}},
            {"$group": {"_id": {"$ifNull": ["$own", "$key_id"]}, "count": {"$sum": 1}}},
        ]
        with self._database() as db:
            return {row["_id"]: row["count"] for row in db.active_tokens.aggregate(each_key)}

    def read_users(self, after: str, limit: int) -> list[str]:
        with self._database() as db:
            return reports.read_users(db, after, limit)

    def read_tokens(self, user_id: str | None) -> list[StoredToken]:
        with self._database() as db:
            records = list(db.tokens.find({"user_id": user_id}, {"audit": 0}).sort("generation"))
            active = db.active_tokens.find_one({"_id": user_id}) or NOT_ACTIVE
        now, tokens = self.context.now(), []
        for record in records:
            if not is_cut_off(record, active, now):
                tokens.append(read_record(record, active))
        return tokens

    def read_entries(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        with self._database() as db:
            return reports.read_entries(db, user_id, after, limit)

    def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        living = [token for token in tokens if token.ciphertext]
        ended = [token for token in tokens if not token.ciphertext]
        with self._database() as db:
            self._leases.prove_held()
            # If this is interrupted, a user who had a token still has one. As in `insert`, we write the new record
            # first, then the document that points to it, and only then end the earlier ones.
            merge_records(db, living)
            for token in living:
                make_active(db, token)
            if living:
                self._logins.update_mark(db, {"_id": user_id}, None, self._logins.harmless(db, "merged"))
            which = {"_id": user_id, "generation": {"$in": [token.generation for token in ended]}}
            if ended:
                db.active_tokens.update_one(which, {"$unset": dict.fromkeys((*ONLY_ACTIVE, "login"), 1)})
            merge_records(db, ended)
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

    def check_health(self) -> dict[str, Any]:
        details = {"details": {"mongodb": {"overridden": dict(self.connection.overridden)}}}
        try:
            self.count_keys()
        except StorageError as error:
            return {"mongodb": f"error: {error}", **details}
        return {"mongodb": "healthy", **details}
