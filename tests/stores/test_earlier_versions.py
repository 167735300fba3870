"""Data from an earlier version opens, reads and works as before: databases and an export of version 1.

Version 1 itself wrote fixtures/version_1, with the key of tests.support.processes. A login without a user name gave
AB1234 a token. An hour later a login of AB1234 gave the next token, which was read once. CD5678 was revoked at once.
The login of ef9012 reported no account, and spelled its user in lower case.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import (
    ConfigurationError,
    HybridUpstoxStorage,
    KeyRing,
    MongoUpstoxStorage,
    PooledUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
    TokenStorage,
    export_tokens,
    import_tokens,
    migrate,
)
from upstox_db_examples.mongodb import schema as mongodb_schema
from upstox_db_examples.postgresql.backend import PostgreSQLBackend
from upstox_db_examples.sqlite.backend import SQLiteBackend

from ..support.clocks import Clock
from ..support.databases import MongoDatabase
from ..support.mongodb import restore_version_1
from ..support.postgresql import bare
from ..support.processes import KEY, USER, Address, made_up_login
from ..support.project import VERSION_1

OLD_KEY = b"the same key for all processes.."  # KEY contains this, but does not return it
ACCOUNT = "0123456789abcdef"
FIRST, LATER, DEATH = (f"2099-01-06T{time}:00+00:00" for time in ("03:15", "04:15", "22:00"))
TOKENS = {USER: f"eyJ0eXAi-fixture-{2:044}", "ef9012": "eyJ0eXAi-fixture-lower" + "0" * 40}
STATISTICS = {
    USER: (2, 1, 1, 0.5, LATER, LATER),
    "CD5678": (1, 0, 0, 0.0, LATER, None),
    "ef9012": (1, 1, 0, 0.0, LATER, None),
}
HISTORY = {
    USER: [(LATER, DEATH, True, 1, LATER), (FIRST, DEATH, False, 0, None)],
    "CD5678": [(LATER, DEATH, False, 0, None)],
    "ef9012": [(LATER, DEATH, True, 0, None)],
}
AUDIT = {
    USER: [
        ("used", LATER, LATER),
        ("created", LATER, LATER),
        ("deactivated", LATER, FIRST),
        ("login", LATER, None),
        ("created", FIRST, FIRST),
    ],
    "CD5678": [("revoked", LATER, LATER), ("created", LATER, LATER), ("login", LATER, None)],
    "ef9012": [("created", LATER, LATER), ("login", LATER, None)],
}

Opened = Callable[..., TokenStorage]


class SQLiteBackendOfVersion1(SQLiteBackend):
    schema_steps = SQLiteBackend.schema_steps[:1]


class PostgreSQLBackendOfVersion1(PostgreSQLBackend):
    schema_steps = PostgreSQLBackend.schema_steps[:1]


class SQLiteOfVersion1(SQLiteUpstoxStorage):
    backend_class = SQLiteBackendOfVersion1


class PooledOfVersion1(PooledUpstoxStorage):
    backend_class = SQLiteBackendOfVersion1


class PostgreSQLOfVersion1(PostgreSQLUpstoxStorage):
    backend_class = PostgreSQLBackendOfVersion1


class HybridOfVersion1(HybridUpstoxStorage):
    postgres_class = PostgreSQLBackendOfVersion1


OF_VERSION_1 = {
    "SQLiteUpstoxStorage": SQLiteOfVersion1,
    "PooledUpstoxStorage": PooledOfVersion1,
    "PostgreSQLUpstoxStorage": PostgreSQLOfVersion1,
    "HybridUpstoxStorage": HybridOfVersion1,
    "MongoUpstoxStorage": MongoUpstoxStorage,  # its version is a constant of its module
}


class Account1:
    """A login for the account with which version 1 logged in. It counts its logins."""

    account = ACCOUNT

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    def __call__(self, user_id: str | None) -> Any:
        self.asked.append(user_id)
        return made_up_login(user_id)


def restore(address: Address) -> None:
    """Restore what version 1 wrote, with the bare driver."""
    name = address.kind.partition(":")[2]
    if name == "MongoUpstoxStorage":
        restore_version_1(MongoDatabase(*address.arguments))
    elif name in ("PostgreSQLUpstoxStorage", "HybridUpstoxStorage"):
        bare(address.arguments[-1], (VERSION_1 / "postgresql.sql").read_text())
    else:
        shutil.copy(VERSION_1 / "sqlite.db", address.arguments[0])


def never(_: str | None) -> Any:
    raise AssertionError("a login was begun")


def token_of(store: TokenStorage, user_id: str) -> str | None:
    read = store.get_valid_token(user_id)
    return read["token"] if read else None


def ciphertexts(store: TokenStorage) -> dict[str | None, list[str]]:
    """Return the versions of each user's remaining ciphertexts."""
    return {
        user_id: [
            token.ciphertext.partition(".")[0] for token in store.backend.read_tokens(user_id) if token.ciphertext
        ]
        for user_id in store.backend.list_users()
    }


