"""Sentinel, a Redis Cluster and a PostgreSQL primary with its standby: real processes, a steady load, and kill -9."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel
from upstox_totp.models import AccessTokenData

from upstox_db_examples import ConfigurationError, HybridUpstoxStorage, KeyRing, StorageError
from upstox_db_examples.hybrid.client import runtime_acl
from upstox_db_examples.local.processes import find_free_port
from upstox_db_examples.local.servers import PostgreSQLServer, RedisServer

from ..support.databases import notes
from ..support.postgresql import bare
from ..support.processes import token_data, wait_until
from ..support.switch import Switch

pytestmark = pytest.mark.usefixtures("own_servers")

PASSWORD = "all-nodes-have-this-one"
KEPT, REVOKED = ["CD0001", "CD0002"], "CD0003"
QUICK: dict[str, Any] = {"socket_timeout": 0.25, "socket_connect_timeout": 0.25, "retry": Retry(NoBackoff(), 0)}


class Load:
    """A steady load of stores, revocations and reads on two stores, and a record of the results."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.least = dict.fromkeys([*KEPT, REVOKED], 0)
        """The number of the oldest token that a read may return if it begins now."""
        self.acknowledged: dict[str, int] = {}
        self.ids: list[int] = []
        """The ids of all acknowledged tokens."""
        self.dead = self.missing = self.errors = self.reads = 0
        self.longest = {"read": 0.0, "write": 0.0}
        self.sources: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self.doubt_from = math.inf  # from this time on a token may be in doubt

    def login(self, user_id: str | None) -> AccessTokenData:
        return token_data(user_id or "", f"eyJ0eXAi{next(self.numbers):060}")

    @contextlib.contextmanager
    def on(self, writer: HybridUpstoxStorage, reader: HybridUpstoxStorage) -> Iterator[None]:
        with ThreadPoolExecutor(6) as threads:
            jobs = [threads.submit(self._store_on_and_on, writer, user_id) for user_id in self.least]
            jobs += [threads.submit(self._read_on_and_on, reader, user_id) for user_id in self.least]
            try:
                yield
            finally:
                self._stop.set()
            for job in jobs:
                job.result()

    @contextlib.contextmanager
    def of_readers(self, reader: HybridUpstoxStorage) -> Iterator[None]:
        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(self._read_on_and_on, reader, user_id) for user_id in KEPT * 2]
            try:
                yield
            finally:
                self._stop.set()
            for job in jobs:
                job.result()

    def _store_on_and_on(self, store: HybridUpstoxStorage, user_id: str) -> None:
        for turn in itertools.count(1):
            if self._stop.wait(0.005):
                return
            with self._timed("write"):
                if user_id == REVOKED and turn % 5 == 0:
                    store.revoke_token(user_id)
                    self.least[user_id] = self.acknowledged.get(user_id, 0) + 1
                else:
                    self.store(store, user_id)

    def store(self, store: HybridUpstoxStorage, user_id: str) -> None:
        result = store.store_token(user_id)
        self.acknowledged[user_id] = self.least[user_id] = number(result)
        self.ids.append(result["token_id"])

    def _read_on_and_on(self, store: HybridUpstoxStorage, user_id: str) -> None:
        while not self._stop.wait(0.001):
            least = self.least[user_id]
            with self._timed("read"):
                result = store.get_valid_token(user_id)
                self.reads += 1
                if result:
                    self.sources.append((time.monotonic(), result["source"]))
                    self.dead += number(result) < least
                elif user_id in KEPT and time.monotonic() < self.doubt_from:
                    self.missing += least > 0

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        except StorageError:
            self.errors += 1
        self.longest[what] = max(self.longest[what], time.monotonic() - begin)

    def is_as_promised(self, url: str, what: str) -> None:
        assert self.reads > 500
        assert (self.dead, self.missing) == (0, 0)
        rows = bare(
            url, "SELECT user_id, count(*) FILTER (WHERE is_active) AS active, count(*) FROM upstox_tokens GROUP BY 1"
        )
        assert {row["user_id"] for row in rows} >= set(self.least)
        assert all(row["active"] == 1 for row in rows if row["user_id"] in KEPT)
        assert self.lost(url) == 0
        stalls = ", ".join(f"longest {call} {seconds:.1f} s" for call, seconds in self.longest.items())
        notes.append(
            f"Hybrid, {what} under load: {stalls}; {self.errors} errors; {len(self.ids)} stored, {self.reads} read, "
            "none lost"
        )

    def lost(self, url: str) -> int:
        """Count the acknowledged tokens that have no record."""
        assert len(self.ids) > 20
        return len(set(self.ids) - {row["id"] for row in bare(url, "SELECT id FROM upstox_tokens")})


