"""HybridUpstoxStorage: the promises of every store, a hot read in one message, and nothing stale whoever is killed."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis.connection
from redis import Redis
from redis.exceptions import ResponseError
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    HybridUpstoxStorage,
    KeyRing,
    TokenRefused,
    TokenStorage,
)
from upstox_db_examples.core.token import StoredToken
from upstox_db_examples.hybrid.redis import Found, runtime_acl

from . import processes
from .backend_contract import made_up
from .conftest import Clock, shown_with_locals
from .contract import OpenStore, StoreContract, living
from .naive import FoldsAgain, TellsRedisLast
from .processes import USER, Address, token_data
from .reliability import Counts, ReliabilityContract, a_writer_can_be_killed_at_any_moment
from .test_postgresql import bare, count_messages


class TestHybrid(StoreContract):
    @pytest.fixture(autouse=True)
    def _servers(self, postgres_url: str, redis_server: str, redis_prefix: str) -> Iterator[None]:
        self.url, self.redis_url, self.prefix = postgres_url, redis_server, redis_prefix
        with Redis.from_url(redis_server, decode_responses=True) as self.redis:
            yield

    def connect(self, **options: Any) -> TokenStorage:
        return HybridUpstoxStorage(self.redis_url, self.url, redis_prefix=self.prefix, **options)

    def raw_rows(self) -> list[dict[str, Any]]:
        return bare(self.url, "SELECT * FROM upstox_tokens ORDER BY id")

    def write_raw(self, token_id: Any, **values: Any) -> None:
        for column, value in values.items():
            bare(self.url, f"UPDATE upstox_tokens SET {column} = %s WHERE id = %s", value, token_id)
        for key in self.redis.scan_iter(self.key("*")):
            self.redis.delete(key)

    def key(self, user_id: str = USER) -> str:
        return f"{{{self.prefix}}}:token:{user_id}"

    @pytest.fixture
    def store(self, open_store: OpenStore) -> HybridUpstoxStorage:
        store = open_store()
        assert isinstance(store, HybridUpstoxStorage)
        return store

    # Who answers

    def test_a_hot_read_with_its_count_and_audit_is_one_message_to_redis(
        self, store: HybridUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        living(store)
        to_postgresql, to_redis = count_messages(monkeypatch), count_messages_to_redis(monkeypatch)
        assert living(store)["source"] == "redis"
        assert (to_postgresql, to_redis) == ([], ["EVALSHA"])
        assert store.get_user_statistics(USER)["total_usage"] == 2

    def test_who_named_no_user_reads_from_redis_too(
        self, store: HybridUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.get_or_create_token()
        store.get_or_create_token()  # asks PostgreSQL whose account this is
        to_postgresql = count_messages(monkeypatch)
        assert store.get_or_create_token()["source"] == "redis"
        assert to_postgresql == []

    def test_a_miss_is_answered_by_postgresql_and_warms_redis(self, store: HybridUpstoxStorage) -> None:
        token = store.store_token()["token"]
        self.redis.delete(self.key())
        reads = [living(store) for _ in range(3)]
        assert [read["source"] for read in reads] == ["postgresql", "redis", "redis"]
        assert [read["usage_count"] for read in reads] == [1, 2, 3]
        assert {read["token"] for read in reads} == {token}

    def test_a_copy_that_is_not_believed_any_more_is_confirmed_once(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.3)
        store.store_token()
        time.sleep(0.35)
        assert [living(store)["source"] for _ in range(3)] == ["postgresql", "redis", "redis"]
        assert store.get_user_statistics(USER)["total_usage"] == 3

    def test_scripts_that_redis_forgot_are_sent_again(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        self.redis.script_flush()
        assert living(store)["source"] == "redis"

    # What lies in Redis

    def test_redis_holds_ciphertext_and_nothing_of_the_token(self, store: HybridUpstoxStorage) -> None:
        stored = store.store_token()
        living(store)
        everything = json.dumps(list(self._everything()))
        assert "v2." in everything
        assert USER in everything, "what is searched for would be found"
        token = stored["token"]
        assert all(token[at : at + 16] not in everything for at in range(len(token) - 15))

    def _everything(self) -> Iterator[str]:
        for key in self.redis.scan_iter(f"{{{self.prefix}}}:*"):
            kind = self.redis.type(key)
            yield f"{key} {self.redis.get(key) if kind == 'string' else self.redis.xrange(key)}"

    def test_a_copy_never_outlives_its_token(self, store: HybridUpstoxStorage, clock: Clock) -> None:
        clock.set(7, 3, 29, 30)
        store.store_token()
        for key in (self.key(), self.key().replace(":token:", ":count:")):
            assert 0 < self.redis.pttl(key) <= 30_000

    def test_nor_after_a_login_that_took_its_time(self, open_store: OpenStore, clock: Clock) -> None:
        def slowly(user_id: str | None) -> AccessTokenData:
            clock.advance(seconds=20)
            return token_data(user_id or USER)

        clock.set(7, 3, 29)
        open_store(login=slowly).store_token()
        assert 0 < self.redis.pttl(self.key()) <= 40_000

    def test_a_changed_copy_is_refused(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda user_id: token_data(user_id or USER))
        store.store_token("CD0001")
        store.store_token("CD0002")
        self.redis.set(self.key("CD0002"), self.redis.get(self.key("CD0001")))
        with pytest.raises(TokenRefused):
            store.get_valid_token("CD0002")

    def test_a_copy_that_is_none_is_refused(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        header = self.redis.get(self.key()).split(" ", 4)[:4]
        for nonsense in ("nonsense", "[]", "{}", '{"expires_at": 10000000000000000}'):
            self.redis.set(self.key(), " ".join([*header, nonsense]))
            with pytest.raises(TokenRefused, match="Something else wrote the copy"):
                store.get_valid_token(USER)

    def test_two_installations_share_a_redis(self, store: HybridUpstoxStorage, open_store: OpenStore) -> None:
        store.store_token()
        self.prefix += "_other"
        assert living(open_store())["source"] == "postgresql"

    # Nothing stale

    @pytest.mark.parametrize("change", ["store_token", "revoke_token", "rotate_keys"])
    def test_a_reader_that_comes_late_brings_nothing_old_back(self, open_store: OpenStore, change: str) -> None:
        old, new = KeyRing.new_key(), KeyRing.new_key()
        open_store(keys=KeyRing(old)).store_token()
        writer, reader = open_store(keys=KeyRing(new, old)), open_store(keys=KeyRing(new, old))
        assert isinstance(reader, HybridUpstoxStorage)
        read_postgresql = reader._use

        def and_then_something_changes(*values: Any, **options: Any) -> StoredToken | None:
            token: StoredToken | None = read_postgresql(*values, **options)
            assert getattr(writer, change)(*([] if change == "rotate_keys" else [USER]))
            return token

        self.redis.delete(self.key())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "_use", and_then_something_changes)
            assert reader.get_valid_token(USER), "it was alive when the read began"
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
        put = writer._redis.put

        def ended_by_another_before(token: StoredToken, *rest: Any, **options: Any) -> int | None:
            if change == "revoke_token":
                assert other.revoke_token(USER)
            else:  # as after a login of an account that named nobody
                other._insert(replace(token, token_id=None, generation=token.generation + 1))
            return put(token, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer._redis, "put", ended_by_another_before)
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
        bury = revoker._redis.bury

        def and_then_another_stores(*arguments: Any) -> Any:
            buried = bury(*arguments)
            monkeypatch.undo()
            writer.store_token(USER)
            return buried

        monkeypatch.setattr(revoker._redis, "bury", and_then_another_stores)
        assert revoker.revoke_token(USER)
        assert [store.get_valid_token(USER) for store in (writer, revoker)] == [None, None]

    def test_a_copy_that_postgresql_does_not_know_any_more_is_taken_away(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.2)
        store.store_token()
        old = self.redis.get(self.key())
        store.revoke_token(USER)
        self.redis.set(self.key(), old)  # as a Redis does that was away while the token was revoked
        time.sleep(0.25)
        assert store.get_valid_token(USER) is None
        assert self.redis.get(self.key()) is None, "else it would be handed out when PostgreSQL is away"

    def test_a_copy_is_warmed_only_by_what_was_just_read(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.2)
        assert isinstance(store, HybridUpstoxStorage)
        store.store_token()
        self.redis.delete(self.key())
        read_postgresql = store._use

        def slowly(*values: Any) -> StoredToken | None:
            token: StoredToken | None = read_postgresql(*values)
            time.sleep(0.25)
            return token

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_use", slowly)
            living(store)
        assert self.redis.get(self.key()) is None
        clock, _ = self.redis.time()
        living(store)
        fresh_until = int(self.redis.get(self.key()).partition(" ")[0])
        assert fresh_until - clock * 1000 < 2000, "believed since PostgreSQL was asked"

    def test_a_copy_that_comes_back_from_the_past_is_not_believed_for_long(self, open_store: OpenStore) -> None:
        store = open_store(believed=0.3)
        store.store_token()
        old = self.redis.get(self.key())
        new = store.store_token()["token"]
        self.redis.set(self.key(), old)  # as an old snapshot or a failover that lost writes does
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

    # Marks

    def test_no_copy_lies_in_redis_while_a_token_is_marked(self, open_store: OpenStore) -> None:
        store, other = open_store(believed=0.2), open_store(believed=0.2)
        assert isinstance(store, HybridUpstoxStorage)
        store._insert(made_up(store, USER))
        assert living(other)["source"] == "redis"
        store._buried_for = 0.2
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            assert self.redis.get(self.key()).startswith("tombstone"), "the login begins when nothing is left there"
            time.sleep(0.25)
            assert self.redis.get(self.key()) is None
            assert [living(other)["source"] for _ in range(2)] == ["postgresql"] * 2
            assert self.redis.get(self.key()) is None, "nobody puts a copy of a marked token there"
            store._end_login(USER, in_doubt=False)
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]

    def test_the_next_reader_fills_redis_when_a_login_has_made_no_token(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        other = open_store()
        store._insert(made_up(store, USER))
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            store._end_login(USER, in_doubt=False)
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            store._end_login(USER, in_doubt=True)
        assert other.get_valid_token(USER) is None
        with store._lock(USER):
            store._clear_doubt(store._in_doubt(USER))  # type: ignore[arg-type]
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]

    def test_no_tombstone_of_another_is_taken_away(self, store: HybridUpstoxStorage) -> None:
        store._insert(made_up(store, USER))
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
            store._redis.bury([USER], 10)
            store._end_login(USER, in_doubt=False)
        assert self.redis.get(self.key()).startswith("tombstone")

    def test_a_login_of_nobody_named_leaves_no_copy_and_the_others_come_back(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        other, users = open_store(), [USER, "CD0001", "CD0002"]
        for user_id in users:
            store._insert(made_up(store, user_id))
        with store._lock("-account-x"):
            store._begin_login(None, "-account-x", store._now(), {})
            found = [self.redis.get(self.key(user_id)) for user_id in users]
            assert all(copy.startswith("tombstone") for copy in found), found
            store._insert(made_up(store, USER, 2))
            store._end_login("-account-x", in_doubt=False)
        for user_id in users:
            sources = [other.get_valid_token(user_id)["source"] for _ in range(2)]  # type: ignore[index]
            assert sources[1] == "redis"

    def test_a_reader_that_comes_late_brings_no_copy_of_a_token_that_was_marked_since(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = open_store()
        assert isinstance(reader, HybridUpstoxStorage)
        store._insert(made_up(store, USER))
        self.redis.delete(self.key())
        read_postgresql = reader._use

        def and_then_a_login_dies(*values: Any, **options: Any) -> StoredToken | None:
            token = read_postgresql(*values, **options)
            with store._lock(USER):
                store._begin_login(USER, USER, store._now(), {})
            return token

        with monkeypatch.context() as patch:
            patch.setattr(reader, "_use", and_then_a_login_dies)
            assert living(reader), "it was in no doubt when the read began"
        assert self.redis.get(self.key()).startswith("tombstone")
        assert reader.get_valid_token(USER) is None

    def test_a_reader_that_comes_late_finds_that_a_tombstone_was_there(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = open_store()
        assert isinstance(reader, HybridUpstoxStorage)
        store._insert(made_up(store, USER))
        self.redis.delete(self.key())
        read_postgresql = reader._use

        def and_then_two_logins_come_by(*values: Any, **options: Any) -> StoredToken | None:
            token = read_postgresql(*values, **options)
            store._insert(made_up(store, USER, 2))
            with store._lock(USER):
                store._begin_login(USER, USER, store._now(), {})
                store._end_login(USER, in_doubt=False)
            return token

        with monkeypatch.context() as patch:
            patch.setattr(reader, "_use", and_then_two_logins_come_by)
            living(reader)
        assert living(reader)["token"] == f"a token of {USER}, number 2"

    def test_a_copy_put_there_between_tombstone_and_mark_is_taken_away(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader, mark = open_store(), store._mark
        store._insert(made_up(store, USER))

        def after_a_read(*arguments: Any) -> list[str]:
            self.redis.delete(self.key())  # as if this login had been stopped until its tombstone was gone
            living(reader)
            assert living(reader)["source"] == "redis"
            return mark(*arguments)

        monkeypatch.setattr(store, "_mark", after_a_read)
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
        assert reader.get_valid_token(USER) is None

    def test_a_holder_of_the_lock_believes_no_copy(self, store: HybridUpstoxStorage) -> None:
        store._insert(made_up(store, USER))
        copy = self.redis.get(self.key())
        with store._lock(USER):
            store._begin_login(USER, USER, store._now(), {})
        self.redis.set(self.key(), copy)  # as when Redis could not be told and the login was killed at once
        with store._lock(USER):
            assert store._find(USER, store._now(), store._now(), locked=True) is None

    def test_a_copy_of_an_earlier_program_is_read_if_its_ciphertext_is_bound_to_no_account(
        self, store: HybridUpstoxStorage
    ) -> None:
        store._insert(made_up(store, USER, account="an account"))
        *header, text = self.redis.get(self.key()).split(" ", 4)
        fields = json.loads(text)
        del fields["account"]
        self.redis.set(self.key(), " ".join([*header, json.dumps(fields)]))
        assert [living(store)["source"] for _ in range(2)] == ["postgresql", "redis"], "a good copy took its place"
        assert store.get_user_statistics(USER)["total_usage"] == 2
        fields["ciphertext"] = "v1.key.text"
        self.redis.set(self.key(), " ".join([*header, json.dumps(fields)]))
        found = store._find(USER, store._now(), store._now())
        assert found is not None
        assert (found.source, found.account, found.ciphertext) == ("redis", None, "v1.key.text")

    # What is counted

    def test_a_use_whose_answer_was_lost_and_that_was_folded_already_is_counted_once(
        self, store: HybridUpstoxStorage, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        use, other = store._redis.use, open_store()
        assert isinstance(other, HybridUpstoxStorage)

        def and_the_answer_is_lost(*arguments: Any, **options: Any) -> Found:
            use(*arguments, **options)
            assert other.fold_uses() == 1
            return Found("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(store._redis, "use", and_the_answer_is_lost)
            assert living(store)["source"] == "postgresql"
        assert store.get_user_statistics(USER)["total_usage"] == 1

    def test_entries_that_are_not_ours_are_thrown_away(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        living(store)
        uses = f"{{{self.prefix}}}:uses"
        self.redis.xadd(uses, {"some": "thing"})
        self.redis.xadd(uses, {"token": "9" * 30, "user": USER, "actor": "x", "at": "1", "use": "y"})
        assert store.get_user_statistics(USER)["total_usage"] == 1
        assert self.redis.xlen(uses) == 0

    def test_a_count_that_was_lost_does_not_stay_for_ever(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        count = self.key().replace(":token:", ":count:")
        self.redis.delete(count)
        assert living(store)["source"] == "redis"
        assert self.redis.pttl(count) > 0

    def test_uses_are_folded_after_some_hundred(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        for _ in range(499):
            living(store)
        assert bare(self.url, "SELECT usage_count FROM upstox_tokens") == [{"usage_count": 0}]
        living(store)
        assert bare(self.url, "SELECT usage_count FROM upstox_tokens") == [{"usage_count": 500}]
        assert store.fold_uses() == 0

    def test_uses_that_were_folded_and_not_forgotten_are_not_folded_again(
        self, store: HybridUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        for _ in range(7):
            living(store)
        with monkeypatch.context() as killed_before_that:
            killed_before_that.setattr(store._redis, "forget_uses", lambda _: None)
            assert store.fold_uses() == 7
        assert store.fold_uses() == 0
        assert self.redis.xlen(f"{{{self.prefix}}}:uses") == 0
        assert store.get_user_statistics(USER)["total_usage"] == 7
        used = [entry for entry in store.get_audit_trail(USER) if entry["action"] == "used"]
        assert len(used) == len({entry["metadata"]["use"] for entry in used}) == 7

    def test_many_fold_at_once_and_each_use_counts_once(self, open_store: OpenStore) -> None:
        stores = [open_store() for _ in range(4)]
        stores[0].store_token()
        for _ in range(300):
            living(stores[0])
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(lambda store: store.fold_uses(), stores)) == 300
        assert stores[0].get_user_statistics(USER)["total_usage"] == 300

    # Configuration

    def test_the_guides_configuration_and_a_client_of_ones_own(self, store: HybridUpstoxStorage, keys: KeyRing) -> None:
        token = store.store_token()["token"]
        found = self.redis.connection_pool.connection_kwargs
        as_in_the_guide = {name: found.get(name) for name in ("host", "port", "db", "password")}
        for config in ({**as_in_the_guide, "decode_responses": True}, as_in_the_guide, self.redis):
            with HybridUpstoxStorage(
                config, self.url, redis_prefix=self.prefix, keys=keys, clock=store._clock
            ) as again:
                again.init_postgres()
                assert again.get_valid_token(USER)["token"] == token  # type: ignore[index]
                assert again.get_valid_token(USER)["source"] == "redis"  # type: ignore[index]
        assert self.redis.ping(), "who made the client closes it"

    @pytest.mark.parametrize(
        "bad", [{"hist": "x", "password": "hunter2hunter2"}, "hunter2hunter2@host", None, 7, {"port": "x"}]
    )
    def test_a_configuration_that_is_none_is_refused_without_showing_it(self, bad: Any) -> None:
        with pytest.raises(ConfigurationError, match="redis_config must be") as caught:
            HybridUpstoxStorage(bad, self.url)
        assert "hunter2" not in shown_with_locals(caught.value)

    def test_a_user_with_the_least_rights_can_do_all_that_is_due_and_nothing_else(self, open_store: OpenStore) -> None:
        name, url = f"user_{self.prefix}", urlsplit(self.redis_url)
        rules = runtime_acl(self.prefix)
        self.redis.execute_command("ACL", "SETUSER", name, *rules, "on", ">secret")
        try:
            self.redis_url = f"redis://{name}:secret@{url.hostname}:{url.port}/0"
            store = open_store()
            store.store_token()
            assert living(store)["source"] == "redis"
            assert store.get_user_statistics(USER)["total_usage"] == 1
            assert store.get_storage_status()["redis"] == "healthy"
            assert store.revoke_token(USER)
            assert store.get_valid_token(USER) is None
            with Redis.from_url(self.redis_url) as thief:
                for forbidden in (
                    ("GET", "another"),
                    ("SET", "another", "x"),
                    ("KEYS", "*"),
                    ("SCAN", "0"),
                    ("FLUSHALL",),
                    ("CONFIG", "GET", "*"),
                    ("ACL", "LIST"),
                    ("MONITOR",),
                    ("EVAL", "return redis.call('GET', 'another')", "0"),
                    ("SHUTDOWN",),
                ):
                    with pytest.raises(ResponseError, match=r"(?i)permission"):
                        thief.execute_command(*forbidden)
                script = thief.script_load("return redis.call('GET', 'another')")
                # Redis 7.0 says it in other words than 8.
                with pytest.raises(ResponseError, match=r"(?i)permission|can't access"):
                    thief.evalsha(script, 0)
        finally:
            self.redis.execute_command("ACL", "DELUSER", name)

    def test_the_status_says_it_of_each(self, store: HybridUpstoxStorage) -> None:
        store.store_token()
        living(store)
        status = store.get_storage_status()
        assert status["redis"] == status["postgresql"] == "healthy"
        details: Any = status["details"]
        assert details["redis"].pop("latency_ms") > 0
        assert details["postgresql"].pop("latency_ms") > 0
        assert details == {
            "redis": {"role": "master", "uses_waiting": 1, "in_use": 0},
            "postgresql": {"role": "primary", "pool_size": 5, "in_use": 0},
        }


class TestHybridUnderCrowdsAndKills(ReliabilityContract):
    kind = "upstox_db_examples:HybridUpstoxStorage"
    seconds_of_crowding = 5
    # 32 processes with a connection of the pool and one for a lock each: a server takes a hundred of them.
    in_a_crowd = {"pool_size": 1, "timeout": 60.0}

    @pytest.fixture
    def address(self, postgres_url: str, redis_server: str, redis_prefix: str) -> Address:
        # A Redis that is only slow, on a busy machine, is not the fault that is tested here.
        options = {"redis_prefix": redis_prefix, "redis_timeout": 5}
        address = Address(self.kind, (redis_server, postgres_url), options)
        address.open().close()
        return address

    @pytest.fixture
    def count(self, postgres_url: str, address: Address) -> Iterator[Callable[[], Counts]]:
        """What lies in PostgreSQL, where a reader that warms Redis all the time gets nothing older."""
        created = "SELECT token_id FROM upstox_token_audit WHERE action = 'created'"
        orphans = f"SELECT count(*) AS orphans FROM upstox_tokens WHERE id NOT IN ({created})"
        stop = threading.Event()

        def counted() -> Counts:
            rows = bare(postgres_url, "SELECT id, generation, is_active FROM upstox_tokens")
            active = [row["id"] for row in rows if row["is_active"]]
            handed_out = store.get_valid_token(USER)
            if handed_out:
                assert not active or handed_out["token_id"] >= active[0], "a stale token was handed out"
            elif active:
                newest = store._newest(USER)  # A login that was killed may have replaced it.
                assert newest is not None
                assert newest.in_doubt, "a token was not there"
            generations = {row["id"]: row["generation"] for row in rows}
            return Counts(active, generations, bare(postgres_url, orphans)[0]["orphans"])

        def keep_reading() -> int:
            reads = 0
            while not stop.is_set():
                store.get_valid_token(USER)
                reads += 1
                time.sleep(0.001)
            return reads

        with address.open() as store, ThreadPoolExecutor(1) as thread:
            reading = thread.submit(keep_reading)
            try:
                yield counted
            finally:
                stop.set()
            assert reading.result() > 0

    @pytest.mark.slow
    def test_without_a_tombstone_a_stale_token_is_handed_out(
        self, address: Address, count: Callable[[], Counts]
    ) -> None:
        careless = address._replace(kind=f"{TellsRedisLast.__module__}:TellsRedisLast")
        with pytest.raises(AssertionError, match="stale"):
            a_writer_can_be_killed_at_any_moment(careless, count)

    @pytest.mark.slow
    def test_who_folds_can_be_killed_at_any_moment(self, address: Address) -> None:
        who_folds_can_be_killed_at_any_moment(address)

    @pytest.mark.slow
    def test_without_an_id_for_each_use_some_are_counted_twice(self, address: Address) -> None:
        with pytest.raises(AssertionError, match="counted more than once"):
            who_folds_can_be_killed_at_any_moment(address._replace(kind=f"{FoldsAgain.__module__}:FoldsAgain"))


def who_folds_can_be_killed_at_any_moment(address: Address) -> None:
    dice = random.Random(1)
    with address.open(login=processes.made_up_login) as store:
        store.store_token(USER)
        reads = 0
        for _ in range(40):
            process, connection = processes.start(processes.fold_on_and_on, address)
            assert connection.recv() == "ready"
            end = time.monotonic() + dice.uniform(0, 0.05)
            while time.monotonic() < end:
                store.get_valid_token(USER)
                reads += 1
            processes.kill(process)
            connection.close()
        assert reads > 100
        assert store.get_user_statistics(USER)["total_usage"] == reads, "some were counted more than once"
        used = [entry for entry in store.get_audit_trail(USER, limit=reads + 9) if entry["action"] == "used"]
        assert len(used) == reads


def count_messages_to_redis(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that are sent from now on, one entry for each message."""
    messages: list[str] = []
    real: Any = redis.connection.Connection.send_packed_command

    def counted(connection: Any, command: Any, check_health: bool = True) -> Any:
        messages.append(b"".join(command).split(b"\r\n")[2].decode())
        return real(connection, command, check_health)

    monkeypatch.setattr(redis.connection.Connection, "send_packed_command", counted)
    return messages