def assert_as_it_was(store: TokenStorage) -> None:
    """Check that the store reports everything as version 1 did. Read no token, because a read counts as a use."""
    for user_id in TOKENS | STATISTICS:
        assert tuple(store.get_user_statistics(user_id).values()) == STATISTICS[user_id], user_id
        history = store.get_token_history(user_id)
        names = ("created_at", "expires_at", "is_active", "usage_count", "last_used_at")
        assert [tuple(token[name] for name in names) for token in history] == HISTORY[user_id], user_id
        whose = {(token["user_name"], token["email"], token["broker"]) for token in history}
        assert whose == {("A Trader", "trader@example.com", "UPSTOX")}
        audit = store.get_audit_trail(user_id)
        shown = [(entry["action"], entry["performed_at"], entry["token_created"]) for entry in audit]
        assert shown == AUDIT[user_id], user_id
        assert {(entry["actor"], entry["user_id"]) for entry in audit} == {("an earlier program", user_id)}
        reasons = [entry["metadata"] for entry in audit if entry["action"] == "deactivated"]
        assert reasons == [{"reason": "new_token_generated"}] * (user_id == USER)
    (nobodys,) = store.backend.read_entries(None, None, 10)
    assert (nobodys.action, nobodys.performed_at.isoformat(), nobodys.generation) == ("login", FIRST, None)
    for token in store.backend.read_tokens(USER):
        assert (token.account, token.products, token.exchanges) == (ACCOUNT, ["D"], ["NSE"])
        assert token.metadata == {"is_active_user": True, "generation_method": "upstox_totp_sdk"}
        assert (token.issued_at, token.in_doubt) == (None, False)


