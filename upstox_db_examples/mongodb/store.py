"""Pattern 3: MongoDB with a TTL. Ciphertexts disappear by themselves, and history stays."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Unpack

from bson import ObjectId
from pymongo import ASCENDING, DESCENDING, ReturnDocument, UpdateOne
from pymongo.database import Database
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError

from ..core.checks import require_aware, require_positive
from ..core.errors import InvalidInput, LoginSuperseded, StorageError, StoreUnavailable
from ..core.store import Options, TokenStorage
from ..core.token import AuditEntry, Secret, StoredToken
from .connection import Document, MongoDBConnection, index_keys
from .lease import LONG_AGO, Leases
from .schema import make_collections, make_runtime_role

logger = logging.getLogger(__name__)

MOVE_AFTER = 100  # uses; until then their audit entries stay inside the token's record
ATTEMPTS = 10  # to read or write while the token is being replaced or a login is ending
# The fields that are in `active_tokens` and not in the token's record, and those that are in both.
ONLY_ACTIVE = ("ciphertext", "key_id")
IN_BOTH = ("generation", "created_at", "expires_at", "account", "issued_at")
NOT_KEPT = ("token_id", "source", "in_doubt")
GENERATION_KEYS = ("user_id", "generation")  # of the unique index that keeps two writers apart
FIRST_ENTRY = {"audit": {"$slice": 1}}  # A record may have a hundred audit entries.
NOT_ACTIVE: Document = {"token_id": None, "generation": float("-inf")}  # stands in for a missing document


class MongoUpstoxStorage(TokenStorage):
    """Tokens in MongoDB 6.0 or newer, a replica set or a single server.

    There are three main collections. `active_tokens` has one document per user, and its `_id` is the user's id. It
    holds the ciphertext and, while a login may have replaced the token at Upstox, that login's mark. A TTL index
    removes it when the token dies. `tokens` has one record per token, without the ciphertext. The record holds the
    audit entries of the token's last uses; older entries are in `token_audit`. (The other collections are `leases`,
    `login_notes` and `schema_version`.)

    One atomic change of the document in `active_tokens` replaces the token. Everything else is written before that, or
    can be caught up later. So nothing is wrong if a client or a server dies between two writes, and no transaction is
    needed. A write is acknowledged once a majority of the replica set has it in its journal. A single server uses its
    own journal; there the driver does not retry a write whose answer was lost.

    Args:
        connection_string: a `mongodb://` or `mongodb+srv://` URL, as `pymongo.MongoClient` takes it.
        database_name: the database.
        timeout: seconds for each step, including the election of a new primary. A read is one step, and a login is a
            few.
        lease: if a process dies during a login, another caller may log the same user in after this many seconds. A
            login that takes longer keeps its lease.
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
        # As in the guide, you need not close a store.
        weakref.finalize(self, self._connection.close)
        self.init_database()

    def init_database(self, runtime_role: str | None = None) -> None:
        """Make the collections, validators and indexes, or upgrade those of an earlier version.

        This is safe to repeat and to run concurrently.

        Args:
            runtime_role: a role to make in this database, or to give the rights that it lacks. It gets the least rights
                that storing and reading need. Run this as the owner of the database, with `dbOwner` on it.

        Raises:
            ConfigurationError: the database is not usable, or this user has no right to change it.
        """
        with self._database() as db:
            make_collections(db, self._connection.where)
            if runtime_role is not None:
                make_runtime_role(db, runtime_role, self._connection.where)

    def get_user_dashboard(self, user_id: str) -> dict[str, Any]:
        """Return everything about a user in one JSON-friendly dict, without the token.

        Returns:
            `user_id`; `statistics` (`total_tokens`, `active_tokens`, `total_usage`, `avg_usage`, `last_generation`,
            `last_usage`); `recent_activity`, the last ten audit entries; `active_token` (`exists`, `expires_at`,
            `usage_count`). Times are ISO text in UTC. An unknown user has zeros, None and an empty list.
        """
        statistics = self.get_user_statistics(user_id)
        statistics["avg_usage"] = statistics.pop("avg_usage_per_token")
        # Start from the active document and not from the newest record, because that record may not be active yet.
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
        """Return the records of all tokens made from `start_date` to `end_date`, both included, newest first.

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

    def _find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        entry = self._entry(user_id, "used", now)
        use = {"$inc": {"usage_count": 1}, "$set": {"last_used_at": now}, "$push": {"audit": entry}}
        shown = {"user_name": 1, "email": 1, "usage_count": 1}
        over: Document | None = None
        with self._database() as db:
            for _ in range(ATTEMPTS):
                # The TTL runs once a minute. Until then, only this filter holds a dead token back.
                active = db.active_tokens.find_one({"_id": user_id, "expires_at": {"$gt": alive_after}, **_held()})
                if active is None:
                    return None
                if (mark := active.get("login")) is not None:
                    if locked or not mark or mark == over:
                        return None
                    if not self._leases.lives(db, mark["lock"], mark["owner"]):
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
                            _move_audit(db, [active["token_id"]])
                        except PyMongoError as error:  # They can stay in the record until the next try.
                            logger.warning("Audit entries stay in their record for now (%s)", type(error).__name__)
                    return _token(active, **{name: record.get(name) for name in shown})
                # The token was replaced or revoked in between, so look again.
        raise StoreUnavailable(f"{self._connection.where} has no record to count this use in. Store a new token.")

    def _in_doubt(self, user_id: str) -> StoredToken | None:
        with self._database() as db:
            active = db.active_tokens.find_one({"_id": user_id, "login": {"$exists": True}, **_held()})
        return _token(active) if active else None

    def _newest(self, user_id: str) -> StoredToken | None:
        with self._database() as db:
            # The order matters: otherwise a token that becomes active in between would look like one that never did.
            found = db.tokens.find({"user_id": user_id}, FIRST_ENTRY)
            records = list(found.sort("generation", DESCENDING).limit(ATTEMPTS))
            active = db.active_tokens.find_one({"_id": user_id}) or NOT_ACTIVE
        whole = next((record for record in records if not _is_free(record, active, self._now())), None)
        # The records may be behind after a restore from backups of different moments.
        if active["generation"] > (whole["generation"] if whole else float("-inf")):
            return _token(active)
        return _recorded(whole, active, token_id=str(whole["_id"])) if whole else None

    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> str:
        token_id = ObjectId()
        reason = {"reason": "new_token_generated"}
        ended = self._entry(token.user_id, "deactivated", token.created_at, metadata=reason)
        created = self._entry(token.user_id, action, token.created_at, token_id, metadata)
        record = {**_record_of(token), "_id": token_id, "is_active": True, "last_used_at": None, "audit": [created]}
        try:
            with self._database() as db:
                # We do not check the lease: this token lives at Upstox, and refusing it because of a lost lease would
                # lose it. The generation keeps two writers apart, because the swap only ever raises it. The life cycle
                # knows which of two tokens Upstox issued later. Until the swap, nothing points to this record.
                try:
                    db.tokens.insert_one(record)
                except DuplicateKeyError as error:
                    taken = _take_over(db, record, self._now()) if index_keys(error) == GENERATION_KEYS else None
                    if taken is None:
                        raise
                    token_id = taken
                before, is_active = _swap(db, token.user_id, _active_of(token, token_id))
        except StorageError as error:
            refused = error.__cause__
            if not isinstance(refused, DuplicateKeyError) or index_keys(refused) != GENERATION_KEYS:
                raise
            raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.") from error
        if not is_active:
            raise LoginSuperseded(f"A newer token of {token.user_id} is already stored. Read that one.")
        try:
            with self._database() as db:
                earlier = {"user_id": token.user_id, "is_active": True, "generation": {"$lt": token.generation}}
                for old in [each["_id"] for each in db.tokens.find(earlier, {"_id": 1}).sort("generation")]:
                    cut_off = before["ended"] if before and before["token_id"] == old and "ended" in before else None
                    _end(db, [{**(cut_off or ended), "token_id": old}])
                    ended = {**ended, "_id": ObjectId()}
        except StorageError as error:  # The token is stored. The next insert catches up.
            logger.warning("The record of the earlier token of %s is still marked as active: %s", token.user_id, error)
        return str(token_id)

    def _revoke(self, user_id: str, now: datetime) -> bool:
        entry = self._entry(user_id, "revoked", now)
        with self._database() as db:
            # The document stays, without ciphertext, until it expires, so that a login in progress cannot put an older
            # token there.
            erased = db.active_tokens.find_one_and_update(
                {"_id": user_id, **_held()},
                {"$unset": dict.fromkeys((*ONLY_ACTIVE, "login"), 1), "$set": {"ended": entry}},
            )
            # An earlier call may have erased it and been interrupted here.
            held = erased or db.active_tokens.find_one({"_id": user_id, "ended": {"$exists": True}})
            if held:
                _end(db, [{**held.get("ended", entry), "token_id": held["token_id"]}])
        return erased is not None

    def _expire(self, now: datetime, limit: int) -> int:
        with self._database() as db:
            while records := _dead(db, now, limit):
                # Usually the TTL came first. If not, a revocation may have been interrupted, and we record it now.
                still_there = {"_id": {"$in": list(records.values())}, "token_id": {"$in": list(records)}}
                told = {each["token_id"]: each.get("ended", {}) for each in db.active_tokens.find(still_there)}
                db.active_tokens.delete_many(still_there)
                entries = {one: self._entry(user_id, "expired", now) for one, user_id in records.items()}
                if ended := _end(db, [{**e, **told.get(one, {}), "token_id": one} for one, e in entries.items()]):
                    return ended  # Otherwise another cleanup was faster.
        return 0

    def _forget_entries(self, before: datetime, limit: int) -> int:
        old = {"performed_at": {"$lt": before}}
        with self._database() as db:
            # This uses the index on the few records that hold entries.
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
        """Make an audit entry. Its id is made here, so that we notice if it is written twice."""
        entry = {"_id": ObjectId(), "token_id": token_id, "user_id": user_id, "action": action}
        return {**entry, "actor": self._actor, "performed_at": now, "metadata": metadata or {}}

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return self._leases.held(name, self._login_wait)

    def _begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        mark = {"lock": lock, "owner": self._leases.owner_of(lock)}
        # An existing mark is from a login with an unknown outcome. (If a user is named, it may be from a login that is
        # running under another lock. One mark cannot stand for both logins.)
        marked: Document = {"$cond": [{"$eq": [{"$type": "$login"}, "missing"]}, {"$literal": mark}, {"$literal": {}}]}
        anybody: Document = {"$or": [{"login": {"$exists": False}}, {"login.lock": lock}]}
        # A caller that was stopped and lost its lease meanwhile would kill the token that another login has made.
        self._leases.prove_held()
        with self._database() as db:
            # Write the entry first, then the mark. They cannot be one transaction, because a single server has none. If
            # this is interrupted in between, the entry reports a login that never began, and nothing is lost. The other
            # way round, a living token would be in doubt for no reason. Both are durable before the login begins.
            db.token_audit.insert_one(self._entry(user_id, "login", now, metadata=metadata))
            _mark(db, {**(anybody if user_id is None else {"_id": user_id}), **_held()}, [{"$set": {"login": marked}}])

    def _end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        mine = {"login.lock": lock, "login.owner": self._leases.owner_of(lock)}
        # A mark without an owner stays, whoever holds the lock.
        change: Document = {"$set": {"login": {}}} if in_doubt else {"$unset": {"login": 1}}
        with self._database() as db:
            _mark(db, mine if user_id is None else {"_id": user_id, **mine}, change)

    def _clear_doubt(self, token: StoredToken) -> None:
        with self._database() as db:
            which = {"_id": token.user_id, "generation": token.generation}
            db.active_tokens.update_one(which, {"$unset": {"login": 1}})

    def _logins_since(self, moment: datetime, process: str) -> list[datetime]:
        # This includes logins of earlier programs, which name no process.
        logins = {"action": "login", "performed_at": {"$gt": moment}, "metadata.process": {"$ne": process}}
        with self._database() as db:
            found = db.token_audit.find(logins, {"performed_at": 1}).sort("performed_at", DESCENDING).limit(100)
            return [entry["performed_at"] for entry in found]

    def _notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        with self._database() as db:
            # Two steps: an aggregation could do both at once, but $documents needs the right to read all collections.
            now: datetime = db.command("hello")["localTime"]  # has no time zone, whatever the client's setting
            notes = db.login_notes.find({"_id": {"$in": list(names)}}) if names else ()
            return now.replace(tzinfo=UTC).timestamp(), {note["_id"]: note["sealed"] for note in notes}

    def _write_note(self, name: str, text: str) -> None:
        with self._database() as db:
            db.login_notes.replace_one({"_id": name}, {"sealed": text}, upsert=True)

    def _erase_note(self, name: str) -> None:
        with self._database() as db:
            db.login_notes.delete_one({"_id": name})

    def _tokens_of_account(self, account: str) -> list[StoredToken]:
        with self._database() as db:
            found = db.active_tokens.find({"account": account, **_held()}).sort("created_at", DESCENDING)
            return [_token(active) for active in found.limit(100)]

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
            # Read the records first: if an entry is moved meanwhile, we see it twice instead of missing it.
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
                # Set the account too, because the new ciphertext is bound to it. Version 1 did not store it here.
                {"$set": {"ciphertext": new.ciphertext, "key_id": new.key_id, "account": new.account}},
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
            active = db.active_tokens.find_one({"_id": user_id}) or NOT_ACTIVE
        now, tokens = self._now(), []
        for record in records:
            if not _is_cut_off(record, active, now):
                tokens.append(_recorded(record, active))
        return tokens

    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        place = (after.performed_at, after.position) if after else (LONG_AGO, ObjectId(bytes(12)))
        later = {"user_id": user_id, "performed_at": {"$gte": place[0]}}
        at_once: Document = {"performed_at": place[0], "_id": {"$lte": place[1]}}
        order = [("performed_at", ASCENDING), ("_id", ASCENDING)]
        with self._database() as db:
            # Read the records first, as in `_audit`.
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
            # If this is interrupted, a user who had a token still has one. As in `_insert`, we write the new record
            # first, then the document that points to it, and only then end the earlier ones.
            _put_in_records(db, living)
            for token in living:
                _make_active(db, token)
            which = {"_id": user_id, "generation": {"$in": [token.generation for token in ended]}}
            if ended:
                db.active_tokens.update_one(which, {"$unset": dict.fromkeys((*ONLY_ACTIVE, "login"), 1)})
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
    """Match documents that are not revoked."""
    return {"ciphertext": {"$exists": True}}


def _token(active: Document, **more: Any) -> StoredToken:
    """Return the token of this document. Its ciphertext is empty if it was revoked."""
    known = {name: active.get(name, "") for name in ONLY_ACTIVE}
    # Version 1 did not store all of these here, and bound no ciphertext to an account.
    known |= {name: active.get(name) for name in IN_BOTH}
    return StoredToken(
        user_id=active["_id"], token_id=str(active["token_id"]), in_doubt="login" in active, **known, **more
    )


def _recorded(record: Document, active: Document, **more: Any) -> StoredToken:
    """Return the token of this record, with a ciphertext if it is the user's active one."""
    known = {name: value for name, value in record.items() if name not in ("_id", "is_active", "audit")}
    held = active if record["_id"] == active["token_id"] and "ciphertext" in active else {}
    # The fields that the ciphertext is bound to come from beside it, whatever the record says. (Version 1 bound it to
    # no account.)
    known |= dict.fromkeys(ONLY_ACTIVE, "") | {name: held[name] for name in (*ONLY_ACTIVE, *IN_BOTH) if name in held}
    return StoredToken(**known, **more, in_doubt="login" in held)


