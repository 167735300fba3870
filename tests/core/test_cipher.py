"""Encryption at rest: what is refused, and where the key comes from."""

from __future__ import annotations

import base64
import multiprocessing
import pickle
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upstox_db_examples import ConfigurationError, KeyRing, KeyUnavailable, Secret, TokenRefused
from upstox_db_examples.core.cipher import Binding

from ..support.leaks import shown_with_locals

TOKEN = Secret("eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9." + "x" * 80)
HERE = Binding("AB1234", datetime(2026, 1, 6, 22, 0, tzinfo=UTC), generation=3, kind="access token in SQLite")
RING = KeyRing(KeyRing.new_key())
CIPHERTEXT = RING.encrypt(TOKEN, HERE)


def test_what_was_encrypted_can_be_read_again() -> None:
    assert RING.decrypt(CIPHERTEXT, HERE).reveal() == TOKEN.reveal()


def test_the_text_names_its_key_and_never_comes_twice() -> None:
    assert CIPHERTEXT.startswith(f"v2.{RING.key_ids[0]}.")
    assert RING.encrypt(TOKEN, HERE) != CIPHERTEXT


@pytest.mark.parametrize(
    "elsewhere",
    [
        HERE._replace(user_id="AB1235"),
        HERE._replace(user_id="AB12345"),
        HERE._replace(expires_at=HERE.expires_at + timedelta(seconds=1)),
        HERE._replace(expires_at=HERE.expires_at - timedelta(days=1)),
        HERE._replace(generation=4),
        HERE._replace(kind="access token in PostgreSQL"),
        HERE._replace(kind="extended token in SQLite"),
    ],
)
def test_a_ciphertext_in_another_place_is_refused(elsewhere: Binding) -> None:
    with pytest.raises(TokenRefused):
        RING.decrypt(CIPHERTEXT, elsewhere)


@given(st.integers(0, len(CIPHERTEXT) - 1), st.characters(codec="utf-8"))
def test_a_changed_character_is_refused(position: int, character: str) -> None:
    changed = CIPHERTEXT[:position] + character + CIPHERTEXT[position + 1 :]
    if changed != CIPHERTEXT:
        with pytest.raises((TokenRefused, KeyUnavailable)):
            RING.decrypt(changed, HERE)


@given(st.integers(0, len(CIPHERTEXT)), st.sampled_from("A=\n .-_+/é\0"))
def test_an_inserted_character_is_refused(position: int, character: str) -> None:
    with pytest.raises((TokenRefused, KeyUnavailable)):
        RING.decrypt(CIPHERTEXT[:position] + character + CIPHERTEXT[position:], HERE)


@given(st.integers(0, len(CIPHERTEXT) - 1))
def test_a_cut_off_text_is_refused(length: int) -> None:
    with pytest.raises((TokenRefused, KeyUnavailable)):
        RING.decrypt(CIPHERTEXT[:length], HERE)


def test_plaintext_is_refused() -> None:
    for plain in (TOKEN.reveal(), "", "v1", "v1.", f"v1.{RING.key_ids[0]}.", f"v1.{RING.key_ids[0]}.AAAA"):
        with pytest.raises(TokenRefused):
            RING.decrypt(plain, HERE)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(KeyUnavailable, match=RING.key_ids[0]) as caught:
        KeyRing(KeyRing.new_key()).decrypt(CIPHERTEXT, HERE)
    assert caught.value.key_id == RING.key_ids[0]


def test_the_first_key_encrypts_and_all_of_them_decrypt() -> None:
    old, new = KeyRing.new_key(), KeyRing.new_key()
    under_old = KeyRing(old).encrypt(TOKEN, HERE)
    both = KeyRing(new, old)
    assert both.decrypt(under_old, HERE).reveal() == TOKEN.reveal()
    assert both.encrypt(TOKEN, HERE).startswith(f"v2.{KeyRing(new).key_ids[0]}.")


@pytest.mark.parametrize("bad", [b"", b"short", b"x" * 31, b"x" * 33, "x" * 32, None])
def test_a_key_of_the_wrong_length_is_refused(bad: bytes) -> None:
    with pytest.raises(ConfigurationError, match="32 random bytes"):
        KeyRing(bad)


def test_a_key_ring_shows_ids_and_no_keys() -> None:
    key = KeyRing.new_key()
    assert repr(KeyRing(key)) == f"KeyRing({KeyRing(key).key_ids[0]})"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(KeyRing(key))


class TestKeysFromTheEnvironment:
    def test_are_taken_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        new, old = KeyRing.new_key(), KeyRing.new_key()
        text = f"{base64.b64encode(new).decode()},{base64.urlsafe_b64encode(old).decode()}"
        monkeypatch.setenv("UPSTOX_DB_KEYS", text)
        assert KeyRing.default().key_ids == KeyRing(new, old).key_ids

    @pytest.mark.parametrize("text", ["my passphrase", ",", "AAAA", base64.b64encode(b"x" * 31).decode(), "\N{BAT}"])
    def test_that_are_no_keys_are_refused_and_not_shown(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("UPSTOX_DB_KEYS", text)
        with pytest.raises(ConfigurationError, match="UPSTOX_DB_KEYS holds no usable keys") as caught:
            KeyRing.default()
        assert repr(text) not in shown_with_locals(caught.value)


class TestTheKeyFile:
    def test_is_made_on_first_use_for_its_owner_alone(self, tmp_path: Path) -> None:
        made = KeyRing.from_file(tmp_path / "config" / "keys")
        assert stat.S_IMODE((tmp_path / "config" / "keys").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "config").stat().st_mode) == 0o700
        assert KeyRing.from_file(tmp_path / "config" / "keys").key_ids == made.key_ids
        assert [path.name for path in (tmp_path / "config").iterdir()] == ["keys"]

    def test_is_where_the_variable_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("UPSTOX_DB_KEY_FILE", str(tmp_path / "here"))
        assert KeyRing.default().key_ids == KeyRing.from_file(tmp_path / "here").key_ids

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
    def test_that_others_can_read_is_refused(self, tmp_path: Path, mode: int) -> None:
        KeyRing.from_file(tmp_path / "keys")
        (tmp_path / "keys").chmod(mode)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            KeyRing.from_file(tmp_path / "keys")

    def test_that_is_a_folder_or_out_of_reach_is_a_clear_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file" / "keys"):
            with pytest.raises(ConfigurationError, match="could not be read or made"):
                KeyRing.from_file(path)

    def test_holds_one_key_also_when_many_processes_make_it_at_once(self, tmp_path: Path) -> None:
        with multiprocessing.get_context("forkserver").Pool(8) as pool:
            for attempt in range(20):
                path = str(tmp_path / f"keys-{attempt}")
                ids = pool.map(key_ids_of, [path] * 8, chunksize=1)
                assert len(set(map(tuple, ids))) == 1
                assert ids[0] == KeyRing.from_file(path).key_ids


def key_ids_of(path: str) -> list[str]:
    return KeyRing.from_file(path).key_ids
