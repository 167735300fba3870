"""The hybrid store: the contract, which server answers, what is in Redis, and the configuration."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    HybridUpstoxStorage,
    KeyRing,
    TokenRefused,
)
from upstox_db_examples.hybrid.client import runtime_acl

from ..contracts.store import StoreContract
from ..support.clocks import Clock
from ..support.hybrid import OnHybrid, count_messages_to_redis
from ..support.leaks import shown_with_locals
from ..support.postgresql import count_messages
from ..support.processes import USER, token_data
from ..support.stores import OpenStore, living


class TestHybrid(OnHybrid, StoreContract):
    # Which server answers

    def test_a_hot_read_with_its_count_and_audit_is_one_message_to_redis(
        self, store: HybridUpstoxStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.store_token()
        living(store)
        to_postgresql, to_redis = count_messages(monkeypatch), count_messages_to_redis(monkeypatch)
        assert living(store)["source"] == "redis"
        assert (to_postgresql, to_redis) == ([], ["EVALSHA"])
        assert store.get_user_statistics(USER)["total_usage"] == 2

    def test_a_caller_that_named_no_user_reads_from_redis_too(
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

    # What is in Redis

    def test_redis_holds_ciphertext_and_nothing_of_the_token(self, store: HybridUpstoxStorage) -> None:
        stored = store.store_token()
        living(store)
        everything = json.dumps(list(self._everything()))
        assert "v2." in everything
        assert USER in everything, "the search would find a secret"
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

    def test_after_a_slow_login_the_copy_still_ends_with_the_token(self, open_store: OpenStore, clock: Clock) -> None:
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

    # Configuration

    def test_the_guides_configuration_and_a_client_of_ones_own(self, store: HybridUpstoxStorage, keys: KeyRing) -> None:
        token = store.store_token()["token"]
        found = self.redis.connection_pool.connection_kwargs
        as_in_the_guide = {name: found.get(name) for name in ("host", "port", "db", "password")}
        for config in ({**as_in_the_guide, "decode_responses": True}, as_in_the_guide, self.redis):
            with HybridUpstoxStorage(
                config, self.url, redis_prefix=self.prefix, keys=keys, clock=store.backend.context.now
            ) as again:
                again.init_postgres()
                assert again.get_valid_token(USER)["token"] == token  # type: ignore[index]
                assert again.get_valid_token(USER)["source"] == "redis"  # type: ignore[index]
        assert self.redis.ping(), "whoever made the client has to close it"

    @pytest.mark.parametrize(
        "bad", [{"hist": "x", "password": "hunter2hunter2"}, "hunter2hunter2@host", None, 7, {"port": "x"}]
    )
    def test_a_configuration_that_is_none_is_refused_without_showing_it(self, bad: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"redis_config must be|The address of Redis cannot") as caught:
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
                # Redis 7.0 words this differently from Redis 8.
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
            "redis": {"role": "master", "db": 0, "maxmemory_policy": "noeviction", "uses_waiting": 1, "in_use": 0},
            "postgresql": {"schema": "public", "role": "primary", "pool_size": 5, "in_use": 0},
        }