@pytest.mark.parametrize("each_address", OF_VERSION_1, indirect=True)
class TestADatabaseOfVersion1:
    @pytest.fixture(autouse=True)
    def _restored(self, each_address: Address, clock: Clock) -> None:
        restore(each_address)
        clock.set(6, 10)

    def test_everything_that_was_kept_reads_as_before(self, each_address: Address, opened: Opened) -> None:
        store = opened(each_address, login=never)
        assert_as_it_was(store)
        assert store.keys_in_use() == {KEY.key_ids[0]: 2}
        assert ciphertexts(store) == {None: [], USER: ["v1"], "CD5678": [], "ef9012": ["v1"]}

    def test_the_living_tokens_are_handed_out_without_a_login(self, each_address: Address, opened: Opened) -> None:
        store = opened(each_address, login=never)
        for user_id, token in TOKENS.items():
            assert token_of(store, user_id) == store.get_or_create_token(user_id)["token"] == token
            assert store.get_or_create_token(user_id)["user_id"] == user_id
        assert token_of(store, USER.lower()) == TOKENS[USER]
        assert token_of(store, "CD5678") is None

    def test_a_new_login_continues_the_generations(self, each_address: Address, opened: Opened) -> None:
        store = opened(each_address)
        for user_id, generations in ((USER, [1, 2, 3]), ("CD5678", [1, 2])):
            new = store.store_token(user_id)["token"]
            assert token_of(store, user_id) == new
            tokens = store.backend.read_tokens(user_id)
            assert [token.generation for token in tokens] == generations
            assert [token.ciphertext[:3] for token in tokens] == [""] * (len(tokens) - 1) + ["v2."]
        assert [entry["action"] for entry in store.get_audit_trail(USER) if entry["action"] != "used"][:3] == [
            "created",
            "deactivated",
            "login",
        ]
        assert token_of(store, "ef9012") == TOKENS["ef9012"], "that token was not replaced"

    def test_the_keys_are_rotated(self, each_address: Address, opened: Opened) -> None:
        new = KeyRing.new_key()
        assert opened(each_address, keys=KeyRing(new, OLD_KEY)).rotate_keys() == 2
        store = opened(each_address, keys=KeyRing(new), login=never)
        assert store.keys_in_use() == {KeyRing(new).key_ids[0]: 2}
        assert ciphertexts(store) == {None: [], USER: ["v1"], "CD5678": [], "ef9012": ["v1"]}
        assert {user_id: token_of(store, user_id) for user_id in TOKENS} == TOKENS

    def test_a_caller_that_names_nobody_gets_no_token_from_a_row_that_only_names_the_account(
        self, each_address: Address, opened: Opened
    ) -> None:
        """Version 1 bound no account to a ciphertext, so anybody may have written that name. New keys prove no more."""
        login, new_key = Account1(), KeyRing.new_key()
        opened(each_address, keys=KeyRing(new_key, OLD_KEY)).rotate_keys()
        store = opened(each_address, login=login, keys=KeyRing(new_key))
        new = store.get_or_create_token()
        assert (login.asked, new["user_id"]) == ([None], USER)
        assert new["token"] != TOKENS[USER]
        again = opened(each_address, login=login, keys=KeyRing(new_key))
        assert again.get_or_create_token()["token"] == new["token"]
        assert login.asked == [None], "the row of the new login proves whose account it is"

    def test_it_moves_to_a_store_of_any_kind(
        self, each_address: Address, another: Address, opened: Opened, sqlite: Address, tmp_path: Path
    ) -> None:
        store = opened(each_address, login=never)
        exported, migrated = opened(another, login=never), opened(sqlite, login=never)
        assert export_tokens(store, tmp_path / "now.export", progress=False)[:3] == (4, 4, 11)
        assert import_tokens(exported, tmp_path / "now.export", progress=False)[:5] == (4, 4, 11, 4, 11)
        assert migrate(store, migrated, progress=False)[:5] == (4, 4, 11, 4, 11)
        for there in (exported, migrated):
            assert_as_it_was(there)
            assert {user_id: token_of(there, user_id) for user_id in TOKENS} == TOKENS
        login = Account1()
        assert opened(another, login=login).get_or_create_token()["token"] not in TOKENS.values()
        assert login.asked == [None], "a moved row proves no more than it did before"

    def test_one_user_in_two_spellings_has_one_token(self, each_address: Address, opened: Opened) -> None:
        store = opened(each_address)
        new = store.store_token("EF9012")
        assert (new["user_id"], token_of(store, "ef9012")) == ("ef9012", new["token"]), "the earlier token is dead"
        assert [token.generation for token in store.backend.read_tokens("ef9012")] == [1, 2]
        assert store.backend.read_tokens("EF9012") == []

    def test_a_program_of_version_1_that_meets_the_new_schema_says_upgrade_it(
        self, each_address: Address, opened: Opened, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = each_address.kind.partition(":")[2]
        earlier = Address(f"{__name__}:{OF_VERSION_1[name].__name__}", each_address.arguments, each_address.options)
        store = opened(each_address, login=never)
        monkeypatch.setattr(mongodb_schema, "SCHEMA_VERSION", 1)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"schema version [23], but this package knows 1\. Upgrade"):
                earlier.open(login=never).get_or_create_token("CD5678")
        assert_as_it_was(store)


@pytest.mark.parametrize("each_address", OF_VERSION_1, indirect=True)
def test_the_earlier_programs_of_these_tests_open_what_version_1_wrote(
    each_address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the test above cannot pass for another reason."""
    restore(each_address)
    name = each_address.kind.partition(":")[2]
    monkeypatch.setattr(mongodb_schema, "SCHEMA_VERSION", 1)
    Address(f"{__name__}:{OF_VERSION_1[name].__name__}", each_address.arguments, each_address.options).open().close()


def test_an_export_of_version_1_is_imported(each_address: Address, opened: Opened, clock: Clock) -> None:
    clock.set(6, 10)
    store = opened(each_address)
    for new in (True, False):
        counts = import_tokens(store, VERSION_1 / "upstox.export", progress=False)
        assert tuple(counts) == (4, 4, 11, 4 * new, 11 * new)
    assert_as_it_was(store)
    assert {user_id: token_of(store, user_id) for user_id in TOKENS} == TOKENS
    assert ciphertexts(store)[USER] == ["v1"]
    new_one = store.store_token(USER)["token"]
    assert [token.generation for token in store.backend.read_tokens(USER)] == [1, 2, 3]
    assert token_of(store, USER) == new_one
