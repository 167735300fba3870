"""The hybrid store: Redis has no copy of a token while the token is marked."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from upstox_db_examples import (
    HybridUpstoxStorage,
)
from upstox_db_examples.core.token import StoredToken

from ..contracts.backend import made_up
from ..support.hybrid import OnHybrid
from ..support.processes import USER
from ..support.stores import OpenStore, living


class TestHybrid(OnHybrid):
    # Marks

    def test_no_copy_lies_in_redis_while_a_token_is_marked(self, open_store: OpenStore) -> None:
        store, other = open_store(believed=0.2), open_store(believed=0.2)
        assert isinstance(store, HybridUpstoxStorage)
        store.backend.insert(made_up(store, USER))
        assert living(other)["source"] == "redis"
        store.backend.buried_for = 0.2
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            assert self.redis.get(self.key()).startswith("tombstone"), "the login begins only once the copy is gone"
            time.sleep(0.25)
            assert self.redis.get(self.key()) is None
            assert [living(other)["source"] for _ in range(2)] == ["postgresql"] * 2
            assert self.redis.get(self.key()) is None, "nobody may put a copy of a marked token there"
            store.backend.end_login(USER, in_doubt=False)
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]

    def test_the_next_reader_fills_redis_when_a_login_has_made_no_token(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.end_login(USER, in_doubt=False)
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.end_login(USER, in_doubt=True)
        assert other.get_valid_token(USER) is None
        with store.backend.lock(USER):
            store.backend.clear_doubt(store.backend.find_in_doubt(USER))  # type: ignore[arg-type]
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]

    def test_no_tombstone_of_another_is_taken_away(self, store: HybridUpstoxStorage) -> None:
        store.backend.insert(made_up(store, USER))
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            store.backend.redis.bury([USER], 10)
            store.backend.end_login(USER, in_doubt=False)
        assert self.redis.get(self.key()).startswith("tombstone")

    def test_a_login_without_a_user_id_leaves_no_copy_and_the_others_come_back(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        other, users = open_store(), [USER, "CD0001", "CD0002"]
        for user_id in users:
            store.backend.insert(made_up(store, user_id))
        with store.backend.lock("-account-x"):
            store.backend.begin_login(None, "-account-x", store.backend.context.now(), {})
            found = [self.redis.get(self.key(user_id)) for user_id in users]
            assert all(copy.startswith("tombstone") for copy in found), found
            store.backend.insert(made_up(store, USER, 2))
            store.backend.end_login("-account-x", in_doubt=False)
        for user_id in users:
            sources = [other.get_valid_token(user_id)["source"] for _ in range(2)]  # type: ignore[index]
            assert sources[1] == "redis"

    def test_a_reader_that_comes_late_brings_no_copy_of_a_token_that_was_marked_since(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = open_store()
        assert isinstance(reader, HybridUpstoxStorage)
        store.backend.insert(made_up(store, USER))
        self.redis.delete(self.key())
        read_postgresql = reader.backend.postgres.find_and_record

        def and_then_a_login_dies(*values: Any, **options: Any) -> StoredToken | None:
            token = read_postgresql(*values, **options)
            with store.backend.lock(USER):
                store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            return token

        with monkeypatch.context() as patch:
            patch.setattr(reader.backend.postgres, "find_and_record", and_then_a_login_dies)
            assert living(reader), "the token was not in doubt when the read began"
        assert self.redis.get(self.key()).startswith("tombstone")
        assert reader.get_valid_token(USER) is None

    def test_a_reader_that_comes_late_finds_that_a_tombstone_was_there(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = open_store()
        assert isinstance(reader, HybridUpstoxStorage)
        store.backend.insert(made_up(store, USER))
        self.redis.delete(self.key())
        read_postgresql = reader.backend.postgres.find_and_record

        def and_then_two_logins_come_by(*values: Any, **options: Any) -> StoredToken | None:
            token = read_postgresql(*values, **options)
            store.backend.insert(made_up(store, USER, 2))
            with store.backend.lock(USER):
                store.backend.begin_login(USER, USER, store.backend.context.now(), {})
                store.backend.end_login(USER, in_doubt=False)
            return token

        with monkeypatch.context() as patch:
            patch.setattr(reader.backend.postgres, "find_and_record", and_then_two_logins_come_by)
            living(reader)
        assert living(reader)["token"] == f"a token of {USER}, number 2"

    def test_a_copy_put_there_between_tombstone_and_mark_is_taken_away(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader, mark = open_store(), store.backend.postgres.mark
        store.backend.insert(made_up(store, USER))

        def after_a_read(*arguments: Any) -> list[str]:
            self.redis.delete(self.key())  # as if this login had been stopped until its tombstone was gone
            living(reader)
            assert living(reader)["source"] == "redis"
            return mark(*arguments)

        monkeypatch.setattr(store.backend.postgres, "mark", after_a_read)
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
        assert reader.get_valid_token(USER) is None

    def test_a_holder_of_the_lock_believes_no_copy(self, store: HybridUpstoxStorage) -> None:
        store.backend.insert(made_up(store, USER))
        copy = self.redis.get(self.key())
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
        self.redis.set(self.key(), copy)  # as if Redis could not be reached and the login was killed at once
        with store.backend.lock(USER):
            assert (
                store.backend.find(USER, store.backend.context.now(), store.backend.context.now(), locked=True) is None
            )

    def test_a_copy_of_an_earlier_program_is_read_if_its_ciphertext_is_bound_to_no_account(
        self, store: HybridUpstoxStorage
    ) -> None:
        store.backend.insert(made_up(store, USER, account="an account"))
        *header, text = self.redis.get(self.key()).split(" ", 4)
        fields = json.loads(text)
        del fields["account"]
        self.redis.set(self.key(), " ".join([*header, json.dumps(fields)]))
        assert [living(store)["source"] for _ in range(2)] == ["postgresql", "redis"], "a good copy must replace it"
        assert store.get_user_statistics(USER)["total_usage"] == 2
        fields["ciphertext"] = "v1.key.text"
        self.redis.set(self.key(), " ".join([*header, json.dumps(fields)]))
        found = store.backend.find(USER, store.backend.context.now(), store.backend.context.now())
        assert found is not None
        assert (found.source, found.account, found.ciphertext) == ("redis", None, "v1.key.text")
