"""MongoDB: the lease of a login, the mark on its token, and a caller that has lost its lease."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.errors import DuplicateKeyError
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    LoginSuperseded,
    MongoUpstoxStorage,
    StoreUnavailable,
    TokenNotStored,
)
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.mongodb import lease as mongodb_lease
from upstox_db_examples.mongodb.lease import Leases

from ..support.mongodb import OnMongoDB, cut_off_before
from ..support.processes import USER, made_up_login, token_data, wait_until
from ..support.stores import OpenStore, living


class TestMongoDB(OnMongoDB):
    # Marks

    def test_a_lease_that_ends_turns_its_mark_into_doubt(
        self, store: MongoUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store.store_token(USER)
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
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
        assert store.backend.find_in_doubt(USER) is not None
        assert store.get_user_statistics(USER)["total_usage"] == 2, "a read that finds no token is not counted"

    def test_a_thread_remembers_only_the_leases_that_it_held_last(self, store: MongoUpstoxStorage) -> None:
        leases = Leases(store.backend.connection.database, 5)
        with leases.hold("A", 1), leases.hold("B", 1):
            pass
        assert all(map(leases.owner_of, "AB"))
        with leases.hold("C", 1):
            assert list(map(leases.owner_of, "AB")) == ["", ""], "an import takes a lease for each of a million users"

    def test_a_login_that_comes_to_its_end_while_its_token_is_read_is_no_doubt(
        self, store: MongoUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other, ask = open_store(), Leases.lives
        store.store_token(USER)

        def ends_before_it_is_looked_for(*arguments: Any, **more: Any) -> bool:
            db.active_tokens.update_one({"_id": USER}, {"$unset": {"login": 1}})
            db.leases.delete_many({})
            return ask(*arguments, **more)

        with self.mongo.bare() as db, store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            monkeypatch.setattr(Leases, "lives", ends_before_it_is_looked_for)
            assert self.found(other)

    @pytest.mark.parametrize("ends", ["-account-x", USER])
    def test_of_a_users_two_logins_at_once_each_can_leave_a_doubt(self, store: MongoUpstoxStorage, ends: str) -> None:
        store.store_token(USER)
        with store.backend.lock("-account-x"):
            store.backend.begin_login(None, "-account-x", store.backend.context.now(), {})
            with store.backend.lock(USER):
                store.backend.begin_login(USER, USER, store.backend.context.now(), {})
                store.backend.end_login(ends, in_doubt=False)  # ... and the process of the other login dies.
        assert not self.found(store)

    def test_a_login_that_lost_its_lease_and_ends_well_leaves_the_doubt_of_the_next_one(
        self, store: MongoUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store.store_token(USER)
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            with self.mongo.bare() as db:
                db.leases.delete_many({})
            with other.backend.lock(USER):
                other.backend.begin_login(USER, USER, other.backend.context.now(), {})  # ... and its process dies.
            store.backend.end_login(USER, in_doubt=False)
        assert not self.found(other)

    def test_a_caller_that_lost_its_lease_begins_no_login(self, store: MongoUpstoxStorage) -> None:
        store.store_token(USER)
        with store.backend.lock(USER), self.mongo.bare() as db:
            db.leases.update_many({}, {"$set": {"owner": "somebody else"}})
            with pytest.raises(StoreUnavailable, match="another caller took over"):
                store.backend.begin_login(USER, USER, store.backend.context.now(), {})
        assert self.found(store)
        assert [entry["action"] for entry in store.get_audit_trail(USER)].count("login") == 1

    def test_a_login_that_lost_its_lease_leaves_the_note_of_the_next_one(self, store: MongoUpstoxStorage) -> None:
        with store.backend.lock("-account-x"):
            store.backend.begin_login(None, "-account-x", store.backend.context.now(), {})
            with self.mongo.bare() as db:
                db.login_notes.update_one({}, {"$set": {"sealed": "-account-x somebody"}})
                store.backend.end_login("-account-x", in_doubt=False)
                assert db.login_notes.count_documents({}) == 1

    def test_a_login_that_is_cut_off_before_it_begins_leaves_no_doubt(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch, upstox: LocalUpstox
    ) -> None:
        stored = store.store_token(USER)
        with pytest.raises(StoreUnavailable), cut_off_before(monkeypatch, "update_one", "active_tokens"):
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
                patch.setattr(store.backend, "lock", lambda _: nullcontext())
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
            with self.mongo.bare() as db:  # ... and does nothing with it
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
        upstox.login_seconds = 1.0  # per request, and a login has six
        slow, other = open_store(lease=1), open_store(lease=1)
        with ThreadPoolExecutor(2) as threads:
            results = [threads.submit(store.get_or_create_token, USER) for store in (slow, other)]
            assert len({result.result()["token"] for result in results}) == 1
        assert upstox.logins() == 1

    def test_one_thread_renews_all_leases_and_names_the_one_that_was_taken_over(
        self, open_store: OpenStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, before = open_store(lease=0.6), {*threading.enumerate()}
        with store.backend.lock("-account-x"), store.backend.lock(USER), self.mongo.bare() as db:
            begun = {lease["_id"]: lease["until"] for lease in db.leases.find()}
            assert len(begun) == 2
            time.sleep(0.6)
            assert all(lease["until"] > begun[lease["_id"]] for lease in db.leases.find())
            assert [each.name for each in {*threading.enumerate()} - before].count("lease renewals") == 1
            db.leases.update_one({"_id": USER}, {"$set": {"owner": "somebody else"}})
            wait_until(lambda: f"Another caller has taken over the lease of {USER}" in caplog.text)
            until = db.leases.find_one({"_id": "-account-x"})["until"]
            wait_until(lambda: db.leases.find_one({"_id": "-account-x"})["until"] > until)
            assert "the lease of -account-x" not in caplog.text

    def test_the_clock_of_this_machine_does_not_matter_for_the_lease(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class AnHourAhead(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + timedelta(hours=1)

        holder, other = open_store(), open_store(login_wait=0.3)
        with holder.backend.lock(USER):
            monkeypatch.setattr(mongodb_lease, "datetime", AnHourAhead)
            monkeypatch.setattr(time, "time", lambda: AnHourAhead.now(UTC).timestamp())
            with pytest.raises(StoreUnavailable, match="Waited"), other.backend.lock(USER):
                raise AssertionError