def number(result: Any) -> int:
    return int(result["token"].removeprefix("eyJ0eXAi"))


class Node(RedisServer):
    """One of several nodes that share a password."""

    def _password(self) -> str:
        return PASSWORD

    def client(self) -> Redis:
        return Redis(port=self.port, password=PASSWORD, decode_responses=True, **QUICK)


class SentinelNode(Node):
    def _command(self) -> list[str]:
        super()._command()
        file = self.folder / "valkey.conf"
        file.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n{self._settings['watch']}\n")
        return [str(self._binary), str(file), "--sentinel"]

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        return False


class Primary(PostgreSQLServer):
    def _password(self) -> str:
        (self.folder / "password").write_text(PASSWORD)
        return PASSWORD

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"


class Standby(Primary):
    """A standby that follows this primary."""

    def __init__(self, primary: Primary) -> None:
        super().__init__()
        self._primary = primary

    def _prepare(self) -> None:
        super()._prepare()
        data = self.folder / "data"
        shutil.rmtree(data)
        self._run("pg_basebackup", "-d", self._primary.url, "-D", str(data), "-R", "-c", "fast")

    def _is_ready(self) -> bool:
        file = self.folder / "data" / "postmaster.pid"
        lines = file.read_text().splitlines() if file.exists() else []
        return len(lines) > 7 and lines[7].strip() in ("ready", "standby")

    def promote(self) -> None:
        self.do("SELECT pg_promote()")

    def do(self, sql: str) -> None:
        conn = psycopg2.connect(self.url)
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(sql)
        conn.close()


