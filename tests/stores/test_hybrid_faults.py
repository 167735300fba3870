"""HybridUpstoxStorage when Redis or PostgreSQL is killed, stalled or full: the other goes on, nothing is stale."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis

from upstox_db_examples import ConfigurationError, HybridUpstoxStorage, KeyRing, StoreUnavailable
from upstox_db_examples.hybrid.client import runtime_acl
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.servers import PostgreSQLServer, RedisServer

from ..support.certificates import EXPIRED
from ..support.clocks import Clock
from ..support.hybrid import count_messages_to_redis
from ..support.leaks import shown_with_locals
from ..support.processes import USER, made_up_login
from ..support.stores import CountsLogins, living, opening

OpenHybrid = Callable[..., HybridUpstoxStorage]


@pytest.mark.usefixtures("own_servers")
class TestServersThatFail(CountsLogins):
    """Tests on servers of their own, which they can stop, kill, stall and fill."""

    @pytest.fixture
    def postgresql(self) -> Iterator[PostgreSQLServer]:
        with PostgreSQLServer() as server:
            yield server

    @pytest.fixture
    def redis(self) -> Iterator[RedisServer]:
        with RedisServer(settings={"appendfsync": "always"}) as server:
            yield server

    @pytest.fixture
    def open_store(
        self, postgresql: PostgreSQLServer, redis: RedisServer, keys: KeyRing, clock: Clock
    ) -> Iterator[OpenHybrid]:
        quick: dict[str, Any] = {"believed": 0.5, "redis_pause": 0.5, "timeout": 1}
        connect = partial(HybridUpstoxStorage, redis.url, postgresql.url)
        with opening(connect, login=self.login, keys=keys, clock=clock, **quick) as open_one:
            yield open_one

    @pytest.fixture
    def store(self, open_store: OpenHybrid) -> HybridUpstoxStorage:
        store = open_store()
        store.store_token(USER)
        living(store)
        return store

    @pytest.mark.parametrize("fault", ["kill", "pause"])
    def test_without_redis_all_goes_on_within_the_set_time(
        self, redis: RedisServer, store: HybridUpstoxStorage, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        getattr(redis, fault)()
        begin = time.monotonic()
        assert living(store)["source"] == "postgresql"
        assert time.monotonic() - begin < 0.25 * 1.2 + 0.1, "0.1 s of this is for PostgreSQL on a slow machine"
        asked = count_messages_to_redis(monkeypatch)
        assert [living(store)["source"] for _ in range(20)] == ["postgresql"] * 20
        assert len(asked) <= 1, "only one read may try Redis again"
        assert store.get_storage_status()["redis"].startswith("error: Redis gave no answer")
        redis.start() if fault == "kill" else redis.resume()
        time.sleep(0.6)
        assert {living(store)["source"] for _ in range(3)} >= {"redis"}
        assert store.get_user_statistics(USER)["total_usage"] == 1 + 1 + 20 + 3

    @pytest.mark.parametrize("change", ["store_token", "revoke_token"])
    @pytest.mark.parametrize(("fault", "end"), [("pause", "resume"), ("kill", "start")])
    def test_a_redis_that_comes_back_with_an_old_copy_does_no_harm(
        self, redis: RedisServer, store: HybridUpstoxStorage, open_store: OpenHybrid, change: str, fault: str, end: str
    ) -> None:
        others = [open_store() for _ in range(4)]
        old = living(store)["token"]
        getattr(redis, fault)()
        getattr(store, change)(USER)
        getattr(redis, end)()
        for other in others:
            read = other.get_valid_token(USER)
            assert (read is None) if change == "revoke_token" else (read and read["token"] != old)

    def test_without_the_wait_it_would(self, redis: RedisServer, open_store: OpenHybrid) -> None:
        store, other = open_store(believed=60), open_store(believed=60)
        old = store.store_token(USER)["token"]
        redis.kill()
        store.backend.believed = 0
        store.store_token(USER)
        redis.start()
        assert living(other)["token"] == old

    def test_a_login_without_redis_waits_once(self, redis: RedisServer, open_store: OpenHybrid) -> None:
        store = open_store(believed=2)
        store.store_token(USER)
        redis.kill()
        for user_id in (USER, "CD0001", None):
            begin = time.monotonic()
            store.store_token(user_id)
            assert 2 <= time.monotonic() - begin < 4

    def test_a_token_in_doubt_is_not_handed_out_without_postgresql(
        self, postgresql: PostgreSQLServer, store: HybridUpstoxStorage, open_store: OpenHybrid
    ) -> None:
        other = open_store()
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            assert living(other)["source"] == "postgresql"
        postgresql.kill()
        for reader in (store, other):
            with pytest.raises(StoreUnavailable):
                reader.get_valid_token(USER)

    def test_a_redis_that_was_away_when_the_login_began_leaves_no_token_in_doubt(
        self, postgresql: PostgreSQLServer, redis: RedisServer, store: HybridUpstoxStorage, open_store: OpenHybrid
    ) -> None:
        others = [open_store() for _ in range(3)]
        redis.kill()
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
            redis.start()
            assert living(others[0])["source"] == "postgresql"
        assert others[1].get_valid_token(USER) is None
        postgresql.kill()
        with pytest.raises(StoreUnavailable):
            others[2].get_valid_token(USER)

    @pytest.mark.parametrize("change", ["store_token", "revoke_token"])
    def test_without_the_replicas_that_were_asked_for_it_waits(self, open_store: OpenHybrid, change: str) -> None:
        store = open_store(replicas=1)  # This Redis has no replicas.
        store.store_token(USER)
        begin = time.monotonic()
        getattr(store, change)(USER)
        assert time.monotonic() - begin >= 0.5, "it must wait until a copy that a replica may bring back has expired"

    def test_a_full_redis_is_no_redis(self, redis: RedisServer, store: HybridUpstoxStorage) -> None:
        with Redis.from_url(redis.url) as bare_redis:
            bare_redis.config_set("maxmemory", 1)
            assert living(store)["source"] == "postgresql"
            assert not store.backend.redis.bury([USER], 1).certain, "Redis may have room again when a late copy arrives"
            token = store.store_token(USER)["token"]
            assert living(store)["token"] == token
            assert "Redis does not accept writes (OutOfMemoryError)" in store.get_storage_status()["redis"]
            bare_redis.config_set("maxmemory", 0)
        time.sleep(0.6)
        living(store)
        read = living(store)
        assert (read["source"], read["token"]) == ("redis", token)

    def test_a_redis_that_became_a_replica_is_not_healthy(self, redis: RedisServer, store: HybridUpstoxStorage) -> None:
        with Redis.from_url(redis.url) as bare_redis:
            bare_redis.execute_command("REPLICAOF", "127.0.0.1", "1")
            assert "Redis does not accept writes (ReadOnlyError)" in store.get_storage_status()["redis"]
            bare_redis.execute_command("REPLICAOF", "NO", "ONE")
        assert store.get_storage_status()["redis"] == "healthy"

    def test_a_redis_user_with_too_few_rights_is_said(
        self, postgresql: PostgreSQLServer, redis: RedisServer, keys: KeyRing
    ) -> None:
        with Redis.from_url(redis.url) as bare_redis:
            bare_redis.execute_command("ACL", "SETUSER", "few", *runtime_acl(), "-set", "on", ">few")
        url = redis.url.replace("redis://:", "redis://few:").replace(str(urlsplit(redis.url).password), "few")
        with HybridUpstoxStorage(url, postgresql.url, keys=keys) as store:
            assert "does not give this user all the rights" in store.get_storage_status()["redis"]

    @pytest.mark.parametrize("fault", ["kill", "pause"])
    def test_without_postgresql_hot_reads_go_on_and_no_login_is_spent(
        self, postgresql: PostgreSQLServer, store: HybridUpstoxStorage, fault: str
    ) -> None:
        getattr(postgresql, fault)()
        time.sleep(0.6)  # Normally this copy would have expired by now.
        assert store.get_or_create_token(USER)["source"] == "redis"
        begin = time.monotonic()
        assert {living(store)["source"] for _ in range(50)} == {"redis"}
        assert time.monotonic() - begin < 10, "it may wait for PostgreSQL once, for one second, but not for every read"
        assert one_waits_of_four(store)
        with pytest.raises(StoreUnavailable):
            store.store_token(USER)
        with pytest.raises(StoreUnavailable):
            store.get_or_create_token("CD0001")
        assert self.logins == 1
        postgresql.start() if fault == "kill" else postgresql.resume()
        assert store.store_token(USER)
        assert store.get_user_statistics(USER)["total_usage"] == 1 + 1 + 50 + 4 * 5

    def test_a_program_that_starts_without_postgresql_reads_from_redis(
        self, postgresql: PostgreSQLServer, store: HybridUpstoxStorage, open_store: OpenHybrid
    ) -> None:
        postgresql.kill()
        late = open_store()
        assert living(late)["source"] == "redis"
        postgresql.start()
        assert late.store_token(USER)["token"] == living(store)["token"]

    def test_without_both_there_is_one_clear_error_and_with_both_all_goes_on(
        self,
        postgresql: PostgreSQLServer,
        redis: RedisServer,
        store: HybridUpstoxStorage,
        open_store: OpenHybrid,
    ) -> None:
        postgresql.kill()
        redis.kill()
        for call in (store.get_valid_token, store.get_or_create_token, store.store_token):
            with pytest.raises(StoreUnavailable) as caught:
                call(USER)
            assert not [url for url in (postgresql.url, redis.url) if password(url) in shown_with_locals(caught.value)]
        with pytest.raises(StoreUnavailable, match="Neither Redis nor PostgreSQL answers"):
            store.get_valid_token(USER)
        with pytest.raises(StoreUnavailable):
            open_store()
        status = store.get_storage_status()
        assert all(str(status[name]).startswith("error: ") for name in ("redis", "postgresql"))
        assert not [url for url in (postgresql.url, redis.url) if password(url) in str(status)]
        postgresql.start()
        redis.start()
        time.sleep(0.6)
        assert self.logins == 1
        new = store.store_token(USER)["token"]
        assert (living(store)["token"], living(store)["source"]) == (new, "redis")

    def test_eight_threads_count_exactly_what_they_were_handed_through_a_stall(
        self, redis: RedisServer, store: HybridUpstoxStorage
    ) -> None:
        counted = store.get_user_statistics(USER)["total_usage"]
        with ThreadPoolExecutor(8) as threads:
            reads = [threads.submit(lambda: [living(store) for _ in range(100)]) for _ in range(8)]
            redis.pause()
            time.sleep(1)
            redis.resume()
            sources = [result["source"] for read in reads for result in read.result()]
        time.sleep(0.6)
        assert len(sources) == 800
        assert "postgresql" in sources
        assert store.get_user_statistics(USER)["total_usage"] - counted == 800
        used = bare_uses(store)
        assert len(used) == len(set(used)) == 800 + counted

    def test_uses_that_wait_survive_the_kill_of_a_redis_that_writes_them_down(
        self, redis: RedisServer, store: HybridUpstoxStorage
    ) -> None:
        sources = [living(store)["source"] for _ in range(99)]
        assert sources.count("redis") > 50, (
            "on a busy machine a read from Redis may take too long, and PostgreSQL answers instead"
        )
        redis.kill()
        redis.start()
        time.sleep(0.6)
        assert store.get_user_statistics(USER)["total_usage"] == 100

    def test_a_wrong_password_is_said_and_not_shown(self, postgresql: PostgreSQLServer, redis: RedisServer) -> None:
        wrong = redis.url.replace(password(redis.url), "hunter2hunter2")
        with pytest.raises(ConfigurationError, match="because of the user or the password") as caught:
            HybridUpstoxStorage(wrong, postgresql.url)
        assert "hunter2" not in shown_with_locals(caught.value)

    def test_tls_is_verified_and_a_wrong_authority_is_refused(
        self, postgresql: PostgreSQLServer, redis: RedisServer, tmp_path: Path, keys: KeyRing
    ) -> None:
        with tls_in_front_of(redis, tmp_path) as (port, authority):
            config = {"host": "localhost", "port": port, "password": password(redis.url), "ssl": True}
            verified = {**config, "ssl_ca_certs": str(authority)}
            with HybridUpstoxStorage(verified, postgresql.url, keys=keys, login=made_up_login) as store:
                store.store_token(USER)
                assert living(store)["source"] == "redis"
            other_authority, _, _ = make_certificates(tmp_path)
            with pytest.raises(ConfigurationError, match="because of TLS") as caught:
                HybridUpstoxStorage({**config, "ssl_ca_certs": str(other_authority)}, postgresql.url)
        assert password(redis.url) not in shown_with_locals(caught.value)

    def test_a_certificate_of_redis_that_has_expired_is_refused_and_named(
        self, postgresql: PostgreSQLServer, redis: RedisServer, tmp_path: Path
    ) -> None:
        with tls_in_front_of(redis, tmp_path, EXPIRED) as (port, authority):
            config = {"host": "localhost", "port": port, "ssl": True, "ssl_ca_certs": str(authority)}
            with pytest.raises(ConfigurationError, match="certificate, which has expired"):
                HybridUpstoxStorage(config, postgresql.url)


def one_waits_of_four(store: HybridUpstoxStorage) -> bool:
    """Return whether, while PostgreSQL does not answer, just one of several readers asks if it is back."""
    asked, ask = [], store.backend.postgres.find_and_record

    def counted(*values: Any) -> Any:
        asked.append(time.monotonic())
        return ask(*values)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(store.backend.postgres, "find_and_record", counted)
        time.sleep(store.backend.believed + 0.1)
        list(threads.map(lambda _: [living(store) for _ in range(5)], range(4)))
    return len(asked) == 1


def bare_uses(store: HybridUpstoxStorage) -> list[str]:
    """Return the ids of the uses in the audit trail."""
    return [entry["metadata"]["use"] for entry in store.get_audit_trail(USER, 9999) if entry["action"] == "used"]


def password(url: str) -> str:
    return str(urlsplit(url).password)


@contextmanager
def tls_in_front_of(
    server: RedisServer, folder: Path, valid_for: timedelta = timedelta(days=1)
) -> Iterator[tuple[int, Path]]:
    """Run a TLS proxy like stunnel, because the wheel's Redis has no TLS. Yield its port and certificate authority."""
    authority, certificate, key = make_certificates(folder, valid_for)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    plain = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                client, _ = plain.accept()
            except OSError:
                return
            threads.submit(forward, client)

    def forward(client: socket.socket) -> None:
        try:
            with (
                context.wrap_socket(client, server_side=True) as near,
                socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0)) as far,
            ):
                while not stop.is_set():
                    for ready in select.select([near, far], [], [], 0.05)[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        (far if ready is near else near).sendall(data)
        except OSError:
            client.close()

    with ThreadPoolExecutor(16) as threads:
        threads.submit(serve)
        try:
            yield plain.getsockname()[1], authority
        finally:
            stop.set()
            plain.shutdown(socket.SHUT_RDWR)
            plain.close()
