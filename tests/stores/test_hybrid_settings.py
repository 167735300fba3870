"""The hybrid store: how others have set up its Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from upstox_db_examples import ConfigurationError, HybridUpstoxStorage, KeyRing
from upstox_db_examples.hybrid import redis as hybrid_redis
from upstox_db_examples.hybrid.client import runtime_acl
from upstox_db_examples.local.servers import RedisServer

from ..support.clocks import Clock
from ..support.hybrid import OnHybrid
from ..support.leaks import shown_with_locals
from ..support.processes import USER, made_up_login
from ..support.stores import OpenStore, living


@pytest.mark.usefixtures("own_servers")
class TestARedisThatMayEvict:
    @pytest.fixture(autouse=True)
    def _servers(self, postgres_url: str, keys: KeyRing, clock: Clock) -> Iterator[None]:
        self.options: dict[str, Any] = {"keys": keys, "clock": clock, "believed": 0.2, "redis_pause": 0.2}
        with RedisServer() as server, Redis.from_url(server.url) as self.redis:
            self.urls = server.url, postgres_url
            yield

    def store(self) -> HybridUpstoxStorage:
        return HybridUpstoxStorage(*self.urls, login=made_up_login, **self.options)

    def set_up(self, policy: str, maxmemory: str = "100mb") -> None:
        self.redis.config_set("maxmemory", maxmemory)
        self.redis.config_set("maxmemory-policy", policy)

    @pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
    def test_it_counts_as_away_and_says_why(self, policy: str, caplog: pytest.LogCaptureFixture) -> None:
        self.set_up(policy)
        with self.store() as store:
            token = store.store_token(USER)["token"]
            assert [living(store)["source"] for _ in range(3)] == ["postgresql"] * 3
            assert living(store)["token"] == token
            assert store.get_user_statistics(USER)["total_usage"] == 4
            assert f"(maxmemory-policy {policy})" in store.get_storage_status()["redis"]
            assert "maxmemory-policy to noeviction" in store.get_storage_status()["redis"]
            assert caplog.text.count("may throw away uses") == 1
            assert not self.redis.keys("*:token:*") or self.redis.get(self.redis.keys("*:token:*")[0])[:4] == b"tomb"

    @pytest.mark.parametrize(("policy", "maxmemory"), [("noeviction", "100mb"), ("allkeys-lru", "0")])
    def test_one_that_never_evicts_is_used(self, policy: str, maxmemory: str) -> None:
        self.set_up(policy, maxmemory)
        with self.store() as store:
            store.store_token(USER)
            assert living(store)["source"] == "redis"
            status = store.get_storage_status()
            assert (status["redis"], status["details"]["redis"]["maxmemory_policy"]) == ("healthy", policy)

    def test_one_that_is_changed_while_a_program_runs_loses_no_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hybrid_redis, "LOOK_AGAIN", 0.0)
        with self.store() as store:
            store.store_token(USER)
            assert living(store)["source"] == "redis"
            self.set_up("allkeys-lru")
            assert living(store)["source"] == "postgresql"
            assert store.get_user_statistics(USER)["total_usage"] == 2, "what waited there is counted"
            self.set_up("noeviction")
            assert {living(store)["source"] for _ in range(3)} >= {"redis"}

    def test_a_user_that_may_not_ask_uses_it_as_before(self) -> None:
        rules = [rule for rule in runtime_acl() if rule != "+info"]
        self.redis.execute_command("ACL", "SETUSER", "few", *rules, "on", ">few")
        _, _, address = self.urls[0].partition("@")
        self.urls = f"redis://few:few@{address}", self.urls[1]
        with self.store() as store:
            store.store_token(USER)
            assert living(store)["source"] == "redis"


class TestHybrid(OnHybrid):
    @pytest.mark.parametrize("protocol", [2, 3])
    @pytest.mark.parametrize("decodes", [False, True])
    def test_both_protocols_say_the_same(self, open_store: OpenStore, protocol: int, decodes: bool) -> None:
        self.redis_url += f"?protocol={protocol}&decode_responses={decodes}"
        store = open_store(actor="हिन्दी")
        token = store.store_token()["token"]
        assert (living(store)["token"], living(store)["source"]) == (token, "redis")
        assert store.get_user_statistics(USER)["total_usage"] == 2
        assert [entry["actor"] for entry in store.get_audit_trail(USER, 2)] == ["हिन्दी"] * 2
        assert store.get_storage_status()["redis"] == "healthy"
        assert store.revoke_token(USER)
        assert store.get_valid_token(USER) is None

    def test_another_number_is_another_redis(self, store: HybridUpstoxStorage, open_store: OpenStore) -> None:
        store.store_token()
        first = self.redis_url
        self.redis_url = f"{first.rpartition('/')[0]}/3"
        other = open_store()
        assert [living(other)["source"] for _ in range(2)] == ["postgresql", "redis"]
        assert other.get_storage_status()["details"]["redis"]["db"] == 3
        with Redis.from_url(self.redis_url) as third:
            third.delete(*third.keys(f"{{{self.prefix}}}:*"))

    def test_a_number_that_redis_does_not_have_is_a_clear_error(self, open_store: OpenStore) -> None:
        self.redis_url = f"{self.redis_url.rpartition('/')[0]}/4711"
        with pytest.raises(ConfigurationError, match=r"the number of its database \(db\)"):
            open_store()

    def test_a_name_in_the_place_of_the_number_is_refused(self, open_store: OpenStore) -> None:
        self.redis_url = "redis://:hunter2hunter2@localhost/production"
        with pytest.raises(ConfigurationError, match="redis_config must be") as caught:
            open_store()
        assert "hunter2" not in shown_with_locals(caught.value)
