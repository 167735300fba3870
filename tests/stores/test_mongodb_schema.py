"""MongoDB: the collections of other programs and versions, and who may create and change them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pymongo
import pytest
from bson import ObjectId
from pymongo.errors import OperationFailure, PyMongoError, WriteError

from upstox_db_examples import (
    ConfigurationError,
    KeyRing,
    MongoUpstoxStorage,
)
from upstox_db_examples.mongodb.schema import runtime_role

from ..support.clocks import Clock
from ..support.databases import MongoDatabase
from ..support.leaks import shown_with_locals
from ..support.mongodb import PASSWORD, RUNTIME_1, OnMongoDB, another_user, restore_version_1
from ..support.processes import KEY, USER, made_up_login
from ..support.stores import OpenStore, living


class TestMongoDB(OnMongoDB):
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
                db.tokens.create_index([("expires_at", 1)], expireAfterSeconds=0)  # code 85: the guide's code stops
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
        now = store.backend.context.now()

        def entries(user_id: str) -> list[Any]:
            old = {"performed_at": now - timedelta(days=100), "actor": "a", "action": "used", "metadata": {}}
            return [{"_id": ObjectId(), "token_id": None, "user_id": user_id, **old}]

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

    # Databases of version 1

    @pytest.fixture
    def version_1(self) -> None:
        """Restore a database of version 1. It has three users, and one of them has revoked a token."""
        restore_version_1(self.mongo)

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
            assert all(indexes[name] <= set(db[name].index_information()) for name in before), "steps only add indexes"
            assert db.schema_version.find_one()["version"] == 2
        (active,) = [token for token in store.backend.read_tokens(USER) if token.ciphertext]
        assert active.ciphertext.startswith("v1.")
        assert living(store)["token"] == store.cipher.decrypt(active).reveal()
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
        assert after.backend.read_tokens(USER)[-1].ciphertext.startswith("v1.")
        assert after.cipher.decrypt(after.backend.read_tokens(USER)[-1]).reveal() == token

    @pytest.mark.usefixtures("version_1")
    @pytest.mark.parametrize("rights", [RUNTIME_1, ["readWrite"]])
    def test_without_the_right_to_upgrade_version_1_the_error_says_who_has_it(
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

    def test_without_the_right_to_make_a_role_the_error_says_who_has_it(
        self, store: MongoUpstoxStorage, mongo: MongoDatabase
    ) -> None:
        store.store_token(USER)
        self.mongo = another_user(mongo, ["readWrite"])
        with MongoUpstoxStorage(*self.mongo) as one, pytest.raises(ConfigurationError, match="with dbOwner"):
            one.init_database(runtime_role="upstox_app")

    # Rights

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
        assert runtime.backend.logins_since(runtime.backend.context.now(), "") == []
        runtime.backend.write_note("one", "text")
        runtime.backend.erase_note("one")
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
