"""PostgreSQL: connections that are limited, lost, refused and encrypted."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    KeyRing,
    PostgreSQLUpstoxStorage,
    Secret,
    StorageError,
    StoreUnavailable,
)
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.servers import PostgreSQLServer
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.postgresql import queries
from upstox_db_examples.postgresql.connections import PostgreSQLConnections
from upstox_db_examples.postgresql.prepared import message

from ..support.certificates import expired_certificates
from ..support.leaks import shown_with_locals
from ..support.postgresql import OnPostgreSQL, as_role, bare
from ..support.processes import USER, made_up_login, token_data
from ..support.stores import OpenStore, living


class TestPostgreSQL(OnPostgreSQL):
    # Connections

    def test_a_pool_that_is_too_small_says_so_in_time(self, open_store: OpenStore) -> None:
        store = open_store(pool_size=1, timeout=0.5)
        assert isinstance(store, PostgreSQLUpstoxStorage)
        with store.backend.connections.session():
            begin = time.monotonic()
            with ThreadPoolExecutor(1) as thread, pytest.raises(StoreUnavailable, match="pool_size"):
                thread.submit(store.get_valid_token, USER).result()
            assert 0.5 <= time.monotonic() - begin < 0.75 + 0.5
        assert store.get_valid_token(USER) is None

    def test_a_crowd_of_threads_gets_by_with_a_small_pool(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        store = open_store(pool_size=2)
        with ThreadPoolExecutor(32) as threads:
            tokens = {result["token"] for result in threads.map(store.get_or_create_token, [USER] * 64)}
        assert len(tokens) == 1
        assert upstox.logins() == 1

    def test_logins_of_several_users_at_once_reuse_their_connections(self, open_store: OpenStore) -> None:
        everybody = [f"CD{n:04}" for n in range(4)]
        barrier = threading.Barrier(4)

        def log_in_together(user_id: str | None) -> AccessTokenData:
            barrier.wait(10)
            return token_data(user_id or USER)

        def backends() -> set[Any]:
            mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            return {row["pid"] for row in bare(self.url, mine)}

        store = open_store(login=log_in_together)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(store.store_token, everybody))
            before = backends()
            list(threads.map(store.store_token, everybody))
        assert backends() == before
        assert len(before) >= 4

    @pytest.mark.parametrize(
        "meddling",
        [
            "DEALLOCATE ALL",  # as a pooler that nobody noticed: this session does not know the names ...
            "PREPARE {name} AS SELECT 1",  # ... or somebody else has used them
        ],
    )
    def test_a_session_whose_prepared_statements_changed_is_used_without_them(
        self, open_store: OpenStore, store: PostgreSQLUpstoxStorage, meddling: str
    ) -> None:
        store.store_token()
        other = open_store() if "PREPARE" in meddling else store
        assert isinstance(other, PostgreSQLUpstoxStorage)
        connections, (name,) = other.backend.connections, message(queries.FIND).names
        with connections.session() as conn:
            connections.answer(conn, meddling.format(name=name))
        assert [living(other)["usage_count"] for _ in range(3)] == [1, 2, 3]
        assert other.store_token()["token"] == living(store)["token"]

    def test_backends_that_were_killed_are_replaced_silently(self, store: PostgreSQLUpstoxStorage) -> None:
        token = store.store_token()["token"]
        with ThreadPoolExecutor(5) as threads:
            list(threads.map(lambda _: living(store), range(20)))
        bare(
            self.url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        time.sleep(0.2)
        assert living(store)["token"] == token

    def test_the_guides_connection_is_an_ordinary_one(self, store: PostgreSQLUpstoxStorage) -> None:
        with store.get_connection() as conn, conn.cursor() as cursor:
            cursor.execute("CREATE TABLE mine (x int)")
            conn.commit()
        assert conn.closed

    def test_what_is_raised_inside_the_guides_connection_stays_what_it_is(self, store: PostgreSQLUpstoxStorage) -> None:
        def nonsense(conn: Any) -> None:
            conn.cursor().execute("SELECT nonsense")

        def another_database(_: Any) -> None:
            psycopg2.connect("host=127.0.0.1 port=1 dbname=elsewhere")

        def a_request(_: Any) -> None:
            raise TimeoutError("of the caller's own request")

        for body, own in (
            (nonsense, psycopg2.errors.UndefinedColumn),
            (another_database, psycopg2.OperationalError),
            (a_request, TimeoutError),
        ):
            with pytest.raises(own), store.get_connection() as conn:
                body(conn)
            assert conn.closed
        unreachable = PostgreSQLConnections(Secret("host=127.0.0.1 port=1 dbname=x"), 1, 1.0)
        with pytest.raises(StoreUnavailable, match="cannot be reached"), unreachable.ordinary():
            pass

    @pytest.mark.parametrize(
        "bad", ["", "postgresql://user:hunter2hunter2@host:port/db", "password=hunter2hunter2 nonsense", None]
    )
    def test_a_bad_connection_string_is_refused_without_showing_it(self, bad: Any) -> None:
        with pytest.raises(StorageError) as caught:
            PostgreSQLUpstoxStorage(bad, timeout=1)
        assert "hunter2" not in shown_with_locals(caught.value)

    def test_a_first_host_that_gives_no_answer_is_passed_over(self, open_store: OpenStore) -> None:
        parts = urlsplit(self.url)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # like a machine that is switched off
            dead, alive = f"127.0.0.1:{silent.getsockname()[1]}", f"{parts.hostname}:{parts.port}"
            user = parts.netloc.rpartition("@")[0]
            self.url = urlunsplit(parts._replace(netloc=f"{user}@{dead},{alive}"))
            store = open_store(timeout=2)
            assert store.store_token()["token"] == living(store)["token"]

    def test_a_wrong_password_is_said_and_not_shown(self) -> None:
        wrong = as_role(self.url, "postgres", "hunter2hunter2")
        with pytest.raises(ConfigurationError, match="refused the role or its password") as caught:
            PostgreSQLUpstoxStorage(wrong)
        assert "hunter2" not in shown_with_locals(caught.value)


@pytest.mark.usefixtures("own_servers")
def test_tls_is_verified_and_a_wrong_authority_is_refused(tmp_path: Path, keys: KeyRing) -> None:
    with PostgreSQLServer(tls=True) as server:
        verified = f"{server.url}?sslmode=verify-full&sslrootcert="
        with PostgreSQLUpstoxStorage(f"{verified}{server.ca_file}", login=made_up_login, keys=keys) as store:
            store.store_token(USER)
            with store.backend.connections.session() as conn:
                assert conn.info.ssl_in_use
        wrong_authority, _, _ = make_certificates(tmp_path)
        wrong_host = verified.replace("127.0.0.1", "another.name") + f"{server.ca_file}&hostaddr=127.0.0.1"
        for refused in (f"{verified}{wrong_authority}", wrong_host):
            with pytest.raises(ConfigurationError, match="failed the TLS check"):
                PostgreSQLUpstoxStorage(refused)


@pytest.mark.usefixtures("own_servers")
def test_a_certificate_that_has_expired_is_refused_and_named() -> None:
    with expired_certificates(), PostgreSQLServer(tls=True) as server:
        url = f"{server.url}?sslmode=verify-full&sslrootcert={server.ca_file}"
        with pytest.raises(ConfigurationError, match="has it expired"):
            PostgreSQLUpstoxStorage(url)
