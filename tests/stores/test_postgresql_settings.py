"""PostgreSQL, alone and behind Redis: settings that a role, a database or the environment has set, and schemas."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import ConfigurationError, PostgreSQLUpstoxStorage, StoreUnavailable, TokenStorage
from upstox_db_examples.local.servers import PostgreSQLServer

from ..support.hybrid import OnHybrid
from ..support.leaks import shown_with_locals
from ..support.postgresql import OnPostgreSQL, RowsInPostgreSQL, as_role, bare
from ..support.processes import USER, token_data
from ..support.stores import CountsLogins, OpenStore, living

UNKIND = {
    "statement_timeout": "300ms",
    "lock_timeout": "300ms",
    "idle_in_transaction_session_timeout": "300ms",
    "idle_session_timeout": "300ms",
    "transaction_timeout": "300ms",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "default_transaction_read_only": "on",
    "synchronous_commit": "off",
}
OURS = {name: "0" for name in UNKIND if name.endswith("_timeout")} | {
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "default_transaction_read_only": "off",
    "synchronous_commit": "on",
}
HINDI = "\u0935\u094d\u092f\u093e\u092a\u093e\u0930\u0940"  # "trader"


class SettingsOfOthers(RowsInPostgreSQL, CountsLogins):
    """For each store that keeps its tokens in PostgreSQL."""

    def set(self, **settings: str) -> None:
        """Set these for the database, as far as this version of the server knows them."""
        known = {row["name"] for row in bare(self.url, "SELECT name FROM pg_settings")}
        name = urlsplit(self.url).path[1:]
        changes = [f'ALTER DATABASE "{name}" SET {key} = {value}' for key, value in settings.items() if key in known]
        bare(self.url, "; ".join(changes))

    @pytest.fixture
    def unkind(self) -> None:
        self.set(**{name: f"'{value}'" for name, value in UNKIND.items()})

    @pytest.mark.usefixtures("unkind")
    def test_callers_wait_for_the_login_of_another_for_as_long_as_it_takes(self, open_store: OpenStore) -> None:
        begun = threading.Event()

        def slow(user_id: str | None) -> AccessTokenData:
            begun.set()
            time.sleep(1.5)
            return self.login(user_id)

        stores = [open_store(login=slow) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            first = threads.submit(stores[0].get_or_create_token, USER)
            assert begun.wait(10)
            others = list(threads.map(lambda store: store.get_or_create_token(USER)["token"], stores[1:]))
        assert {first.result()["token"], *others} == {living(stores[0])["token"]}
        assert self.logins == 1

    @pytest.mark.usefixtures("unkind")
    def test_reads_that_come_at_once_are_all_counted(self, open_store: OpenStore) -> None:
        store = open_store(login=self.login)
        store.store_token(USER)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: living(store), range(80)))
        assert store.get_user_statistics(USER)["total_usage"] == 80

    @pytest.mark.usefixtures("unkind")
    def test_all_connections_have_our_settings_and_the_status_tells_what_they_override(
        self, open_store: OpenStore
    ) -> None:
        store = open_store()
        backend: Any = getattr(store.backend, "postgres", store.backend)
        shown = "SELECT name, setting FROM pg_settings WHERE name = ANY (%(names)s)"

        def ask() -> dict[str, str]:
            return {row["name"]: row["setting"] for row in backend.connections.run(shown, names=list(UNKIND))}

        known = ask()
        assert known == {name: OURS[name] for name in known}
        with store.backend.lock(USER):
            assert ask() == known
        details = backend.check_health()["details"]["postgresql"]
        assert details["overridden"] == {name: UNKIND[name] for name in known}
        assert details["schema"] == "public"

    def test_a_stricter_promise_to_a_standby_stays(self, open_store: OpenStore) -> None:
        self.set(synchronous_commit="remote_apply")
        backend: Any = getattr(open_store().backend, "postgres", open_store().backend)
        assert backend.connections.run("SHOW synchronous_commit") == [{"synchronous_commit": "remote_apply"}]

    @pytest.mark.parametrize("setting", ["client_encoding", "PGCLIENTENCODING", "standard_conforming_strings"])
    def test_any_name_is_stored_as_it_is(
        self, open_store: OpenStore, setting: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if setting == "PGCLIENTENCODING":
            monkeypatch.setenv(setting, "LATIN1")
        else:
            self.set(**{setting: "'LATIN1'" if setting == "client_encoding" else "off"})
        name = rf"{HINDI} \ \\ ' \' %s é"
        store = open_store(login=lambda _: token_data(USER).model_copy(update={"user_name": name}))
        store.store_token()
        assert store.get_token_history(USER)[0]["user_name"] == name

    # Schemas

    def test_the_schema_is_chosen_once(self, open_store: OpenStore) -> None:
        bare(self.url, 'CREATE SCHEMA "To k"')
        self.set(search_path='"To k", public')
        store = open_store(login=self.login)
        store.store_token(USER)
        self.set(search_path="public")
        kill_backends(self.url)
        store.store_token(USER)
        assert store.get_user_statistics(USER)["total_tokens"] == 2
        assert bare(self.url, 'SELECT count(*) AS tokens FROM "To k".upstox_tokens') == [{"tokens": 2}]
        assert bare(self.url, "SELECT to_regclass('upstox_tokens') AS there") == [{"there": None}]

    def test_tables_are_found_although_an_earlier_schema_of_the_path_was_made_since(
        self, open_store: OpenStore
    ) -> None:
        token = open_store(login=self.login).store_token(USER)["token"]
        bare(self.url, f"CREATE SCHEMA {urlsplit(self.url).username}")  # "$user" comes first
        assert living(open_store())["token"] == token

    def test_a_runtime_role_has_all_it_needs_in_another_schema(self, open_store: OpenStore) -> None:
        role = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'; CREATE SCHEMA tok")
        self.set(search_path="tok")
        try:
            open_store().init_database(runtime_role=role)
            owner_url, self.url = self.url, as_role(self.url, role, "secret")
            store = open_store(login=self.login)
            self.url = owner_url
            token = store.get_or_create_token(USER)["token"]
            assert living(store)["token"] == token
            store.revoke_token(USER)
            assert len(store.get_audit_trail(USER)) >= 3
        finally:
            bare(self.url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    # What is missing

    def test_a_schema_that_is_not_there_is_named_as_the_reason(self, open_store: OpenStore) -> None:
        self.set(search_path="missing")
        with pytest.raises(ConfigurationError, match="No schema in the search_path"):
            open_store()

    def test_a_database_that_is_not_there_is_named_as_the_reason(self, open_store: OpenStore) -> None:
        self.url = urlunsplit(urlsplit(self.url)._replace(path="/Missing"))
        with pytest.raises(ConfigurationError, match=r"/Missing has no database of this name"):
            open_store()

    def test_a_role_that_may_not_come_in_is_named_as_the_reason(self, open_store: OpenStore) -> None:
        role = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {role} PASSWORD 'secret'")
        owner_url, self.url = self.url, as_role(self.url, role, "secret")
        try:
            with pytest.raises(ConfigurationError, match="does not let this role in") as caught:
                open_store()
            assert "secret" not in shown_with_locals(caught.value)
        finally:
            bare(owner_url, f"DROP ROLE {role}")

    def test_a_database_whose_encoding_lacks_letters_is_refused_before_a_login(self, open_store: OpenStore) -> None:
        name = f"latin_{urlsplit(self.url).path[-12:]}"
        run(self.url, f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
        before, self.url = self.url, urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))
        try:
            with pytest.raises(ConfigurationError, match="has the encoding LATIN1"):
                open_store()
        finally:
            run(before, f"DROP DATABASE {name} WITH (FORCE)")


class TestPostgreSQL(OnPostgreSQL, SettingsOfOthers):
    def test_a_missing_function_is_not_reported_as_worth_another_attempt(self, store: PostgreSQLUpstoxStorage) -> None:
        with pytest.raises(ConfigurationError, match="SQLSTATE 42883"):
            store.backend.connections.run("SELECT no_such_function()")
        with pytest.raises(StoreUnavailable, match="SQLSTATE 40001"):
            store.backend.connections.run("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")


class TestHybrid(OnHybrid, SettingsOfOthers):
    pass


@pytest.mark.usefixtures("own_servers")
def test_too_many_connections_are_reported_as_such() -> None:
    with PostgreSQLServer(settings={"max_connections": "10", "fsync": "off"}) as server:
        store: TokenStorage = PostgreSQLUpstoxStorage(server.url)
        health: Any = store.get_storage_status()
        assert "has fsync off" in health["details"]["postgresql"]["warning"]
        store.close()
        held = []
        with pytest.raises(psycopg2.OperationalError):
            while True:
                held.append(psycopg2.connect(server.url))
        with pytest.raises(StoreUnavailable, match="no free connections") as caught:
            PostgreSQLUpstoxStorage(server.url)
        assert "password" not in str(caught.value)
        for conn in held:
            conn.close()


def kill_backends(url: str) -> None:
    mine = "datname = current_database() AND pid <> pg_backend_pid()"
    bare(url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {mine}")


def run(url: str, sql: str) -> None:
    """One statement that cannot be in a transaction."""
    conn = psycopg2.connect(url)
    conn.autocommit = True
    conn.cursor().execute(sql)
    conn.close()
