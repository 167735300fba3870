"""PostgreSQL: the schema of other programs and versions, and the rights of each role."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import psycopg2.extras
import pytest

from upstox_db_examples import (
    ConfigurationError,
    PostgreSQLUpstoxStorage,
    StorageError,
    TokenStorage,
    postgresql,
)
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.postgresql.backend import PostgreSQLBackend

from ..contracts.backend import made_up
from ..support.clocks import Clock
from ..support.postgresql import OnPostgreSQL, as_role, bare
from ..support.processes import USER, token_data
from ..support.stores import OpenStore, living

STEPS = PostgreSQLBackend.schema_steps


def with_steps(*steps: str) -> type[PostgreSQLUpstoxStorage]:
    """Return a store class of another version, with these schema steps."""
    backend = type("OtherBackend", (PostgreSQLBackend,), {"schema_steps": steps})
    return type("OtherVersion", (PostgreSQLUpstoxStorage,), {"backend_class": backend})


class TestPostgreSQL(OnPostgreSQL):
    # The schema

    def test_a_user_type_that_upstox_adds_later_is_kept(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda _: token_data(USER).model_copy(update={"user_type": "a_new_kind_of_user"}))
        store.store_token()
        assert self.raw_rows()[0]["user_type"] == "a_new_kind_of_user"

    def test_many_can_make_the_schema_at_once(self, open_store: OpenStore) -> None:
        with ThreadPoolExecutor(8) as threads:
            stores = list(threads.map(lambda _: open_store(), range(8)))
        assert stores[0].store_token()["token"] == living(stores[7])["token"]

    def test_an_older_schema_is_taken_forward_and_a_later_one_is_refused(self, store: PostgreSQLUpstoxStorage) -> None:
        store.store_token()
        with with_steps(*STEPS, "ALTER TABLE upstox_tokens ADD COLUMN colour text")(self.url):
            assert self.raw_rows()[0]["colour"] is None
        with pytest.raises(ConfigurationError, match=r"schema version 4, but this package knows 3. Upgrade it"):
            PostgreSQLUpstoxStorage(self.url)

    def test_the_first_schema_is_taken_forward_with_the_token_in_it(
        self, open_store: OpenStore, another_postgres_url: str
    ) -> None:
        with_steps(*STEPS[:1])(self.url).close()
        of_the_first, self.url = self.url, another_postgres_url
        token = made_up(open_store(), USER)
        self.url = of_the_first
        bare(
            self.url,
            "INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, products, exchanges, created_at, "
            "expires_at, metadata) VALUES (%(user_id)s, %(ciphertext)s, %(key_id)s, 1, '[]', '[]', %(created_at)s, "
            "%(expires_at)s, '{}')",
            user_id=token.user_id,
            ciphertext=token.ciphertext,
            key_id=token.key_id,
            created_at=token.created_at,
            expires_at=token.expires_at,
        )
        store = open_store()
        assert living(store)["token"] == f"a token of {USER}, number 1"
        with store.backend.lock(USER):
            store.backend.begin_login(USER, USER, store.backend.context.now(), {})
        assert store.get_valid_token(USER) is None
        assert bare(self.url, "SELECT version FROM upstox_schema") == [{"version": 3}]

    def test_a_step_that_fails_leaves_the_schema_as_it_was(self, store: PostgreSQLUpstoxStorage) -> None:
        broken = with_steps(*STEPS, "ALTER TABLE upstox_tokens ADD COLUMN colour text; SELECT nonsense")
        with pytest.raises(StorageError):
            broken(self.url)
        assert store.store_token()
        assert "colour" not in self.raw_rows()[0]

    def test_tables_of_another_program_are_refused_and_left_alone(self, postgres_url: str) -> None:
        bare(postgres_url, "CREATE TABLE upstox_tokens (id serial, access_token text)")
        with pytest.raises(ConfigurationError, match="made by another program"):
            PostgreSQLUpstoxStorage(postgres_url)

    def test_the_database_itself_refuses_a_second_active_token(self, store: PostgreSQLUpstoxStorage) -> None:
        store.store_token()
        columns = "user_id, key_id, products, exchanges, created_at, expires_at, metadata"
        with pytest.raises(psycopg2.errors.UniqueViolation, match="one_active_token"):
            bare(
                self.url,
                f"INSERT INTO upstox_tokens (generation, access_token, {columns}) "
                f"SELECT 99, 'x', {columns} FROM upstox_tokens",
            )

    # Rights

    def test_the_runtime_role_stores_and_reads_and_cannot_touch_the_audit_trail(
        self, store: PostgreSQLUpstoxStorage, open_store: OpenStore, clock: Clock
    ) -> None:
        role = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            store.init_database(runtime_role=role)
            url = as_role(self.url, role, "secret")
            owner_url, self.url = self.url, url
            runtime = open_store()
            self.url = owner_url
            first = runtime.store_token()
            assert living(runtime)["token"] == first["token"]
            runtime.store_token()
            runtime.revoke_token(USER)
            runtime.rotate_keys()
            runtime.store_token()
            clock.set(7, 3, 30)
            assert runtime.cleanup_expired_tokens() == 1
            assert len(runtime.get_audit_trail(USER)) > 5
            with pytest.raises(ConfigurationError, match="Do it as the owner of the tables"):
                runtime.cleanup_old_audit_entries(0)
            for forbidden in (
                "DELETE FROM upstox_token_audit",
                "UPDATE upstox_token_audit SET actor = 'nobody'",
                "TRUNCATE upstox_token_audit",
                "DROP TABLE upstox_token_audit",
                "ALTER TABLE upstox_token_audit DISABLE TRIGGER ALL",
                "DELETE FROM upstox_tokens",
                "UPDATE upstox_tokens SET user_id = 'XX0001'",
                "UPDATE upstox_tokens SET expires_at = now() + interval '1 year'",
                "DROP TABLE upstox_tokens",
                "UPDATE upstox_schema SET version = 0",
            ):
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    bare(url, forbidden)
        finally:
            bare(self.url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    @pytest.fixture
    def role(self) -> Iterator[str]:
        """A role that may log in, and nothing else yet."""
        name = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
        yield name
        bare(self.url, f"DROP OWNED BY {name}; DROP ROLE {name}")

    def as_runtime(self, role: str, open_store: OpenStore, **options: Any) -> TokenStorage:
        owner_url, self.url = self.url, as_role(self.url, role, "secret")
        try:
            return open_store(**options)
        finally:
            self.url = owner_url

    def test_an_entry_says_who_wrote_it_and_when_whatever_its_program_says(
        self, store: PostgreSQLUpstoxStorage, role: str, open_store: OpenStore
    ) -> None:
        store.init_database(runtime_role=role)
        runtime = self.as_runtime(
            role, open_store, actor="somebody else", clock=lambda: datetime(2020, 1, 1, tzinfo=UTC)
        )
        runtime.store_token()
        living(runtime)
        told = "SELECT DISTINCT recorded_by, now() - recorded_at < interval '1 hour' AS at FROM upstox_token_audit"
        assert bare(self.url, told) == [{"recorded_by": role, "at": True}]
        columns = "user_id, action, actor, performed_at"
        values = f"'{USER}', 'used', 'x', now()"
        url = as_role(self.url, role, "secret")
        for forbidden in (
            f"INSERT INTO upstox_token_audit ({columns}, recorded_by) VALUES ({values}, 'x')",
            f"INSERT INTO upstox_token_audit ({columns}, recorded_at) VALUES ({values}, now())",
            f"INSERT INTO upstox_token_audit ({columns}, id) OVERRIDING SYSTEM VALUE VALUES ({values}, 9)",
            "INSERT INTO upstox_tokens (id, user_id, key_id, generation, products, exchanges, is_active, created_at, "
            "expires_at, metadata) OVERRIDING SYSTEM VALUE VALUES "
            "(9, 'ZZ0001', 'x', 1, '[]', '[]', false, now(), now(), '{}')",
            "CREATE OR REPLACE FUNCTION upstox_next_generation() RETURNS trigger LANGUAGE sql AS ''",
            "ALTER TABLE upstox_tokens DISABLE TRIGGER next_generation",
            "SELECT setval('upstox_tokens_id_seq', 9)",
        ):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                bare(url, forbidden)
        with pytest.raises(psycopg2.errors.InvalidTextRepresentation):  # With it, no token could be stored.
            bare(url, "INSERT INTO upstox_login_notes VALUES ('running x', 'no key')")

    def test_the_database_refuses_any_generation_but_the_next(
        self, store: PostgreSQLUpstoxStorage, role: str, open_store: OpenStore, upstox: LocalUpstox
    ) -> None:
        store.init_database(runtime_role=role)
        runtime = self.as_runtime(role, open_store)
        runtime.store_token()
        runtime.store_token()
        logins, url = upstox.logins(), as_role(self.url, role, "secret")

        def put(user_id: str, generation: int) -> None:
            bare(
                url,
                "INSERT INTO upstox_tokens (user_id, key_id, generation, products, exchanges, is_active, created_at, "
                "expires_at, metadata) VALUES (%s, 'x', %s, '[]', '[]', false, now(), now(), '{}')",
                user_id,
                generation,
            )

        for user_id, generation in ((USER, 2**31 - 1), (USER, 4), (USER, 0), ("CD0001", 2), ("CD0001", -1)):
            with pytest.raises(psycopg2.errors.CheckViolation, match="The next generation of"):
                put(user_id, generation)
        with pytest.raises(psycopg2.errors.UniqueViolation):
            put(USER, 2)
        token = runtime.store_token()["token"]
        assert upstox.logins() == logins + 1
        assert living(runtime)["token"] == token
        put("CD0001", 1)
        store.backend.insert(made_up(store, "EF0001", 5))  # The owner may leave gaps, as an import does.

    def test_a_role_that_was_let_in_earlier_loses_what_it_no_longer_needs(
        self, role: str, open_store: OpenStore
    ) -> None:
        with with_steps(*STEPS[:2])(self.url) as earlier:
            bare(self.url, f"GRANT INSERT ON upstox_tokens, upstox_token_audit TO {role}, PUBLIC")
            earlier.backend.record(USER, "login", earlier.backend.context.now())
        open_store().backend.record(USER, "login", datetime.now(UTC))
        entry = "(user_id, action, actor, performed_at{}) VALUES ('AB1234', 'used', 'x', now(){})"
        url = as_role(self.url, role, "secret")
        bare(url, f"INSERT INTO upstox_token_audit {entry.format('', '')}")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            bare(url, f"INSERT INTO upstox_token_audit {entry.format(', recorded_by', ", 'x'")}")
        told = bare(self.url, "SELECT recorded_by FROM upstox_token_audit ORDER BY id")
        assert told == [{"recorded_by": None}, {"recorded_by": urlsplit(self.url).username}, {"recorded_by": role}]

    def test_a_runtime_role_learns_who_upgrades_an_older_schema_and_how(self) -> None:
        role = f"runtime_{urlsplit(self.url).path[-12:]}"
        bare(self.url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            with with_steps(*STEPS[:1])(self.url) as owner:
                grants = "GRANT SELECT ON upstox_schema, upstox_tokens TO {role}"
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(postgresql.schema, "GRANTS", grants)
                    owner.init_database(runtime_role=role)
            runtime = as_role(self.url, role, "secret")
            with pytest.raises(ConfigurationError, match=f"owner: upstox-db init --runtime-role {role}$"):
                PostgreSQLUpstoxStorage(runtime)
            assert bare(self.url, "SELECT version FROM upstox_schema") == [{"version": 1}]
            PostgreSQLUpstoxStorage(self.url).init_database(runtime_role=role)
            PostgreSQLUpstoxStorage(runtime).close()
        finally:
            bare(self.url, f"DROP OWNED BY {role}; DROP ROLE {role}")

    def test_a_role_with_an_odd_name_is_quoted(self, store: PostgreSQLUpstoxStorage) -> None:
        with pytest.raises(ConfigurationError, match="does not know that role"):
            store.init_database(runtime_role='x"; DROP TABLE upstox_tokens; --%s')
        assert self.raw_rows() == []