def _is_cut_off(record: Document, active: Document, now: datetime) -> bool:
    """Tell whether its writer was interrupted, or is still busy, before the swap. Nothing points to the record."""
    return bool(record["is_active"] and record["generation"] > active["generation"] and record["expires_at"] > now)


def _is_free(record: Document, active: Document, now: datetime) -> bool:
    """Tell whether another login may take this record and its generation, because its own login was interrupted.

    A record from a migration is not free; it has no audit entry. A used record is not free either: it was active once.
    """
    return _is_cut_off(record, active, now) and bool(record["audit"]) and not record["usage_count"]


def _take_over(db: Database[Document], record: Document, now: datetime) -> ObjectId | None:
    """Overwrite a record of the same generation whose writer was interrupted. Return its id, or None.

    The life cycle retries after a lost connection, and must not fail because of its own first attempt. If the other
    writer is only slow, one of the two gets to the swap first, and the other one finds out there.
    """
    there = db.tokens.find_one({name: record[name] for name in GENERATION_KEYS}, FIRST_ENTRY)
    active = db.active_tokens.find_one({"_id": record["user_id"]}) or NOT_ACTIVE
    if there is None or not _is_free(there, active, now):
        return None
    token_id: ObjectId = there["_id"]
    (created,) = record["audit"]  # goes after that writer's entries: nothing leaves the audit trail
    values = {name: value for name, value in record.items() if name not in ("_id", "audit")}
    change = {"$set": values, "$push": {"audit": {**created, "token_id": token_id}}}
    which = {"_id": token_id, "is_active": True, "usage_count": 0, "audit.0": {"$exists": True}}
    return token_id if db.tokens.update_one(which, change).matched_count else None


