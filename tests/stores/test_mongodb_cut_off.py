"""MongoDB: a change of several documents that is cut off in the middle."""

from __future__ import annotations

import pytest

from upstox_db_examples import (
    LoginSuperseded,
    MongoUpstoxStorage,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
)
from upstox_db_examples.local.upstox import LocalUpstox

from ..contracts.backend import made_up
from ..support.clocks import Clock
from ..support.mongodb import OnMongoDB, cut_off_before
from ..support.processes import USER, token_data, wait_until
from ..support.stores import OpenStore, living


class TestMongoDB(OnMongoDB):
    # Changes that are cut off in the middle

    def test_the_dashboard_shows_the_token_that_is_handed_out_while_another_is_stored(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = store.store_token(USER)
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            with pytest.raises(StorageError), cut_off_before(monkeypatch, "find_one_and_replace"):
                store.backend.insert(made_up(store, USER, 2))
            living(store)
            active = {"exists": True, "expires_at": stored["expires_at"], "usage_count": 1}
            assert store.get_user_dashboard(USER)["active_token"] == active

    def test_records_that_are_behind_cost_one_login_and_no_token(
        self, store: MongoUpstoxStorage, upstox: LocalUpstox
    ) -> None:
        for _ in range(3):
            store.store_token(USER)
        with self.mongo.bare() as db:  # as after a restore that mixes two moments
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
        clock.advance(seconds=1)  # so that the second token is issued later
        with pytest.raises(TokenNotStored) as caught, cut_off_before(monkeypatch, "find_one_and_replace"):
            store.store_token(USER)
        with self.mongo.bare() as db:
            assert db.active_tokens.find_one({"_id": USER})["generation"] == 1
            assert db.tokens.count_documents({}) == 2, "both attempts share one record"
        newest = store.backend.find_newest(USER)
        assert newest is not None
        assert store.cipher.decrypt(newest).reveal() == first, "a token that never became active must not hide others"
        assert newest.in_doubt
        assert [row["is_active"] for row in store.get_token_history(USER)] == [False, True]
        # Upstox has killed the first token. The store gives its lease back, so nobody waits for the lease to end.
        wait_until(lambda: store.get_valid_token(USER) is None, seconds=3)
        assert store.save_token(token_data(USER, caught.value.token.reveal()))["token"] == living(store)["token"]
        assert store.backend.read_tokens(USER)[-1].generation == 2
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
                store.backend.insert(token)
                living(store)
            else:
                store.backend.merge(USER, [token], [])
        with self.mongo.bare() as db:  # as after a restore that mixes two moments, or a migration that was killed
            db.active_tokens.replace_one({}, before)
        newest = store.backend.find_newest(USER)
        assert newest is not None
        assert newest.generation == 2
        with pytest.raises(LoginSuperseded):
            store.backend.insert(made_up(store, USER, 2))

    def test_a_swap_whose_tidying_up_fails_is_stored_all_the_same(
        self, store: MongoUpstoxStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.store_token(USER)
        with cut_off_before(monkeypatch, "update_one", "tokens"):
            second = store.store_token(USER)["token"]
        assert f"The record of the earlier token of {USER} is still marked as active" in caplog.text
        assert living(store)["token"] == second
        assert [row["is_active"] for row in store.get_token_history(USER)] == [True, False]
        store.store_token(USER)
        told = [e["action"] for e in store.get_audit_trail(USER) if e["action"] == "deactivated"]
        assert told == ["deactivated"] * 2

    def test_a_revocation_that_is_cut_off_holds_and_is_audited_later(
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
