"""The hybrid store: no copy in Redis outlives a change in PostgreSQL, even if a reader comes late."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from upstox_db_examples import (
    HybridUpstoxStorage,
    KeyRing,
)
from upstox_db_examples.core.token import StoredToken

from ..support.hybrid import OnHybrid
from ..support.processes import USER, token_data
from ..support.stores import OpenStore, living


class TestHybrid(OnHybrid):
    # Stale copies

    @pytest.mark.parametrize("change", ["store_token", "revoke_token", "rotate_keys"])
    def test_a_reader_that_comes_late_brings_nothing_old_back(self, open_store: OpenStore, change: str) -> None:
        old, new = KeyRing.new_key(), KeyRing.new_key()
        open_store(keys=KeyRing(old)).store_token()
        writer, reader = open_store(keys=KeyRing(new, old)), open_store(keys=KeyRing(new, old))
        assert isinstance(reader, HybridUpstoxStorage)
        read_postgresql = reader.backend.postgres.find_and_record

        def and_then_something_changes(*values: Any, **options: Any) -> StoredToken | None:
            token: StoredToken | None = read_postgresql(*values, **options)
            assert getattr(writer, change)(*([] if change == "rotate_keys" else [USER]))
            return token

        self.redis.delete(self.key())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader.backend.postgres, "find_and_record", and_then_something_changes)
            assert reader.get_valid_token(USER), "the token was active when the read began"
        (row,) = (row for row in self.raw_rows() if row["is_active"] or change == "revoke_token")
        for store in (reader, writer, open_store(keys=KeyRing(new))):
            read = store.get_valid_token(USER)
            assert (read and read["token_id"]) == (row["id"] if row["is_active"] else None)

    @pytest.mark.parametrize("change", ["revoke_token", "store_token"])
    def test_a_writer_that_comes_late_brings_nothing_back_that_was_ended_since(
        self, open_store: OpenStore, change: str
    ) -> None:
        writer, other = open_store(), open_store()
        assert isinstance(writer, HybridUpstoxStorage)
        put = writer.backend.redis.put

        def ended_by_another_before(token: StoredToken, *rest: Any, **options: Any) -> int | None:
            if change == "revoke_token":
                assert other.revoke_token(USER)
            else:  # as after a login that named no user
                other.backend.insert(replace(token, token_id=None, generation=token.generation + 1))
            return put(token, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer.backend.redis, "put", ended_by_another_before)
            stored = writer.store_token(USER)
        for store in (writer, other, open_store()):
            if change == "revoke_token":
                assert store.get_valid_token(USER) is None
            else:
                assert f" {stored['token_id']} " not in self.redis.get(self.key())

    def test_a_revocation_takes_a_copy_along_that_was_put_there_meanwhile(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        revoker, writer = open_store(), open_store()
        assert isinstance(revoker, HybridUpstoxStorage)
        bury = revoker.backend.redis.bury

        def and_then_another_stores(*arguments: Any) -> Any:
            buried = bury(*arguments)
            monkeypatch.undo()
            writer.store_token(USER)
            return buried

        monkeypatch.setattr(revoker.backend.redis, "bury", and_then_another_stores)
        assert revoker.revoke_token(USER)
        assert [store.get_valid_token(USER) for store in (writer, revoker)] == [None, None]

    def test_a_copy_that_postgresql_does_not_know_any_more_is_taken_away(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.2)
        store.store_token()
        old = self.redis.get(self.key())
        store.revoke_token(USER)
        self.redis.set(self.key(), old)  # as after a revocation that Redis missed
        time.sleep(0.25)
        assert store.get_valid_token(USER) is None
        assert self.redis.get(self.key()) is None, "otherwise it would be handed out while PostgreSQL is unreachable"

    def test_a_copy_takes_the_place_of_a_dead_one(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        fresh_until, generation, _, token_id, text = self.redis.get(self.key()).split(" ", 4)
        # As after a login that Redis was not told of. The key itself ends later, by Redis's clock.
        self.redis.set(self.key(), f"{fresh_until} {generation} 1 {token_id} {text}")
        assert [living(store)["source"] for _ in range(2)] == ["postgresql", "redis"]

    def test_a_copy_is_warmed_only_by_what_was_just_read(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.2)
        assert isinstance(store, HybridUpstoxStorage)
        store.store_token()
        self.redis.delete(self.key())
        read_postgresql = store.backend.postgres.find_and_record

        def slowly(*values: Any) -> StoredToken | None:
            token: StoredToken | None = read_postgresql(*values)
            time.sleep(0.25)
            return token

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store.backend.postgres, "find_and_record", slowly)
            living(store)
        assert self.redis.get(self.key()) is None
        clock, _ = self.redis.time()
        living(store)
        fresh_until = int(self.redis.get(self.key()).partition(" ")[0])
        assert fresh_until - clock * 1000 < 2000, "the copy's lifetime must begin when PostgreSQL was asked"

    def test_a_copy_that_comes_back_from_the_past_is_not_believed_for_long(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.3)
        store.store_token()
        old = self.redis.get(self.key())
        new = store.store_token()["token"]
        self.redis.set(self.key(), old)  # like an old snapshot or a failover that lost writes
        time.sleep(0.35)
        assert living(store)["token"] == new

    def test_a_key_of_another_kind_troubles_its_own_user_only(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda user_id: token_data(user_id or USER))
        for user_id in (USER, "CD0001"):
            store.store_token(user_id)
        self.redis.delete(self.key())
        self.redis.rpush(self.key(), "a list")
        for _ in range(2):
            assert living(store)["source"] == "postgresql"
            assert store.get_valid_token("CD0001")["source"] == "redis"  # type: ignore[index]