def _record_of(token: StoredToken) -> Document:
    """Return what a record keeps of a token."""
    return {name: value for name, value in asdict(token).items() if name not in (*ONLY_ACTIVE, *NOT_KEPT)}


def _active_of(token: StoredToken, token_id: ObjectId) -> Document:
    """Return the document that makes this the user's active token."""
    return {"token_id": token_id, **{name: getattr(token, name) for name in (*ONLY_ACTIVE, *IN_BOTH)}}


def _swap(db: Database[Document], user_id: str, active: Document) -> tuple[Document | None, bool]:
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


def _mark(db: Database[Document], which: Document, change: Any) -> None:
    """Change the marks of these tokens.

    This changes each token separately, because the driver does not retry `update_many` after a lost connection. A login
    takes so long that a firewall may have cut the connection.
    """
    users = [active["_id"] for active in db.active_tokens.find(which, {"_id": 1})]
    changes = [UpdateOne({**which, "_id": user_id}, change) for user_id in users]
    if changes:
        db.active_tokens.bulk_write(changes, ordered=False)


def _dead(db: Database[Document], now: datetime, limit: int) -> dict[ObjectId, str]:
    """Return the records of dead tokens that are still marked active, and their users."""
    found = db.tokens.find({"is_active": True, "expires_at": {"$lte": now}}, {"user_id": 1})
    return {each["_id"]: each["user_id"] for each in found.sort("expires_at").limit(limit)}


