"""MongoDB: the contract, and what is MongoDB's own."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlsplit

import pymongo
import pytest
from bson import ObjectId, json_util
from bson.codec_options import CodecOptions
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect, DuplicateKeyError, OperationFailure, PyMongoError, WriteError
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    ExpiryPolicy,
    InvalidInput,
    KeyRing,
    LoginSuperseded,
    MongoUpstoxStorage,
    Secret,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
    TokenStorage,
)
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.servers import MongoDBServer
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.mongodb import lease as mongodb_lease
from upstox_db_examples.mongodb.lease import Leases
from upstox_db_examples.mongodb.schema import runtime_role

from . import reliability
from .backend_contract import made_up
from .conftest import Clock, shown_with_locals
from .contract import OpenStore, StoreContract, ist, living
from .databases import MongoDatabase
from .faults import ServerContract
from .processes import KEY, USER, Address, made_up_login, token_data, wait_until
from .reliability import Counts, ReliabilityContract

VERSION_1 = Path(__file__).parent / "fixtures" / "version_1" / "mongodb.json"
PASSWORD = "hunter2hunter2"
RUNTIME_1 = ["the_runtime_role_of_version_1"]
RUNTIME_ACTIONS_1 = {
    "active_tokens": ["find", "insert", "update", "remove"],
    "tokens": ["find", "insert", "update"],
    "token_audit": ["find", "insert"],
    "leases": ["find", "insert", "update", "remove"],
    "schema_version": ["find"],
}


class TestMongoDB(StoreContract):
    @pytest.fixture(autouse=True)
    def _database(self, mongo: MongoDatabase) -> None:
        self.mongo = mongo

    def connect(self, **options: Any) -> TokenStorage:
        return MongoUpstoxStorage(self.mongo.url, self.mongo.name, **options)

    def raw_rows(self) -> list[dict[str, Any]]:
        with self.mongo.bare() as db:
            active = {each["token_id"]: each for each in db.active_tokens.find()}
            return [
                {
                    "id": record["_id"],
                    "access_token": active.get(record["_id"], {}).get("ciphertext"),
                    "key_id": active.get(record["_id"], {}).get("key_id"),
                    "account": active.get(record["_id"], {}).get("account"),
                }
                for record in db.tokens.find().sort("_id")
            ]

    def write_raw(self, token_id: Any, **values: Any) -> None:
        change = {"ciphertext" if name == "access_token" else name: value for name, value in values.items()}
        with self.mongo.bare() as db:
            db.active_tokens.with_options(CodecOptions(tz_aware=True)).update_one(
                {"token_id": token_id}, {"$set": change}, bypass_document_validation=True
            )

    @pytest.fixture
    def store(self, open_store: OpenStore) -> MongoUpstoxStorage:
        store = open_store()
        assert isinstance(store, MongoUpstoxStorage)
        return store

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
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            with sent(caplog) as commands:
                living(store)
        assert commands == ["find", "find", "findAndModify"], "the lease of the login that is under way"

    def test_notes_and_the_clock_are_two_round_trips(
        self, store: MongoUpstoxStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        store._write_note("one", "text")
        with sent(caplog) as commands:
            assert store._notes(["one"])[1] == {"one": "text"}
        assert commands == ["hello", "find"]

    def test_the_clock_of_the_database_has_no_time_zone(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        try:
            assert abs(store._notes([])[0] - time.time()) < 60
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
            db.token_audit.insert_many(record["audit"])  # moved, and killed before they were taken out of the record
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
        with store._database() as db:
            assert db.write_concern.document == {"w": "majority", "j": True}

    def test_each_query_uses_an_index(self, store: MongoUpstoxStorage) -> None:
        store.store_token()
        living(store)
        now = store._now()
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
        begin = store._now() - timedelta(seconds=1)
        store._record(USER, "login", store._now(), {"process": "another"})
        for _ in range(20):
            store._record(USER, "used", store._now())
        assert len(store._logins_since(begin, "mine")) == 1
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

    # Other programs, other versions

    def test_the_guides_collection_with_tokens_in_it_is_refused_and_left_alone(self, mongo: MongoDatabase) -> None:
        with mongo.bare() as db:
            db.tokens.create_index("expires_at")
            db.tokens.insert_one({"user_id": USER, "access_token": "plain"})
        with pytest.raises(ConfigurationError, match="made by another program"):
            self.connect()
        with mongo.bare() as db:
            assert db.list_collection_names() == ["tokens"]
            assert set(db.tokens.index_information()) == {"_id_", "expires_at_1"}

    def test_the_guides_collection_as_its_failed_start_leaves_it_is_taken_over(self, open_store: OpenStore) -> None:
        with self.mongo.bare() as db:
            db.tokens.create_index([("user_id", 1), ("is_active", 1), ("expires_at", -1)])
            db.tokens.create_index([("expires_at", 1)])
            db.tokens.create_index([("created_at", -1)])
            db.token_audit.create_index([("user_id", 1), ("performed_at", -1)])
            with pytest.raises(PyMongoError):
                db.tokens.create_index([("expires_at", 1)], expireAfterSeconds=0)  # code 85: here the guide ends
        assert open_store().store_token()["token"] == living(open_store())["token"]

    @pytest.mark.parametrize("options", [{}, {"expireAfterSeconds": 3600}])
    def test_another_index_on_the_time_of_death_becomes_the_ttl(
        self, open_store: OpenStore, options: dict[str, int]
    ) -> None:
        with self.mongo.bare() as db:
            db.active_tokens.create_index("expires_at", **options)
        open_store()
        with self.mongo.bare() as db:
            assert db.active_tokens.index_information()["expires_at_1"]["expireAfterSeconds"] == 0

    @pytest.mark.parametrize("collection", ["tokens", "token_audit"])
    def test_a_ttl_that_would_delete_history_is_refused(self, collection: str) -> None:
        with self.mongo.bare() as db:
            db[collection].create_index([("expires_at", 1)], expireAfterSeconds=0)
        with pytest.raises(ConfigurationError, match=f"TTL index on {collection}, which would delete history"):
            self.connect()

    def test_a_cleanup_of_many_users_sends_some_commands_and_not_one_for_each(
        self, store: MongoUpstoxStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        now = store._now()

        def entries(user_id: str) -> list[Any]:
            return [store._entry(user_id, "used", now - timedelta(days=100))]

        names = {"is_active": False, "created_at": now, "expires_at": now, "usage_count": 1, "last_used_at": None}
        with self.mongo.bare() as db:
            users = [f"CD{number:04}" for number in range(1200)]
            db.tokens.insert_many(
                {"user_id": user_id, "generation": 1, **names, "audit": entries(user_id)} for user_id in users
            )
        with caplog.at_level(logging.DEBUG, "pymongo.command"):
            assert store.cleanup_old_audit_entries() == 1200
        commands = [record for record in caplog.records if "Command started" in record.getMessage()]
        assert 5 < len(commands) < 40

    def test_an_index_in_the_way_is_named(self) -> None:
        with self.mongo.bare() as db:
            db.tokens.create_index([("user_id", 1), ("generation", -1)])
        with pytest.raises(ConfigurationError, match=r"another index on user_id, generation of tokens\. Drop it"):
            self.connect()

    def test_a_later_version_is_refused_and_a_start_that_was_cut_off_goes_on(self, open_store: OpenStore) -> None:
        open_store().store_token()
        with self.mongo.bare() as db:
            db.schema_version.update_one({}, {"$set": {"version": 0}})
            db.tokens.drop_index("created_at_-1")
        open_store()
        with self.mongo.bare() as db:
            assert "created_at_-1" in db.tokens.index_information()
            db.schema_version.update_one({}, {"$set": {"version": 3}})
        with pytest.raises(ConfigurationError, match=r"schema version 3, but this package knows 2\. Upgrade it"):
            self.connect()

    def test_many_can_make_the_collections_at_once(self, open_store: OpenStore) -> None:
        with ThreadPoolExecutor(8) as threads:
            stores = list(threads.map(lambda _: open_store(), range(8)))
        assert stores[0].store_token()["token"] == living(stores[7])["token"]

    # What version 1 has made

    @pytest.fixture
    def version_1(self) -> None:
        """A database as version 1 has left it: three users, one of whom has revoked his token."""
        collections = json_util.loads(VERSION_1.read_text())
        with self.mongo.bare() as db:
            for name, made in collections.items():
                db.create_collection(name, **made["options"])
                for index in made["indexes"]:
                    options = {key: value for key, value in index.items() if key not in ("v", "key")}
                    if index["name"] != "_id_":
                        db[name].create_index(list(index["key"].items()), **options)
                if made["documents"]:
                    db[name].insert_many(made["documents"])

    @pytest.mark.usefixtures("version_1")
    def test_a_database_of_version_1_is_brought_forward_and_its_token_read(
        self, open_store: OpenStore, clock: Clock
    ) -> None:
        with self.mongo.bare() as db:
            before = {name: sorted(map(str, db[name].find())) for name in ("active_tokens", "tokens", "token_audit")}
            indexes = {name: set(db[name].index_information()) for name in before}
        clock.set(6, 10)
        with ThreadPoolExecutor(4) as threads:
            store, *others = threads.map(lambda _: open_store(keys=KEY, login=made_up_login), range(4))
        with self.mongo.bare() as db:
            assert {name: sorted(map(str, db[name].find())) for name in before} == before
            assert all(indexes[name] <= set(db[name].index_information()) for name in before), "steps only add"
            assert db.schema_version.find_one()["version"] == 2
        (active,) = [token for token in store._tokens_of(USER) if token.ciphertext]
        assert active.ciphertext.startswith("v1.")
        assert living(store)["token"] == store._decrypt(active).reveal()
        assert store.get_valid_token("CD5678") is None
        second = others[0].store_token(USER)
        assert living(store)["token"] == second["token"]
        with self.mongo.bare() as db:
            assert db.active_tokens.find_one({"_id": USER})["ciphertext"].startswith("v2.")
            with pytest.raises(WriteError):
                db.active_tokens.update_one({"_id": USER}, {"$set": {"ciphertext": "eyJ0eXAi" * 9}})

    @pytest.mark.usefixtures("version_1")
    def test_a_token_of_version_1_is_rotated_and_still_bound_to_no_account(
        self, open_store: OpenStore, clock: Clock
    ) -> None:
        clock.set(6, 10)
        token = living(open_store(keys=KEY))["token"]
        new = KeyRing.new_key()
        assert open_store(keys=KeyRing(new, b"the same key for all processes..")).rotate_keys() == 2
        after = open_store(keys=KeyRing(new))
        assert living(after)["token"] == token
        assert after._tokens_of(USER)[-1].ciphertext.startswith("v1.")
        assert after._decrypt(after._tokens_of(USER)[-1]).reveal() == token

    @pytest.mark.usefixtures("version_1")
    @pytest.mark.parametrize("rights", [RUNTIME_1, ["readWrite"]])
    def test_a_user_who_may_not_bring_version_1_forward_is_told_who_may(
        self, rights: list[str], mongo: MongoDatabase
    ) -> None:
        self.mongo = another_user(mongo, rights)
        with pytest.raises(
            ConfigurationError,
            match=r"has schema version 1, but this package needs 2, .* run: upstox-db init --runtime-role ROLE",
        ) as caught:
            self.connect()
        assert PASSWORD not in shown_with_locals(caught.value)
        with mongo.bare() as db:
            assert db.schema_version.find_one()["version"] == 1

    @pytest.mark.usefixtures("version_1")
    def test_an_owner_brings_version_1_forward_and_a_role_with_it(
        self, mongo: MongoDatabase, open_store: OpenStore, clock: Clock
    ) -> None:
        clock.set(6, 10)
        runtime = another_user(mongo, RUNTIME_1)
        self.mongo = another_user(mongo, ["dbOwner"])
        owner = open_store(keys=KEY)
        self.mongo = runtime
        behind = open_store(keys=KEY, login=made_up_login)
        with pytest.raises(ConfigurationError, match="upstox-db init --runtime-role ROLE"):
            behind.store_token(USER)
        assert isinstance(owner, MongoUpstoxStorage)
        owner.init_database(runtime_role=RUNTIME_1[0])
        owner.init_database(runtime_role=RUNTIME_1[0])
        stored = behind.store_token(USER)
        assert living(behind)["token"] == stored["token"]
        with self.mongo.bare() as db, pytest.raises(OperationFailure, match="not authorized"):
            db.token_audit.delete_many({})

    @pytest.mark.parametrize("name", ["readWrite", "", "a\0b"])
    def test_a_name_that_no_role_can_have_is_refused(self, store: MongoUpstoxStorage, name: str) -> None:
        with pytest.raises(ConfigurationError, match="is not a valid role name"):
            store.init_database(runtime_role=name)

    def test_a_user_who_may_not_make_a_role_is_told_who_may(
        self, store: MongoUpstoxStorage, mongo: MongoDatabase
    ) -> None:
        store.store_token(USER)
        self.mongo = another_user(mongo, ["readWrite"])
        with MongoUpstoxStorage(*self.mongo) as one, pytest.raises(ConfigurationError, match="with dbOwner"):
            one.init_database(runtime_role="upstox_app")

    # Marks

    def found(self, store: TokenStorage, user_id: str = USER, *, locked: bool = False) -> bool:
        return store._find(user_id, store._now(), store._now(), locked=locked) is not None

    def test_a_lease_that_ends_turns_its_mark_into_doubt(
        self, store: MongoUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store.store_token(USER)
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            with self.mongo.bare() as db:
                (lease,) = db.leases.find()
                for change, is_found in [
                    ({"until": datetime.now(UTC) - timedelta(hours=9)}, False),
                    ({"until": lease["until"]}, True),
                    ({"owner": "somebody else"}, False),
                    ({"owner": lease["owner"]}, True),
                ]:
                    db.leases.update_one({}, {"$set": change})
                    assert self.found(other) is is_found, change
                db.leases.delete_many({})
                assert not self.found(other)
        assert store._in_doubt(USER) is not None
        assert store.get_user_statistics(USER)["total_usage"] == 2, "what is not found is not counted"

    def test_a_login_that_comes_to_its_end_while_its_token_is_read_is_no_doubt(
        self, store: MongoUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other, ask = open_store(), Leases.lives
        store.store_token(USER)

        def ends_before_it_is_looked_for(*arguments: Any) -> bool:
            db.active_tokens.update_one({"_id": USER}, {"$unset": {"login": 1}})
            db.leases.delete_many({})
            return ask(*arguments)

        with self.mongo.bare() as db, store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            monkeypatch.setattr(Leases, "lives", ends_before_it_is_looked_for)
            assert self.found(other)

    @pytest.mark.parametrize("ends", ["-account-x", USER])
    def test_of_a_users_two_logins_at_once_each_can_leave_a_doubt(self, store: MongoUpstoxStorage, ends: str) -> None:
        store.store_token(USER)
        with store._lock("-account-x"):
            store._begin_login(None, "-account-x", store._now(), {})
            with store._lock(USER):
                store._begin_login(USER, USER, store._now(), {})
                store._end_login(ends, in_doubt=False)  # ... and the other one's process dies.
        assert not self.found(store)

    def test_a_caller_who_has_lost_the_lease_begins_no_login(self, store: MongoUpstoxStorage) -> None:
        store.store_token(USER)
        with store._lock(USER), self.mongo.bare() as db:
            db.leases.update_many({}, {"$set": {"owner": "somebody else"}})
            with pytest.raises(StoreUnavailable, match="another caller took over"):
                store._begin_login(USER, USER, store._now(), {})
        assert self.found(store)
        assert [entry["action"] for entry in store.get_audit_trail(USER)].count("login") == 1

    def test_a_login_that_is_cut_off_before_it_begins_leaves_no_doubt(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch, upstox: LocalUpstox
    ) -> None:
        stored = store.store_token(USER)
        with pytest.raises(StoreUnavailable), cut_off_before(monkeypatch, "bulk_write", "active_tokens"):
            store.store_token(USER)
        assert upstox.logins() == 1
        assert living(store)["token"] == stored["token"]
        assert [entry["action"] for entry in store.get_audit_trail(USER)].count("login") == 2

    @pytest.mark.parametrize(("collection", "key"), [("tokens", "email"), ("active_tokens", "key_id")])
    def test_a_unique_index_of_somebody_else_is_named_and_no_newer_login(
        self, open_store: OpenStore, collection: str, key: str
    ) -> None:
        store = open_store(login=made_up_login)
        with self.mongo.bare() as db:
            db[collection].drop_indexes() if collection == "active_tokens" else None
            db[collection].create_index(key, unique=True)
        store.store_token("CD0001")
        with pytest.raises(TokenNotStored) as caught:
            store.store_token("CD0002")
        reason = caught.value.__cause__
        assert isinstance(reason, ConfigurationError)
        assert f"a unique index on {key} that this package did not make" in str(reason)
        assert isinstance(reason.__cause__, DuplicateKeyError)
        assert store.get_valid_token("CD0002") is None

    # The lease and its fence

    def test_a_login_that_comes_too_late_is_refused(self, store: MongoUpstoxStorage, open_store: OpenStore) -> None:
        def login_while_another_is_faster(_: str | None) -> AccessTokenData:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store, "_lock", lambda _: nullcontext())
                store.store_token(USER)
            return token_data(USER)

        late = open_store(login=login_while_another_is_faster)
        with pytest.raises(LoginSuperseded):
            late.store_token(USER)
        assert len([row for row in self.raw_rows() if row["access_token"]]) == 1
        assert living(store)["token"] != token_data(USER).access_token

    @pytest.mark.parametrize("user_id", [USER, None])
    def test_a_login_whose_lease_was_lost_stores_its_token_all_the_same(
        self, open_store: OpenStore, user_id: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        def login_while_the_lease_goes(_: str | None) -> AccessTokenData:
            with self.mongo.bare() as db:
                db.leases.update_many({}, {"$set": {"owner": "somebody else"}})
            wait_until(
                lambda: f"Another caller has taken over the lease of {user_id or '-account-default'}" in caplog.text
            )
            with self.mongo.bare() as db:  # ... who does nothing with it
                db.leases.delete_many({})
            return token_data(USER)

        late = open_store(login=login_while_the_lease_goes, lease=0.3)
        late.store_token(user_id)
        assert living(late)["token"] == token_data(USER).access_token

    def test_an_older_token_cannot_come_back_after_a_revocation(self, store: MongoUpstoxStorage) -> None:
        store.store_token()
        with self.mongo.bare() as db:
            (older,) = db.active_tokens.find()
        store.store_token()
        store.revoke_token(USER)
        with self.mongo.bare() as db, pytest.raises(DuplicateKeyError):
            user_id = older.pop("_id")
            db.active_tokens.replace_one({"_id": user_id, "generation": {"$lt": 1}}, older, upsert=True)
        assert store.get_valid_token(USER) is None

    def test_a_slow_login_keeps_its_lease(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        upstox.login_seconds = 1.0  # a request; a login has six
        slow, other = open_store(lease=1), open_store(lease=1)
        with ThreadPoolExecutor(2) as threads:
            results = [threads.submit(store.get_or_create_token, USER) for store in (slow, other)]
            assert len({result.result()["token"] for result in results}) == 1
        assert upstox.logins() == 1

    def test_the_clock_of_this_machine_does_not_matter_for_the_lease(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class AnHourAhead(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + timedelta(hours=1)

        holder, other = open_store(), open_store(login_wait=0.3)
        with holder._lock(USER):
            monkeypatch.setattr(mongodb_lease, "datetime", AnHourAhead)
            monkeypatch.setattr(time, "time", lambda: AnHourAhead.now(UTC).timestamp())
            with pytest.raises(StoreUnavailable, match="Waited"), other._lock(USER):
                raise AssertionError

    # What is cut off in the middle

    def test_the_dashboard_shows_the_token_that_is_handed_out_while_another_is_stored(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = store.store_token(USER)
        with pytest.raises(TokenNotStored), cut_off_before(monkeypatch, "find_one_and_replace"):
            store.store_token(USER)
        living(store)
        active = {"exists": True, "expires_at": stored["expires_at"], "usage_count": 1}
        assert store.get_user_dashboard(USER)["active_token"] == active

    def test_records_that_are_behind_cost_one_login_and_no_token(
        self, store: MongoUpstoxStorage, upstox: LocalUpstox
    ) -> None:
        for _ in range(3):
            store.store_token(USER)
        with self.mongo.bare() as db:  # as after a restore that was not of one moment
            db.tokens.delete_many({"generation": {"$gt": 1}})
        with pytest.raises(StoreUnavailable, match="Store a new token"):
            store.get_valid_token(USER)
        stored = store.store_token(USER)
        assert living(store)["token"] == stored["token"]
        assert upstox.logins() == 4

    @pytest.mark.parametrize("what_follows", ["revoke_token", "cleanup", "store_token"])
    def test_a_revocation_that_was_cut_off_is_audited_by_what_follows(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch, clock: Clock, what_follows: str
    ) -> None:
        store.store_token(USER)
        with pytest.raises(StorageError), cut_off_before(monkeypatch, "bulk_write"):
            store.revoke_token(USER)
        assert store.get_valid_token(USER) is None
        if what_follows == "revoke_token":
            assert store.revoke_token(USER) is False
        elif what_follows == "store_token":
            store.store_token(USER)
        else:
            clock.advance(days=1)
            assert store.cleanup_expired_tokens() == 1
        told = [entry["action"] for entry in store.get_audit_trail(USER)]
        assert told.count("revoked") == 1
        assert not {"deactivated", "expired"} & set(told)

    def test_a_record_without_its_swap_changes_nothing_and_is_taken_over_by_the_next_store(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch, clock: Clock
    ) -> None:
        first = store.store_token(USER)["token"]
        clock.advance(seconds=1)  # so that the second one is issued later
        with pytest.raises(TokenNotStored) as caught, cut_off_before(monkeypatch, "find_one_and_replace"):
            store.store_token(USER)
        with self.mongo.bare() as db:
            assert db.active_tokens.find_one({"_id": USER})["generation"] == 1
            assert db.tokens.count_documents({}) == 2, "both attempts have one record"
        newest = store._newest(USER)
        assert newest is not None
        assert store._decrypt(newest).reveal() == first, "the token that never became active hides no other"
        assert newest.in_doubt
        assert [row["is_active"] for row in store.get_token_history(USER)] == [False, True]
        # Upstox has killed the first one, and nobody waits for the lease to end by itself.
        wait_until(lambda: store.get_valid_token(USER) is None, seconds=3)
        assert store.save_token(token_data(USER, caught.value.token.reveal()))["token"] == living(store)["token"]
        assert store._tokens_of(USER)[-1].generation == 2
        third = store.store_token(USER)["token"]
        assert living(store)["token"] == third
        with self.mongo.bare() as db:
            assert db.tokens.count_documents({"is_active": True}) == 1

    def test_a_save_that_is_cut_off_once_is_done_at_the_second_attempt(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(login=lambda _: token_data(USER, "opaque-" * 9))
        with cut_off_before(monkeypatch, "find_one_and_replace", times=1):
            stored = store.store_token(USER)
        assert living(store)["token"] == stored["token"]
        assert [row["token_id"] for row in store.get_token_history(USER)] == [stored["token_id"]]

    @pytest.mark.parametrize("came_by", ["login", "migration"])
    def test_a_record_that_was_used_or_migrated_is_not_taken_over(
        self, store: MongoUpstoxStorage, came_by: str
    ) -> None:
        for generation in (1, 2):
            with self.mongo.bare() as db:
                before = db.active_tokens.find_one()
            token = made_up(store, USER, generation)
            if came_by == "login":
                store._insert(token)
                living(store)
            else:
                store._put_in(USER, [token], [])
        with self.mongo.bare() as db:  # as after a restore that was not of one moment, or a migration that was killed
            db.active_tokens.replace_one({}, before)
        newest = store._newest(USER)
        assert newest is not None
        assert newest.generation == 2
        with pytest.raises(LoginSuperseded):
            store._insert(made_up(store, USER, 2))

    def test_a_swap_whose_tidying_up_fails_is_stored_all_the_same(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.store_token(USER)
        with cut_off_before(monkeypatch, "bulk_write", "tokens"):
            second = store.store_token(USER)["token"]
        assert f"The record of the earlier token of {USER} is still marked as active" in caplog.text
        assert living(store)["token"] == second
        assert [row["is_active"] for row in store.get_token_history(USER)] == [True, False]
        store.store_token(USER)
        told = [e["action"] for e in store.get_audit_trail(USER) if e["action"] == "deactivated"]
        assert told == ["deactivated"] * 2

    def test_a_revocation_that_is_cut_off_holds_and_is_told_later(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token(USER)
        with pytest.raises(StoreUnavailable), cut_off_before(monkeypatch, "bulk_write"):
            store.revoke_token(USER)
        assert store.get_valid_token(USER) is None
        store.store_token(USER)
        told = [e["action"] for e in store.get_audit_trail(USER) if e["action"] not in ("login",)]
        assert sorted(told) == ["created", "created", "revoked"]

    def test_a_token_whose_record_is_gone_is_not_handed_out_uncounted(self, store: MongoUpstoxStorage) -> None:
        store.store_token(USER)
        with self.mongo.bare() as db:
            db.tokens.delete_many({})
        with pytest.raises(StoreUnavailable, match="no record to count this use in"):
            store.get_valid_token(USER)

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

    @pytest.mark.parametrize("made_by", ["the command", "init_database"])
    def test_a_role_with_the_least_rights_can_do_all_that_is_due_and_nothing_else(
        self, mongo: MongoDatabase, open_store: OpenStore, clock: Clock, made_by: str
    ) -> None:
        name = f"runtime_{mongo.name}"
        owner = open_store()
        assert isinstance(owner, MongoUpstoxStorage)
        owner.store_token()
        with pymongo.MongoClient[Any](mongo.url) as client:
            if made_by == "the command":
                client[mongo.name].command(runtime_role(name, mongo.name))
            else:
                owner.init_database(runtime_role=name)
            client[mongo.name].command("createUser", name, pwd="secret", roles=[name])
        parts = urlsplit(mongo.url)
        host = f"{name}:secret@{parts.hostname}:{parts.port}"
        self.mongo = MongoDatabase(f"mongodb://{host}/?authSource={mongo.name}&directConnection=true", mongo.name)
        runtime = open_store()
        runtime.store_token()
        for _ in range(101):
            living(runtime)
        runtime.revoke_token(USER)
        with pytest.raises(ZeroDivisionError):
            open_store(login=lambda _: 1 // 0).store_token(USER)
        assert runtime._other_logins(60) == []
        runtime._write_note("one", "text")
        runtime._erase_note("one")
        runtime.store_token()
        assert runtime.rotate_keys() == 0
        clock.set(7, 3, 30)
        assert runtime.cleanup_expired_tokens() == 1
        assert len(runtime.get_audit_trail(USER, 500)) > 105
        with self.mongo.bare() as db:
            attempts: list[Callable[[], object]] = [
                lambda: db.token_audit.delete_many({}),
                lambda: db.token_audit.update_many({}, {"$set": {"actor": "nobody"}}),
                lambda: db.tokens.delete_many({}),
                lambda: db.tokens.drop(),
                lambda: db.command("collMod", "active_tokens", validator={}),
                lambda: db.active_tokens.create_index("user_id"),
                lambda: db.client["another"].things.find_one(),
                lambda: db.command("createUser", "another", pwd="x", roles=[]),
            ]
            for forbidden in attempts:
                with pytest.raises(OperationFailure, match="not authorized"):
                    forbidden()

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


class TestMongoDBUnderCrowdsAndKills(ReliabilityContract):
    takeover = 3
    in_a_crowd = {"timeout": 60.0, "lease": 10.0}

    @pytest.fixture
    def address(self, mongo: MongoDatabase) -> Address:
        MongoUpstoxStorage(*mongo).close()
        return Address("upstox_db_examples:MongoUpstoxStorage", tuple(mongo), {"lease": self.takeover})

    @pytest.mark.slow
    def test_a_writer_can_be_killed_200_times(self, address: Address, count: Callable[[], Counts]) -> None:
        # Each killed writer leaves a lease to wait for, so this one is short.
        short = address._replace(options={"lease": 0.1})
        reliability.a_writer_can_be_killed_at_any_moment(short, count, within=0.2)

    @pytest.fixture
    def count(self, mongo: MongoDatabase) -> Callable[[], Counts]:
        def counted() -> Counts:
            with mongo.bare() as db:
                records = {each["_id"]: each for each in db.tokens.find()}
                created = {e["token_id"] for e in db.token_audit.find({"action": "created"})}
                created |= {
                    e["token_id"] for each in records.values() for e in each["audit"] if e["action"] == "created"
                }
                active = [str(each["token_id"]) for each in db.active_tokens.find({"_id": USER})]
            generations = {str(token_id): record["generation"] for token_id, record in records.items()}
            return Counts(active, generations, len(created ^ set(records)))

        return counted


class TestTheTTL:
    """On a server whose TTL monitor runs each second; here time is the real one."""

    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[MongoDBServer]:
        monkeypatch.delenv("MONGODB_URL", raising=False)
        with MongoDBServer(settings={"ttlMonitorSleepSecs": "1"}) as server:
            yield server

    def test_the_ciphertext_goes_by_itself_and_the_history_stays(self, server: MongoDBServer, keys: KeyRing) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        with MongoUpstoxStorage(server.url, login=login, keys=keys, policy=FewSeconds()) as store:
            stored = store.store_token(USER)
            assert living(store)["usage_count"] == 1
            with store._lock(USER):
                store._begin_login(USER, USER, store._now(), {})  # A marked document goes as any other does.
            with pymongo.MongoClient[Any](server.url) as client:
                db = client.upstox_db
                assert db.active_tokens.count_documents({}) == 1
                wait_until(lambda: db.active_tokens.count_documents({}) == 0)
                assert "v2." not in "".join(map(str, [*db.tokens.find(), *db.token_audit.find()]))
            assert store.get_valid_token(USER) is None
            assert store.get_token_history(USER)[0]["token_id"] == stored["token_id"]
            assert store.get_user_statistics(USER)["total_usage"] == 1
            assert [entry["action"] for entry in store.get_audit_trail(USER)] == ["login", "used", "created", "login"]
            assert store.cleanup_expired_tokens() == 1
            assert store.get_audit_trail(USER)[0]["action"] == "expired"

    def test_a_read_does_not_wait_for_the_ttl(self, keys: KeyRing, mongo: MongoDatabase) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        options: dict[str, Any] = {"login": login, "keys": keys, "policy": FewSeconds()}
        with MongoUpstoxStorage(*mongo, **options) as store:
            store.store_token(USER)
            time.sleep(3)
            assert store.get_valid_token(USER) is None


class FewSeconds(ExpiryPolicy):
    """Tokens that die soon, so that a test need not wait until 03:30."""

    def __init__(self) -> None:
        super().__init__(margin=timedelta(0))

    def expires_at(self, _: Secret, now: datetime) -> datetime:
        return now + timedelta(seconds=2)


class TestAServerThatFails(ServerContract):
    kind, name = MongoDBServer, "mongodb"

    def connect(self, url: str, **options: Any) -> TokenStorage:
        # A writer whose server is killed leaves a lease to wait for, so this one is short.
        return MongoUpstoxStorage(url, lease=0.3, **options)


def test_tls_is_verified_and_a_wrong_authority_is_refused(
    tmp_path: Path, keys: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MONGODB_URL", raising=False)
    stranger, _, _ = make_certificates(tmp_path)
    with MongoDBServer(tls=True) as server:
        url = f"{server.url}&tls=true"
        with MongoUpstoxStorage(f"{url}&tlsCAFile={server.ca_file}", login=made_up_login, keys=keys) as store:
            assert store.store_token(USER)["token"] == living(store)["token"]
        for refused in (f"{url}&tlsCAFile={stranger}", url):
            with pytest.raises(ConfigurationError, match="failed the TLS check"):
                MongoUpstoxStorage(refused, timeout=1)


@contextmanager
def cut_off_before(
    patch: pytest.MonkeyPatch, method: str, collection: str | None = None, times: float = float("inf")
) -> Iterator[None]:
    """Where pymongo's collection would do this, the connection is lost; in this collection alone, so many times."""
    original, lost = getattr(Collection, method), 0

    def lose(self: Collection[Any], *arguments: Any, **options: Any) -> Any:
        nonlocal lost
        if collection in (None, self.name) and lost < times:
            lost += 1
            raise AutoReconnect("connection closed")
        return original(self, *arguments, **options)

    with patch.context() as patched:
        patched.setattr(Collection, method, lose)
        yield


@contextmanager
def sent(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The commands that the driver sends in here, by name; they are there at the end."""
    commands: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "pymongo.command"):
        yield commands
    told = [record.getMessage() for record in caplog.records if record.name == "pymongo.command"]
    begun = "".join(text for text in told if "Command started" in text)
    commands += re.findall('"commandName": "(.+?)"', begun)


def another_user(mongo: MongoDatabase, rights: list[str]) -> MongoDatabase:
    """The same database, opened by a user with these rights; a role that is not there has those of version 1."""
    name = f"user_{uuid.uuid4().hex}"
    with mongo.bare() as db:
        if rights == RUNTIME_1:
            privileges = [
                {"resource": {"db": mongo.name, "collection": collection}, "actions": actions}
                for collection, actions in RUNTIME_ACTIONS_1.items()
            ]
            db.command("createRole", RUNTIME_1[0], privileges=privileges, roles=[])
        db.command("createUser", name, pwd=PASSWORD, roles=rights)
    host = urlsplit(mongo.url).netloc.rpartition("@")[2]
    options = f"authSource={mongo.name}&directConnection=true"
    return MongoDatabase(f"mongodb://{name}:{PASSWORD}@{host}/?{options}", mongo.name)