@pytest.mark.slow
def test_a_sentinel_failover_hands_out_nothing_dead(postgres_url: str, keys: KeyRing) -> None:
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(Node())
        of_primary = {"replicaof": f"127.0.0.1 {primary.port}", "masterauth": PASSWORD}
        replicas = [stack.enter_context(Node(settings=of_primary)) for _ in range(2)]
        with primary.client() as client:
            wait_until(lambda: [client.info("replication")[f"slave{n}"]["state"] for n in (0, 1)] == ["online"] * 2)
        watch = f"sentinel monitor tokens 127.0.0.1 {primary.port} 2\nsentinel auth-pass tokens {PASSWORD}\n"
        watch += "sentinel down-after-milliseconds tokens 1000\nsentinel failover-timeout tokens 3000"
        nodes = [stack.enter_context(SentinelNode(settings={"watch": watch})) for _ in range(3)]
        untyped: Any = Sentinel
        sentinel = untyped([("127.0.0.1", node.port) for node in nodes], sentinel_kwargs=QUICK)
        for each in sentinel.sentinels:
            stack.callback(each.close)
        wait_until(
            lambda: all(
                (known := each.sentinel_masters()["tokens"])["num-slaves"] == 2 and known["num-other-sentinels"] == 2
                for each in sentinel.sentinels
            )
        )
        load = Load()
        options: dict[str, Any] = {"keys": keys, "login": load.login, "believed": 1, "redis_pause": 0.5, "replicas": 1}
        clients = [stack.enter_context(sentinel.master_for("tokens", password=PASSWORD, **QUICK)) for _ in range(2)]
        writer, reader = (stack.enter_context(HybridUpstoxStorage(each, postgres_url, **options)) for each in clients)
        with load.on(writer, reader):
            time.sleep(2)
            killed = time.monotonic()
            primary.kill()
            wait_until(lambda: sentinel.discover_master("tokens")[1] in [replica.port for replica in replicas])
            failed_over = time.monotonic()
            wait_until(lambda: load.sources[-1][0] > failed_over and load.sources[-1][1] == "redis")
            time.sleep(2)
        # Within the first second no sentinel looks for another master.
        assert {source for at, source in load.sources if killed + 0.5 < at < killed + 0.9} == {"postgresql"}
        load.is_as_promised(postgres_url, "Redis's master killed")
        assert load.longest["read"] < 2
        assert reader.get_storage_status()["details"]["redis"]["role"] == "master"


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 0])
def test_a_failover_to_a_replica_that_is_behind_hands_out_nothing_dead(
    postgres_url: str, keys: KeyRing, replicas: int
) -> None:
    """Without `replicas=1` a dead token is handed out, which shows that this test can fail."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(Node())
        of_master = {"replicaof": f"127.0.0.1 {master.port}", "masterauth": PASSWORD}
        replica = stack.enter_context(Node(settings=of_master))
        with master.client() as client:
            wait_until(lambda: client.info("replication")["slave0"]["state"] == "online")
        switch, load = stack.enter_context(Switch(master.port)), Load()
        config = {"host": "127.0.0.1", "port": switch.port, "password": PASSWORD}
        # A stale copy is handed out only while it is believed. On a busy machine, storing takes longer than a second.
        options: dict[str, Any] = {"believed": 1 if replicas else 10, "redis_pause": 0.1, "login": load.login}
        options["replicas"] = replicas
        writer, reader = (
            stack.enter_context(HybridUpstoxStorage(config, postgres_url, keys=keys, **options)) for _ in range(2)
        )
        for user_id in KEPT:
            load.store(writer, user_id)
        with load.of_readers(reader):
            time.sleep(1)
            with replica.client() as client:
                client.replicaof("NO", "ONE")  # From now on it receives no changes, and it accepts writes.
            for user_id in KEPT:
                load.store(writer, user_id)
            switch.lead_to(replica.port)
            switched = time.monotonic()
            wait_until(lambda: load.sources[-1][0] > switched + 2 and load.sources[-1][1] == "redis")
        assert load.reads > 500
        assert load.missing == 0
        assert (load.dead == 0) == (replicas > 0)


@pytest.mark.slow
def test_a_promoted_standby_has_every_acknowledged_token(keys: KeyRing, redis_server: str, redis_prefix: str) -> None:
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(Primary(settings={"synchronous_standby_names": "*"}))
        standby = stack.enter_context(Standby(primary))
        url = f"postgresql://postgres:{PASSWORD}@{primary.host},{standby.host}/postgres?target_session_attrs=read-write"
        load = Load()
        options: dict[str, Any] = {"keys": keys, "login": load.login, "timeout": 2, "redis_prefix": redis_prefix}
        writer, reader = (stack.enter_context(HybridUpstoxStorage(redis_server, url, **options)) for _ in range(2))
        quiet = writer.store_token("CD0009")
        with load.on(writer, reader):
            time.sleep(2)
            # A login that is running cannot store its token now, and the earlier token is dead.
            load.doubt_from = time.monotonic()
            primary.kill()
            before = dict(load.acknowledged)
            time.sleep(0.5)
            meanwhile = reader.get_valid_token(quiet["user_id"])
            assert meanwhile
            assert (meanwhile["token"], meanwhile["source"]) == (quiet["token"], "redis")
            time.sleep(0.5)
            standby.promote()
            wait_until(lambda: all(load.acknowledged[user_id] > before[user_id] for user_id in KEPT))
            time.sleep(2)
        load.is_as_promised(standby.url, "PostgreSQL's primary killed")
        tokens = {row["token_id"] for user_id in KEPT for row in writer.get_token_history(user_id, limit=100_000)}
        for user_id in KEPT:
            read = reader.get_valid_token(user_id)
            assert read
            assert number(read) >= load.acknowledged[user_id], "an acknowledged token is lost"
            assert read["token_id"] in tokens
        assert PASSWORD not in f"{writer!r} {writer.get_storage_status()}"


@pytest.mark.slow
def test_without_a_synchronous_standby_some_would_be_lost(keys: KeyRing, redis_server: str, redis_prefix: str) -> None:
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(Primary())
        standby = stack.enter_context(Standby(primary))
        load = Load()
        options: dict[str, Any] = {"keys": keys, "login": load.login, "timeout": 2, "redis_prefix": redis_prefix}
        writer, reader = (
            stack.enter_context(HybridUpstoxStorage(redis_server, primary.url, **options)) for _ in range(2)
        )
        with load.on(writer, reader):
            time.sleep(1)
            standby.do("ALTER SYSTEM SET primary_conninfo = ''")  # From now on it does not receive any changes.
            standby.do("SELECT pg_reload_conf()")
            time.sleep(1)
            primary.kill()
        standby.promote()
        assert load.lost(standby.url) > 0


def test_a_redis_cluster_holds_the_copies(postgres_url: str, keys: KeyRing) -> None:
    with contextlib.ExitStack() as stack:
        buses = [find_free_port() for _ in range(3)]
        cluster_of = [{"cluster-enabled": "yes", "cluster-port": str(bus)} for bus in buses]
        nodes = [stack.enter_context(Node(settings=settings)) for settings in cluster_of]
        for first, node in zip((0, 6000, 11000), nodes, strict=True):
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, {0: 5999, 6000: 10999, 11000: 16383}[first])
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, buses[0])
        clients = [stack.enter_context(node.client()) for node in nodes]
        wait_until(lambda: all(client.cluster("info")["cluster_state"] == "ok" for client in clients))
        untyped: Any = ClusterNode
        first_of_all = untyped("127.0.0.1", nodes[0].port)
        for client in clients:
            client.execute_command("ACL", "SETUSER", "app", *runtime_acl(cluster=True), "on", f">{PASSWORD}")
        whose: dict[str, Any] = {"username": "app", "password": PASSWORD, "socket_timeout": 1}
        cluster = stack.enter_context(RedisCluster(startup_nodes=[first_of_all], **whose))
        with pytest.raises(ConfigurationError, match="replicas"):
            HybridUpstoxStorage(cluster, postgres_url, keys=keys, replicas=1)
        login = Load().login
        store = stack.enter_context(HybridUpstoxStorage(cluster, postgres_url, keys=keys, login=login))
        for user_id in KEPT:
            token = store.store_token(user_id)["token"]
            read = store.get_valid_token(user_id)
            assert read
            assert (read["token"], read["source"]) == (token, "redis")
        assert store.get_user_statistics(KEPT[0])["total_usage"] == 1
        assert store.get_storage_status()["details"]["redis"]["role"] == "cluster"
        assert store.rotate_keys() == 0
        assert store.revoke_token(KEPT[0])
        assert store.get_valid_token(KEPT[0]) is None
        for node in nodes:
            node.kill()
        read = store.get_valid_token(KEPT[1])
        assert read
        assert read["source"] == "postgresql"
        status = store.get_storage_status()
        assert status["redis"].startswith("error: Redis gave no answer")
        assert store.revoke_token(KEPT[1])
        assert store.get_valid_token(KEPT[1]) is None
        assert store.store_token(KEPT[1]), "the login must not be lost"
