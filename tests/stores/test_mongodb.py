"""MongoDB: the contract, the layout of the documents, and the guide's own methods."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote_plus

import pytest
from bson import ObjectId
from pymongo.errors import DuplicateKeyError, WriteError

from upstox_db_examples import (
    ConfigurationError,
    InvalidInput,
    MongoUpstoxStorage,
    StorageError,
)

from ..contracts.store import StoreContract
from ..support.clocks import Clock, ist
from ..support.leaks import shown_with_locals
from ..support.mongodb import OnMongoDB, sent
from ..support.processes import USER, made_up_login
from ..support.stores import OpenStore, living


class TestMongoDB(OnMongoDB, StoreContract):
    # The layout

    def test_the_ciphertext_and_the_record_lie_apart(self, store: MongoUpstoxStorage) -> None:
        stored = store.store_token()
        with self.mongo.bare() as db:
            (active,), (record,) = db.active_tokens.find(), db.tokens.find()
        assert active["_id"] == USER
        assert active["ciphertext"].startswith("v2.")
        assert str(active["token_id"]) == str(record["_id"]) == stored["token_id"]
        assert "v2." not in str(record)
        assert record["products"] == ["I", "D", "CO", "MTF"] or record["products"]

    def test_a_read_with_its_count_and_audit_is_two_round_trips(
        self, store: MongoUpstoxStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.store_token(USER)
        with sent(caplog) as commands:
            living(store)
        assert commands == ["find", "findAndModify"]
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            with sent(caplog) as commands:
                living(store)
        assert commands == ["find", "find", "findAndModify"], "the second find is for the lease of the running login"

    def test_a_store_is_15_messages_and_waits_for_the_journal_4_times(
        self, open_store: OpenStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(login=made_up_login)
        store.store_token(USER)
        monkeypatch.setenv("MONGOB_LOG_MAX_DOCUMENT_LENGTH", "10000")  # shows each write concern, and ends in "B_"
        with sent(caplog) as commands:
            store.store_token(USER)
        begin = ["update", "aggregate", "aggregate", "update", "insert", "update", "aggregate"]
        assert commands == [
            *begin,
            "insert",
            "find",
            "findAndModify",
            "aggregate",
            "update",
            "insert",
            "update",
            "delete",
        ]
        begun = [record.getMessage() for record in caplog.records if "Command started" in record.getMessage()]
        waited = [name for name, told in zip(commands, begun, strict=True) if r"\"j\": true" in told]
        assert waited == ["update", "insert", "findAndModify", "insert"], "the mark, the record, the swap and the audit"

    def test_notes_and_the_clock_are_one_round_trip(
        self, store: MongoUpstoxStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.backend.write_note("one", "text")
        with sent(caplog) as commands:
            assert store.backend.read_notes(["one"])[1] == {"one": "text"}
        assert commands == ["aggregate"]

    def test_the_clock_of_the_database_has_no_time_zone(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        try:
            assert abs(store.backend.read_notes([])[0] - time.time()) < 60
        finally:
            monkeypatch.delenv("TZ")
            time.tzset()

    def test_audit_entries_move_out_of_the_record_and_none_is_lost(self, store: MongoUpstoxStorage) -> None:
        store.store_token()
        for _ in range(250):
            living(store)
        with self.mongo.bare() as db:
            (record,) = db.tokens.find()
            assert record["usage_count"] == 250
            assert len(record["audit"]) == 50
            assert db.token_audit.count_documents({"action": "used"}) == 200
        told = store.get_audit_trail(USER, limit=1000)
        assert len([entry for entry in told if entry["action"] == "used"]) == 250
        store.store_token()
        assert len([e for e in store.get_audit_trail(USER, limit=1000) if e["action"] == "used"]) == 250

    def test_entries_whose_move_was_cut_off_are_told_once(self, store: MongoUpstoxStorage) -> None:
        store.store_token(USER)
        living(store)
        with self.mongo.bare() as db:
            (record,) = db.tokens.find()
            # This is how it looks if a process copied them and was killed before it removed them from the record.
            db.token_audit.insert_many(record["audit"])
        assert [e["action"] for e in store.get_audit_trail(USER)] == ["used", "created", "login"]
        store.revoke_token(USER)
        assert [e["action"] for e in store.get_audit_trail(USER)] == ["revoked", "used", "created", "login"]

    def test_the_database_itself_refuses_a_second_active_token_and_plaintext(self, store: MongoUpstoxStorage) -> None:
        store.store_token()
        with self.mongo.bare() as db:
            (active,), (record,) = db.active_tokens.find(), db.tokens.find()
            with pytest.raises(DuplicateKeyError):
                db.active_tokens.insert_one(active)
            with pytest.raises(DuplicateKeyError):
                db.tokens.insert_one({**record, "_id": ObjectId()})
            for oddity in ({"ciphertext": "eyJ0eXAi" * 9}, {"expires_at": "tomorrow"}, {"access_token": "x"}):
                with pytest.raises(WriteError):
                    db.active_tokens.update_one({"_id": USER}, {"$set": oddity})
            with pytest.raises(WriteError):
                db.tokens.update_one({"_id": record["_id"]}, {"$set": {"access_token": "x"}})

    def test_writes_wait_for_a_majority_and_its_journals(self, store: MongoUpstoxStorage) -> None:
        with store.backend.connection.database() as db:
            assert db.write_concern.document == {"w": "majority", "j": True}

    def test_each_query_uses_an_index(self, store: MongoUpstoxStorage) -> None:
        store.store_token()
        living(store)
        now = store.backend.context.now()
        dead = {"is_active": True, "expires_at": {"$lte": now}}
        queries: list[tuple[str, dict[str, Any], list[tuple[str, int]]]] = [
            ("active_tokens", {"_id": USER, "expires_at": {"$gt": now}, "ciphertext": {"$exists": True}}, []),
            ("active_tokens", {"key_id": {"$gt": "", "$ne": "other"}}, []),
            ("tokens", {"user_id": USER}, [("generation", -1)]),
            ("tokens", {"user_id": USER, "is_active": True, "generation": {"$lt": 9}}, [("generation", 1)]),
            ("tokens", {"created_at": {"$gte": now, "$lte": now}}, [("created_at", -1)]),
            ("active_tokens", {"account": "x", "ciphertext": {"$exists": True}}, [("created_at", -1)]),
            ("active_tokens", {"login.lock": USER, "login.owner": "x"}, []),
            ("tokens", dead, [("expires_at", 1)]),
            ("tokens", {"audit.user_id": USER}, []),
            ("token_audit", {"user_id": USER}, [("performed_at", -1), ("_id", -1)]),
            ("token_audit", {"performed_at": {"$lt": now}}, []),
            ("tokens", {"user_id": USER}, [("generation", 1)]),
            (
                "token_audit",
                {"action": "login", "performed_at": {"$gt": now}, "metadata.process": {"$ne": "x"}},
                [("performed_at", -1)],
            ),
            ("token_audit", {"user_id": USER, "performed_at": {"$gte": now}}, [("performed_at", 1), ("_id", 1)]),
        ]
        with self.mongo.bare() as db:
            for collection, query, order in queries:
                found = db[collection].find(query)
                plan = (found.sort(order) if order else found).explain()["queryPlanner"]["winningPlan"]
                assert "COLLSCAN" not in str(plan), (collection, query, plan)
                assert "IXSCAN" in str(plan) or "IDHACK" in str(plan), (collection, query, plan)
                assert "'SORT'" not in str(plan), (collection, query, plan)

    def test_logins_are_looked_for_among_logins_alone(self, store: MongoUpstoxStorage) -> None:
        begin = store.backend.context.now() - timedelta(seconds=1)
        store.backend.record(USER, "login", store.backend.context.now(), {"process": "another"})
        for _ in range(20):
            store.backend.record(USER, "used", store.backend.context.now())
        assert len(store.backend.logins_since(begin, "mine")) == 1
        query = {"action": "login", "performed_at": {"$gt": begin}, "metadata.process": {"$ne": "mine"}}
        with self.mongo.bare() as db:
            stats = db.token_audit.find(query).sort("performed_at", -1).limit(100).explain()["executionStats"]
        assert stats["totalKeysExamined"] == 1

    def test_an_ended_record_leaves_the_index_of_those_that_hold_audit_entries(self, store: MongoUpstoxStorage) -> None:
        for _ in range(5):
            store.store_token()
        with self.mongo.bare() as db:
            stats = db.tokens.find({"audit.user_id": USER}).explain()["executionStats"]
        assert stats["totalKeysExamined"] == 1

    # The guide's own methods

    def test_the_dashboard(self, store: MongoUpstoxStorage, clock: Clock) -> None:
        store.store_token()
        stored = store.store_token()
        living(store)
        board = store.get_user_dashboard(USER)
        assert list(board) == ["user_id", "statistics", "recent_activity", "active_token"]
        assert board["active_token"] == {"exists": True, "expires_at": stored["expires_at"], "usage_count": 1}
        assert board["statistics"] == {
            "total_tokens": 2,
            "active_tokens": 1,
            "total_usage": 1,
            "avg_usage": 0.5,
            "last_generation": clock.now.astimezone(UTC).isoformat(),
            "last_usage": clock.now.astimezone(UTC).isoformat(),
        }
        assert board["recent_activity"][0]["action"] == "used"
        told = json.dumps(board)
        assert "v2." not in told
        assert "eyJ" not in told

    def test_the_dashboard_of_an_unknown_user_has_the_same_keys(self, store: MongoUpstoxStorage) -> None:
        store.store_token()
        known, unknown = store.get_user_dashboard(USER), store.get_user_dashboard("NOBODY")
        assert list(known["statistics"]) == list(unknown["statistics"])
        assert unknown["active_token"] == {"exists": False, "expires_at": None, "usage_count": 0}
        assert unknown["recent_activity"] == []
        assert set(unknown["statistics"].values()) == {0, None}

    def test_the_dashboard_knows_of_revoked_and_dead_tokens(self, store: MongoUpstoxStorage, clock: Clock) -> None:
        store.store_token()
        clock.set(7, 3, 30)
        assert store.get_user_dashboard(USER)["active_token"]["exists"] is False
        store.store_token()
        store.revoke_token(USER)
        assert store.get_user_dashboard(USER)["active_token"]["exists"] is False

    def test_tokens_by_timeframe(self, open_store: OpenStore, clock: Clock) -> None:
        store = open_store(login=made_up_login)
        assert isinstance(store, MongoUpstoxStorage)
        for user_id in ("CD0001", "CD0002", "CD0001"):
            store.store_token(user_id)
            clock.advance(hours=1)
        found = store.get_tokens_by_timeframe(ist(6, 20), ist(6, 22))
        assert [(each["user_id"], each["is_active"]) for each in found] == [
            ("CD0001", True),
            ("CD0002", True),
            ("CD0001", False),
        ]
        assert len(store.get_tokens_by_timeframe(ist(6, 21), ist(6, 21))) == 1
        assert store.get_tokens_by_timeframe(ist(7, 21), ist(8, 21)) == []
        told = json.dumps(found)
        assert "v2." not in told
        assert {"token_id", "user_id", "user_name", "created_at", "expires_at", "usage_count", "metadata"} <= set(
            found[0]
        )

    def test_a_timeframe_without_a_time_zone_or_the_wrong_way_round_is_refused(self, store: MongoUpstoxStorage) -> None:
        with pytest.raises(InvalidInput, match="start_date must be a datetime with a time zone"):
            store.get_tokens_by_timeframe(datetime(2099, 1, 1), ist(7, 0))
        with pytest.raises(InvalidInput, match="end_date must be a datetime with a time zone"):
            store.get_tokens_by_timeframe(ist(7, 0), datetime(2099, 1, 1))
        with pytest.raises(InvalidInput, match="must not be later"):
            store.get_tokens_by_timeframe(ist(8, 0), ist(7, 0))

    # Connections

    @pytest.mark.parametrize(
        "bad",
        [
            "",
            "mongodb://",
            "mongodb://user:hunter2hunter2@host:port/",
            "mongodb://us:er:hunter2@hunter2@host/",
            "postgresql://user:hunter2hunter2@host/",
            None,
            7,
        ],
    )
    def test_a_bad_connection_string_is_refused_without_showing_it(self, bad: Any) -> None:
        with pytest.raises(StorageError) as caught:
            MongoUpstoxStorage(bad, timeout=0.5)
        assert "hunter2" not in shown_with_locals(caught.value)

    @pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "x" * 70, None])
    def test_a_bad_database_name_is_refused(self, name: Any) -> None:
        with pytest.raises(StorageError):
            MongoUpstoxStorage(self.mongo.url, name)

    def test_a_wrong_password_is_said_and_not_shown(self) -> None:
        host = self.mongo.url.rpartition("@")[2]
        with pytest.raises(ConfigurationError, match="refused the user or its password") as caught:
            MongoUpstoxStorage(f"mongodb://test:{quote_plus('hunter2/hunter2')}@{host}")
        assert "hunter2" not in shown_with_locals(caught.value)