def _put_in_records(db: Database[Document], tokens: list[StoredToken]) -> None:
    """Put records in, without ciphertexts. In an existing record the uses only grow, and an ended one stays ended."""
    changes = []
    for token in tokens:
        record = _record_of(token)
        which = {name: record.pop(name) for name in ("user_id", "generation")}
        uses = {name: record.pop(name) for name in ("usage_count", "last_used_at")}
        grown = {"$max": uses, "$min": {"is_active": bool(token.ciphertext)}}
        changes.append(UpdateOne(which, {"$setOnInsert": {**record, "audit": []}, **grown}, upsert=True))
    if changes:
        db.tokens.bulk_write(changes)


def _make_active(db: Database[Document], token: StoredToken) -> None:
    if db.active_tokens.find_one({"_id": token.user_id, "generation": token.generation}, {"_id": 1}):
        return  # It is active already, or was until it was revoked.
    record = db.tokens.find_one({"user_id": token.user_id, "generation": token.generation}, {"_id": 1}) or {}
    active = _active_of(token, record["_id"])
    if token.in_doubt:
        active["login"] = {}
    db.active_tokens.replace_one({"_id": token.user_id, "generation": {"$lt": token.generation}}, active, upsert=True)


def _end(db: Database[Document], entries: list[Document]) -> int:
    """End the records of these audit entries' tokens. Return how many were active until now."""
    ending = [
        UpdateOne({"_id": e["token_id"], "is_active": True}, {"$set": {"is_active": False}, "$push": {"audit": e}})
        for e in entries
    ]
    ended = db.tokens.bulk_write(ending, ordered=False).modified_count
    _move_audit(db, [entry["token_id"] for entry in entries])
    return ended


def _move_audit(db: Database[Document], token_ids: list[ObjectId]) -> None:
    """Move audit entries from the records to their own collection. It is safe to repeat after an interruption."""
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
    """Convert a record to what callers see, ready for JSON."""
    named = {"token_id" if name == "_id" else name: _text(value) for name, value in record.items()}
    return {**named, "is_active": is_active}


def _text(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, ObjectId) else value
