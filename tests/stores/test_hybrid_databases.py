"""The hybrid store: several databases behind one Redis, all with the same prefix."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from redis import Redis

from upstox_db_examples import HybridUpstoxStorage, KeyRing, StoreUnavailable
from upstox_db_examples.local.servers import PostgreSQLServer, RedisServer

from ..contracts.backend import made_up
from ..support.clocks import Clock
from ..support.hybrid import OnHybrid
from ..support.postgresql import as_role, bare
from ..support.processes import KEY, USER, token_data
from ..support.stores import OpenStore, living, opening

NAME = "SELECT name FROM upstox_database"


def database_of(store: Any) -> str:
    return str(store.backend.redis.database)


class TestHybrid(OnHybrid):
    @pytest.fixture(autouse=True)
    def _another(self, another_postgres_url: str) -> None:
        self.another_url = another_postgres_url

    @pytest.fixture
    def other(self, open_store: OpenStore) -> HybridUpstoxStorage:
        """Staging, beside production."""
        self.url, production = self.another_url, self.url
        other = open_store(login=lambda user_id: token_data(user_id or USER, f"eyJ0eXAi{'S' * 60}"))
        self.url = production
        assert isinstance(other, HybridUpstoxStorage)
        return other

    def test_each_hands_out_its_own_token_and_counts_its_own_uses(
        self, store: HybridUpstoxStorage, other: HybridUpstoxStorage
    ) -> None:
        store.backend.insert(made_up(store, "ZZ0001"))  # so that one id belongs to two users
        own, others = store.store_token(USER)["token"], other.store_token(USER)["token"]
        assert own != others
        for _ in range(3):
            assert (living(store)["token"], living(other)["token"]) == (own, others)
        assert living(store)["source"] == living(other)["source"] == "redis"
        for each in (store, other):
            assert each.get_user_statistics(USER)["total_usage"] == 4
        assert store.get_user_statistics("ZZ0001")["total_usage"] == 0
        assert other.revoke_token(USER)
        assert living(store)["source"] == "redis"

    def test_a_copied_database_has_another_name_and_so_has_each_schema(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        name, copy = f"copy_{self.prefix}", self.url.rpartition("/")[0] + f"/copy_{self.prefix}"
        store.close()
        bare_url, self.url = self.url, copy
        conn_url = bare_url.rpartition("/")[0] + "/postgres"
        run_outside(conn_url, f"CREATE DATABASE {name} TEMPLATE {urlsplit(bare_url).path[1:]}")
        try:
            assert bare(copy, NAME) == bare(bare_url, NAME), "the rows were copied, so the database's oid has to count"
            copied = open_store()
            assert database_of(copied) != database_of(store)
            copied.close()
        finally:
            run_outside(conn_url, f"DROP DATABASE {name} WITH (FORCE)")
        bare(bare_url, "CREATE SCHEMA staging")
        self.url = f"{bare_url}?options=-csearch_path%3Dstaging"
        assert database_of(open_store()) != database_of(store)
        self.url = bare_url
        assert database_of(open_store()) == database_of(store), "and it stays the same"

    def test_a_program_with_the_least_rights_shares_the_copies(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        role, owners = f"app_{self.prefix}", self.url
        bare(owners, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            store.init_database(runtime_role=role)
            bare(owners, "REVOKE SELECT ON upstox_database FROM PUBLIC")  # as a restore without privileges does
            store.init_database(runtime_role=role)
            self.url = as_role(owners, role, "secret")
            program = open_store()
            token = store.store_token()["token"]
            assert (living(program)["token"], living(program)["source"]) == (token, "redis")
            program.close()
        finally:
            bare(owners, f"DROP OWNED BY {role}")
            bare(owners, f"DROP ROLE {role}")

    def test_a_database_that_was_restored_without_its_rows_gets_a_name(
        self, store: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        bare(self.url, "REFRESH MATERIALIZED VIEW upstox_database WITH NO DATA")  # as pg_dump --schema-only leaves it
        assert database_of(open_store()) != database_of(store)
        assert len(bare(self.url, NAME)) == 1

    def test_uses_that_postgresql_does_not_confirm_are_not_counted(self, store: HybridUpstoxStorage) -> None:
        store.backend.insert(made_up(store, "ZZ0001"))
        store.store_token(USER)
        living(store)
        ids = {row["user_id"]: row["id"] for row in self.raw_rows()}
        at = int(store.backend.context.now().timestamp())
        use = {"token": ids[USER], "user": USER, "actor": "forger", "at": at}
        stream = f"{{{self.prefix}}}:{self.database()}:uses"
        for number, forged in enumerate(
            (
                {**use, "token": ids["ZZ0001"]},
                {**use, "user": "ZZ0001"},
                {**use, "token": 10**6},
                {**use, "at": at + 10**8},  # after the token's death
                {**use, "actor": "a\0b"},  # PostgreSQL takes no NUL
                {**use, "actor": b"\xff\xfe", "token": 10**6},
                {**use, "user": "x" * 60},
            )
        ):
            self.redis.xadd(stream, {**forged, "use": f"{number:032x}"})
        self.redis.xadd(stream, {**use, "use": "longer than an index key may be" * 200})
        living(store)
        for user_id, uses in {USER: 2, "ZZ0001": 0}.items():
            assert store.get_user_statistics(user_id)["total_usage"] == uses
            assert store.get_user_statistics(user_id)["last_usage"] in (None, store.backend.context.now().isoformat())
        assert "forger" not in {entry["actor"] for entry in store.get_audit_trail(USER)}
        assert self.redis.xlen(stream) == 0

    @pytest.mark.parametrize("decodes", [False, True])
    def test_an_entry_that_is_not_text_stops_no_fold(self, open_store: OpenStore, decodes: bool) -> None:
        self.redis_url += f"?decode_responses={decodes}"
        store = open_store()
        store.store_token()
        living(store)
        stream = f"{{{self.prefix}}}:{self.database()}:uses"
        self.redis.xadd(stream, {b"\xff": b"\xfe"})
        assert store.get_user_statistics(USER)["total_usage"] == 1
        self.redis.set(self.key(), b"1 1 1 1 \xff")
        assert living(store)["source"] == "postgresql"

    def test_uses_under_the_prefix_of_an_earlier_version_are_folded_once(
        self, store: HybridUpstoxStorage, other: HybridUpstoxStorage, open_store: OpenStore
    ) -> None:
        store.backend.insert(made_up(store, "ZZ0001"))
        earlier = f"{{{self.prefix}}}:uses"
        number = 0
        for each, uses in ((other, 510), (store, 510)):  # More of another's than one message takes come first.
            each.store_token(USER)
            newest = each.backend.find_newest(USER)
            assert newest is not None
            for _ in range(uses):
                number += 1
                use = {"token": str(newest.token_id), "user": USER, "actor": "earlier", "use": f"{number:032x}"}
                self.redis.xadd(earlier, {**use, "at": str(int(each.backend.context.now().timestamp()))})
        self.redis.xadd(earlier, {"some": "thing"})
        assert store.get_user_statistics(USER)["total_usage"] == 510
        assert open_store().get_user_statistics(USER)["total_usage"] == 510
        assert self.redis.xlen(earlier) == 511, "what may be another database's stays"
        assert other.get_user_statistics(USER)["total_usage"] == 510
        assert self.redis.xlen(earlier) == 1
        assert store.get_user_statistics("ZZ0001")["total_usage"] == 0


def run_outside(url: str, sql: str) -> None:
    """A statement that cannot be part of a transaction."""
    conn = psycopg2.connect(url)
    conn.autocommit = True
    try:
        with conn.cursor() as cursor:
            cursor.execute(sql)
    finally:
        conn.close()


@pytest.mark.usefixtures("own_servers")
class TestAProgramThatStartsWithoutPostgreSQL:
    @pytest.fixture
    def postgresql(self) -> Iterator[PostgreSQLServer]:
        with PostgreSQLServer() as server:
            yield server

    @pytest.fixture
    def redis(self) -> Iterator[RedisServer]:
        with RedisServer() as server:
            yield server

    @pytest.fixture
    def open_on(
        self, postgresql: PostgreSQLServer, redis: RedisServer, keys: KeyRing, clock: Clock
    ) -> Iterator[Callable[..., HybridUpstoxStorage]]:
        """Open the store on production, or on staging."""
        run_outside(postgresql.url, "CREATE DATABASE staging")

        def connect(name: str, **options: Any) -> HybridUpstoxStorage:
            login = lambda user_id: token_data(user_id or USER, f"eyJ0eXAi{name:_>60}")  # noqa: E731
            url = postgresql.url.rpartition("/")[0] + f"/{name}"
            return HybridUpstoxStorage(redis.url, url, login=login, **options)

        with opening(connect, keys=keys, clock=clock, believed=0.3, timeout=1) as open_one:
            yield open_one

    def test_it_reads_if_redis_knows_one_database_and_says_so_if_it_knows_several(
        self,
        postgresql: PostgreSQLServer,
        redis: RedisServer,
        open_on: Callable[..., HybridUpstoxStorage],
    ) -> None:
        production, staging = open_on("postgres"), open_on("staging")
        token = production.store_token(USER)["token"]
        postgresql.kill()
        late = open_on("postgres")
        assert (living(late)["token"], living(late)["source"]) == (token, "redis")
        postgresql.start()
        staging.store_token(USER)
        postgresql.kill()
        late = open_on("postgres")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"copies from 2 databases.* redis_prefix"):
                late.get_valid_token(USER)
        assert living(production)["token"] == token, "what knows its database reads on"
        assert late.get_storage_status()["redis"] == "healthy"
        postgresql.start()
        time.sleep(0.4)
        assert living(late)["token"] == token
        assert living(late)["source"] == "redis"
        with Redis.from_url(redis.url) as bare_redis:
            bare_redis.set("{upstox}:databases", "one 1 another 2")  # their copies have ended
        postgresql.kill()
        with pytest.raises(StoreUnavailable, match="PostgreSQL at"):
            open_on("postgres").get_valid_token(USER)

    def test_it_gives_a_wrong_guess_up_when_postgresql_is_back(
        self, postgresql: PostgreSQLServer, open_on: Callable[..., HybridUpstoxStorage]
    ) -> None:
        production, staging = open_on("postgres"), open_on("staging")
        others = staging.store_token(USER)["token"]
        postgresql.kill()
        late = open_on("postgres")
        assert living(late)["token"] == others, "the only one that Redis knows"
        postgresql.start()
        token = production.store_token(USER)["token"]
        time.sleep(0.4)
        for _ in range(3):
            assert living(late)["token"] == token
        assert living(staging)["token"] == others
        assert late.revoke_token(USER)
        assert production.get_valid_token(USER) is None


@pytest.mark.usefixtures("own_servers")
def test_a_database_restored_from_a_dump_has_a_name_of_its_own(redis_server: str, redis_prefix: str) -> None:
    with PostgreSQLServer() as server:
        HybridUpstoxStorage(redis_server, server.url, redis_prefix=redis_prefix, keys=KEY).close()
        dump = subprocess.run([str(server.binaries / "pg_dump"), server.url], check=True, capture_output=True).stdout
        run_outside(server.url, "CREATE DATABASE restored")
        restored = server.url.rpartition("/")[0] + "/restored"
        command = [str(server.binaries / "psql"), "-v", "ON_ERROR_STOP=1", "-q", "-o", os.devnull, restored]
        subprocess.run(command, check=True, input=dump, capture_output=True)
        names = {bare(url, NAME)[0]["name"] for url in (server.url, restored)}
        assert len(names) == 2
