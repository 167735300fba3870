"""What every store promises about secrets: what is in the database, under which key, and what is shown."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from upstox_totp.models import AccessTokenData

from upstox_db_examples import (
    ConfigurationError,
    KeyRing,
    KeyUnavailable,
    Secret,
    StorageError,
    TokenRefused,
    TokenStorage,
)
from upstox_db_examples.core.cipher import Binding
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.clocks import Clock, ist
from ..support.processes import USER, token_data
from ..support.stores import OnAStore, OpenStore, living


class SecretContract(OnAStore):
    """A token is stored encrypted, only in its own place, and is never shown."""

    # What is in the database

    def test_the_row_holds_ciphertext_and_nothing_of_the_token(self, store: TokenStorage, keys: KeyRing) -> None:
        stored = store.store_token()
        (row,) = self.raw_rows()
        assert row["access_token"].startswith(f"v2.{keys.key_ids[0]}.")
        assert stored["token"][:20] not in json.dumps(row, default=str)

    def test_a_replaced_or_revoked_token_is_erased(self, store: TokenStorage) -> None:
        store.store_token()
        store.store_token()
        assert [row["access_token"] is None for row in self.raw_rows()] == [True, False]
        assert store.revoke_token(USER) is True
        assert [row["access_token"] is None for row in self.raw_rows()] == [True, True]
        assert store.get_valid_token(USER) is None
        assert store.revoke_token(USER) is False

    def test_a_ciphertext_in_another_users_row_is_refused(self, open_store: OpenStore) -> None:
        store = open_store(login=lambda user_id: token_data(user_id or USER))
        store.store_token("CD0001")
        store.store_token("CD0002")
        first, second = self.raw_rows()
        self.write_raw(second["id"], access_token=first["access_token"])
        with pytest.raises(TokenRefused):
            store.get_valid_token("CD0002")
        assert store.get_valid_token("CD0001")

    def test_a_missing_key_file_is_made_where_no_working_token_needs_it(
        self, store: TokenStorage, clock: Clock, tmp_path: Path
    ) -> None:
        stored, file = store.store_token()["token"], tmp_path / "keys"
        with self.connect(login=store.login, clock=clock) as other:
            for call in (other.get_or_create_token, other.rotate_keys):
                with pytest.raises(KeyUnavailable, match=re.escape(f"There is no key file {file}.")) as caught:
                    call()
                assert [caught.value.key_id] == list(store.keys_in_use())
            assert not file.exists()
            assert living(store)["token"] == stored, "no login was spent"
            clock.advance(days=1)
            other.get_or_create_token()
        assert file.exists()

    def test_a_lost_key_is_replaced_by_a_deliberate_login(
        self, store: TokenStorage, clock: Clock, tmp_path: Path
    ) -> None:
        store.store_token()
        with self.connect(login=store.login, clock=clock) as other:
            assert other.store_token()["token"] == living(other)["token"]
        assert (tmp_path / "keys").exists()

    def test_a_ciphertext_from_another_kind_of_store_is_refused(self, store: TokenStorage, keys: KeyRing) -> None:
        store.store_token()
        (row,) = self.raw_rows()
        here = Binding(USER, ist(7, 3, 30), 1, store.backend.store_kind, row["account"])
        assert keys.decrypt(row["access_token"], here)
        for kind in {"access token in SQLite", "access token in PostgreSQL", "access token in MongoDB"} - {here.kind}:
            elsewhere = keys.encrypt(Secret("eyJ0eXAi" * 9), here._replace(kind=kind))
            self.write_raw(row["id"], access_token=elsewhere)
            with pytest.raises(TokenRefused):
                store.get_valid_token(USER)

    def test_a_prolonged_token_is_refused(self, store: TokenStorage, clock: Clock) -> None:
        store.store_token()
        (row,) = self.raw_rows()
        self.write_raw(row["id"], expires_at=ist(9, 3, 30))
        clock.set(8, 10)
        with pytest.raises(TokenRefused):
            store.get_or_create_token(USER)

    def test_plaintext_where_ciphertext_is_due_is_refused(self, store: TokenStorage) -> None:
        stored = store.store_token()
        (row,) = self.raw_rows()
        self.write_raw(row["id"], access_token=stored["token"])
        with pytest.raises(TokenRefused) as caught:
            store.get_valid_token(USER)
        assert stored["token"][:20] not in str(caught.value)

    def test_a_lost_key_is_named_and_destroys_nothing(self, store: TokenStorage, open_store: OpenStore) -> None:
        stored = store.store_token()
        before = self.raw_rows()
        stranger = open_store(keys=KeyRing(KeyRing.new_key()))
        for reading in (stranger.get_valid_token, stranger.get_or_create_token):
            with pytest.raises(KeyUnavailable, match=before[0]["key_id"]):
                reading(USER)
        assert [row["access_token"] for row in self.raw_rows()] == [row["access_token"] for row in before]
        read = living(store)
        assert read["token"] == stored["token"]

    def test_a_key_that_cannot_be_had_costs_no_login(self, open_store: OpenStore, upstox: LocalUpstox) -> None:
        def vault() -> KeyRing:
            raise ConfigurationError("the vault is shut")

        with pytest.raises(ConfigurationError, match="the vault is shut"):
            open_store(keys=vault).store_token()
        assert upstox.attempts() == 0

    def test_history_statistics_and_audit_hold_no_token_and_need_no_key(
        self, counting: TokenStorage, open_store: OpenStore
    ) -> None:
        def no_key() -> KeyRing:
            raise AssertionError("a key was asked for")

        stored = counting.store_token()
        counting.get_valid_token(USER)
        keyless = open_store(keys=no_key)
        told = json.dumps(
            [keyless.get_token_history(USER), keyless.get_user_statistics(USER), keyless.get_audit_trail(USER)]
        )
        assert "v2." not in told
        assert all(stored["token"][at : at + 16] not in told for at in range(0, len(stored["token"]) - 16))

    def test_keys_are_rotated_and_the_old_one_can_go(self, open_store: OpenStore) -> None:
        old, new = KeyRing.new_key(), KeyRing.new_key()
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        before = open_store(login=login, keys=KeyRing(old))
        tokens = {user_id: before.store_token(user_id)["token"] for user_id in (f"CD{n:04}" for n in range(7))}
        rotating = open_store(keys=lambda: KeyRing(new, old))
        assert rotating.rotate_keys() == 7
        assert rotating.rotate_keys() == 0
        assert rotating.keys_in_use() == {KeyRing(new).key_ids[0]: 7}
        after = open_store(keys=KeyRing(new))
        for user_id, token in tokens.items():
            read = after.get_valid_token(user_id)
            assert read is not None
            assert read["token"] == token

    def test_a_program_that_runs_since_before_the_new_key_rotates_to_it(self, open_store: OpenStore) -> None:
        old, new = KeyRing.new_key(), KeyRing.new_key()
        vault = [old]

        def keys() -> KeyRing:
            return KeyRing(*vault)

        def login(user_id: str | None) -> AccessTokenData:
            return token_data(user_id or USER)

        running = open_store(keys=keys, login=login)
        running.store_token(USER)
        vault[:] = [new, old]
        open_store(keys=keys, login=login).store_token("CD5678")
        assert running.rotate_keys() == 1
        assert running.keys_in_use() == {KeyRing(new).key_ids[0]: 2}

    def test_a_token_that_cannot_be_read_does_not_stop_a_rotation(self, open_store: OpenStore) -> None:
        lost, old, new = (KeyRing.new_key() for _ in range(3))
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        open_store(login=login, keys=KeyRing(lost)).store_token("CD0001")
        for user_id in ("CD0000", "CD0002"):
            open_store(login=login, keys=KeyRing(old)).store_token(user_id)
        rotating = open_store(keys=KeyRing(new, old))
        with pytest.raises(KeyUnavailable, match=r"^Re-encrypted 2, but not the tokens of CD0001") as caught:
            rotating.rotate_keys()
        assert caught.value.key_id == KeyRing(lost).key_ids[0]
        assert rotating.keys_in_use() == {KeyRing(new).key_ids[0]: 2, KeyRing(lost).key_ids[0]: 1}
        assert rotating.revoke_token("CD0001")
        assert rotating.rotate_keys() == 0

    def test_tokens_that_cannot_be_read_do_not_stop_those_behind_them(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("upstox_db_examples.core.store.ROWS_AT_ONCE", 2)
        lost, old, new = (KeyRing.new_key() for _ in range(3))
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        for number in range(8):
            open_store(login=login, keys=KeyRing(old if number in (4, 7) else lost)).store_token(f"CD000{number}")
        rotating = open_store(keys=KeyRing(new, old))
        with pytest.raises(KeyUnavailable, match=r"^Re-encrypted 2, but not the tokens of CD0000, .*CD0006\."):
            rotating.rotate_keys()
        assert rotating.keys_in_use() == {KeyRing(new).key_ids[0]: 2, KeyRing(lost).key_ids[0]: 6}

    def test_a_ring_that_changes_meanwhile_does_not_keep_a_rotation_going(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("upstox_db_examples.core.store.ROWS_AT_ONCE", 1)
        old, new = KeyRing.new_key(), KeyRing.new_key()
        vault, asked = [old], 0

        def keys() -> KeyRing:
            nonlocal asked
            asked += 1
            return KeyRing(*vault)

        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        running = open_store(keys=keys, login=login)
        for number in range(3):
            running.store_token(f"CD000{number}")
        vault[:] = [new, old]
        inner, calls = running.backend.replace_ciphertexts, 0

        def replace(pairs: Any) -> int:
            nonlocal calls
            calls += 1
            assert calls < 10, "it goes on for ever"
            vault[:] = [old, new] if calls % 2 else [new, old]
            running.cipher.reload()
            return inner(pairs)

        running.backend.replace_ciphertexts = replace  # type: ignore[method-assign]
        before = asked
        assert running.rotate_keys() == 3
        assert asked == before + 1, "one ring for one pass"
        assert running.keys_in_use() == {KeyRing(new).key_ids[0]: 3}

    def test_a_key_id_is_the_ciphertexts_own_while_keys_change(self, open_store: OpenStore) -> None:
        class Changes(KeyRing):
            """Another thread loads other keys just after this ring has encrypted."""

            def encrypt(self, *arguments: Any) -> str:
                ciphertext = super().encrypt(*arguments)
                rings.reverse()
                store.cipher.reload()
                return ciphertext

        rings = [Changes(KeyRing.new_key()), Changes(KeyRing.new_key())]
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        store = open_store(keys=lambda: rings[0], login=login)
        store.store_token(USER)
        (row,) = self.raw_rows()
        assert row["key_id"] == row["access_token"].split(".")[1]

    def test_a_program_that_runs_for_long_learns_of_a_new_key(self, open_store: OpenStore) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        vault = [KeyRing.new_key()]
        long_running = open_store(login=login, keys=lambda: KeyRing(*vault))
        long_running.store_token(USER)
        vault.insert(0, KeyRing.new_key())
        assert open_store(keys=KeyRing(*vault)).rotate_keys() == 1
        assert living(long_running)

    # What is shown

    def test_nothing_that_is_printed_or_logged_shows_a_secret(
        self, store: TokenStorage, account: Account, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        logging.getLogger("upstox-totp").setLevel(logging.DEBUG)
        try:
            result = store.store_token()
            read = store.get_valid_token(USER)
        finally:
            logging.getLogger("upstox-totp").setLevel(logging.INFO)
        text = f"{caplog.text} {result} {read!r} {store!r} {vars(store)!r}"
        assert caplog.text, "the store logs its own events"
        for secret in (result["token"], account.totp_secret, account.client_secret):
            assert secret[:20] not in text
        # The same six digits may also appear inside a random number.
        assert not re.search(rf"(?<![0-9A-Za-z]){account.pin}(?![0-9A-Za-z])", text)

    def test_a_closed_store_says_so_and_closes_twice(self, store: TokenStorage) -> None:
        store.close()
        store.close()
        with pytest.raises(StorageError, match="closed"):
            store.get_valid_token(USER)

    def test_it_is_a_context_manager(self, open_store: OpenStore) -> None:
        with open_store() as store:
            store.store_token()
        with pytest.raises(StorageError, match="closed"):
            store.store_token()
