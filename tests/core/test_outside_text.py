"""What environment variables, connection strings and secret files hold: harmless things are cleaned, others refused."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import parse_dsn
from pymongo.uri_parser import parse_uri

from upstox_db_examples import (
    Accounts,
    ConfigurationError,
    HybridUpstoxStorage,
    InvalidInput,
    KeyRing,
    LoginRefused,
    MongoUpstoxStorage,
    PooledUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SdkLogin,
    Secret,
    SQLiteUpstoxStorage,
    StorageError,
    open_store,
)
from upstox_db_examples.core.addresses import read_url
from upstox_db_examples.core.environment import clean, expand_home, read_variable
from upstox_db_examples.core.errors import StoreUnavailable
from upstox_db_examples.hybrid.client import client_of
from upstox_db_examples.local.upstox import LocalUpstox
from upstox_db_examples.postgresql.dsn import read_dsn
from upstox_db_examples.token_file import write_token_file

from ..support.leaks import shown_with_locals

SECRET = "s3cret"  # a part of each password
OTHER = "Word99"
EXAMPLE = "scheme://user:password@host"
RAW_PASSWORDS = [f"{SECRET}{raw}{OTHER}" for raw in ("@", "[", "]", "%", "?", "#", ":", "%zz", "@@", "\N{EURO SIGN}")]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def reveals_nothing(error: BaseException) -> None:
    shown = shown_with_locals(error)
    assert SECRET not in shown
    assert OTHER not in shown
    assert error.__cause__ is None


class TestAVariable:
    @pytest.mark.parametrize(
        "text",
        ["AB1234", '"AB1234"', "'AB1234'", "AB1234\r", " AB1234\t", "\ufeffAB1234", "AB1234\u00a0", '"AB1234"\r\n'],
    )
    def test_is_cleaned_of_what_env_files_leave(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("UPSTOX_USER_ID", text)
        assert read_variable("UPSTOX_USER_ID") == "AB1234"
        assert SdkLogin().user_id == "AB1234"

    def test_keeps_what_may_be_meant(self) -> None:
        for text in ("it's", '"', "a b", "'a\"", "\N{DEVANAGARI LETTER KA}"):
            assert clean(text) == text

    @pytest.mark.parametrize("text", ["AB1234\nCD5678", "AB\x1b1234", '"AB1234', "AB 1234", "\udcff"])
    def test_that_is_no_user_id_is_refused_without_a_request(
        self, monkeypatch: pytest.MonkeyPatch, upstox: LocalUpstox, tmp_path: Path, text: str
    ) -> None:
        login = SdkLogin(upstox.add_account("AB1234").credentials(), base_domain=upstox.base_domain)
        monkeypatch.setenv("UPSTOX_USER_ID", text)
        with SQLiteUpstoxStorage(tmp_path / "a.db", login=login) as store:
            with pytest.raises(LoginRefused, match="UPSTOX_USER_ID is not a user id") as caught:
                store.store_token()
            with pytest.raises(LoginRefused, match="UPSTOX_USER_ID is not a user id"):
                store.store_token("AB1234")
        assert text not in str(caught.value)
        assert upstox.attempts() == 0

    def test_that_names_the_key_file_makes_no_second_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        ring = KeyRing.from_file(tmp_path / "keys")
        for text in (f'"{tmp_path}/keys"', f"{tmp_path}/keys\r", f" {tmp_path}/keys ", "~/keys"):
            monkeypatch.setenv("UPSTOX_DB_KEY_FILE", text)
            monkeypatch.setenv("HOME", str(tmp_path))
            assert KeyRing.default().key_ids == ring.key_ids
        assert names_in(tmp_path) == ["keys"]

    def test_with_a_line_break_inside_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("UPSTOX_DB_KEY_FILE", f"{tmp_path}/{SECRET}\n{OTHER}")
        with pytest.raises(ConfigurationError, match="UPSTOX_DB_KEY_FILE") as caught:
            KeyRing.default()
        reveals_nothing(caught.value)

    def test_of_keys_may_have_quotes_and_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = KeyRing.new_key(), KeyRing.new_key()
        words = [base64.b64encode(key).decode() for key in keys]
        for text in (f'"{words[0]},{words[1]}"', f"{words[0]}\r\n{words[1]}\r\n"):
            monkeypatch.setenv("UPSTOX_DB_KEYS", text)
            assert KeyRing.default().key_ids == KeyRing(*keys).key_ids


class TestAPath:
    def test_may_begin_with_the_home_folder_everywhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        ring = KeyRing.from_file("~/keys")
        with SQLiteUpstoxStorage("~/a.db", keys=ring) as store:
            assert store.db_path == tmp_path / "a.db"
            store.backup("~/copy.db")
        open_store("sqlite:///~/b.db", keys=ring).close()
        PooledUpstoxStorage("~/c.db", keys=ring).close()
        assert {"keys", "a.db", "b.db", "c.db", "copy.db"} <= set(names_in(tmp_path))

    @pytest.mark.parametrize("home", ["", "relative"])
    def test_without_a_home_folder_is_a_clear_error(self, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
        monkeypatch.setenv("HOME", home)
        monkeypatch.delenv("UPSTOX_DB_KEY_FILE", raising=False)
        with pytest.raises(ConfigurationError, match="no home folder"):
            KeyRing.default()
        for opens in (SQLiteUpstoxStorage, KeyRing.from_file, Accounts.from_file):
            with pytest.raises(ConfigurationError, match="no home folder"):
                opens("~/file")

    def test_of_a_token_that_must_be_kept_needs_no_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "")
        monkeypatch.delenv("UPSTOX_DB_KEY_FILE", raising=False)
        file = write_token_file(Secret("eyJ" * 20), "AB1234", KeyRing(KeyRing.new_key()))
        assert file.exists()
        file.unlink()

    def test_of_an_unknown_user_is_a_files_name(self) -> None:
        assert expand_home("~no-such-user.db") == Path("~no-such-user.db")

    @pytest.mark.parametrize("path", ["", "a\0b", None, 5, b"a"])
    def test_that_is_none_is_refused(self, path: Any) -> None:
        with pytest.raises(InvalidInput):
            expand_home(path)


class TestASecretFile:
    """The key file and the accounts file have one reader."""

    @pytest.fixture(params=[KeyRing.from_file, Accounts.from_file])
    def read(self, request: pytest.FixtureRequest) -> Callable[[Path], object]:
        chosen: Callable[[Path], object] = request.param
        return chosen

    @pytest.mark.parametrize(
        "content",
        [
            bytes(range(224, 256)),
            f"[AB1234]\nx = '{SECRET}{OTHER}'".encode("utf-16"),
            f"{SECRET}\0{OTHER}".encode(),
            f"{SECRET}\N{EURO SIGN}{OTHER}".encode("cp1252"),
            f"x = {'[' * 5000}{SECRET}{OTHER}".encode(),
            f"{SECRET}{OTHER}".encode() * 200_000,
            b"",
        ],
        ids=["raw", "utf-16", "nul", "cp1252", "deep", "large", "empty"],
    )
    def test_that_cannot_be_right_is_refused_and_not_shown(
        self, read: Callable[[Path], object], tmp_path: Path, content: bytes
    ) -> None:
        file = tmp_path / "file"
        file.write_bytes(content)
        file.chmod(0o600)
        with pytest.raises((ConfigurationError, LoginRefused)) as caught:
            read(file)
        reveals_nothing(caught.value)
        assert repr(content)[2:40] not in shown_with_locals(caught.value) or not content

    def test_may_begin_with_a_byte_order_mark(self, tmp_path: Path, upstox: LocalUpstox) -> None:
        key = KeyRing.new_key()
        lines = [f'{name} = "{value}"' for name, value in upstox.add_account("AB1234").credentials().items()]
        for name, text in (("keys", f'"{base64.b64encode(key).decode()}"'), ("toml", "\n".join(["[AB1234]", *lines]))):
            (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
            (tmp_path / name).chmod(0o600)
        assert KeyRing.from_file(tmp_path / "keys").key_ids == KeyRing(key).key_ids
        assert Accounts.from_file(tmp_path / "toml").user_ids == ["AB1234"]

    def test_that_nobody_writes_to_does_not_block(self, read: Callable[[Path], object], tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo", 0o600)
        began = time.monotonic()
        with pytest.raises((ConfigurationError, LoginRefused)):
            read(tmp_path / "fifo")
        assert time.monotonic() - began < 5

    def test_of_another_kind_is_refused(self, read: Callable[[Path], object]) -> None:
        with pytest.raises(ConfigurationError, match="not an ordinary file"):
            read(Path("/dev/zero"))

    def test_of_another_user_is_not_believed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "keys"
        KeyRing.from_file(file)
        if os.geteuid() == 0:  # Root's own files are believed.
            os.chown(file, 12345, 12345)
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        with pytest.raises(ConfigurationError, match="belongs to another user"):
            KeyRing.from_file(file)


class TestCredentials:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("redirect_uri", f"https://[{SECRET}"),
            ("redirect_uri", f"https://host:{SECRET}/{OTHER}"),
            ("redirect_uri", f"http:{SECRET}"),
            ("redirect_uri", f"https://host/{SECRET} {OTHER}"),
            ("client_secret", f"{SECRET}\r\n{OTHER}"),
            ("client_id", f"{SECRET}\u00a0{OTHER}"),
            ("password", f"{SECRET}\udcff{OTHER}"),
            ("totp_secret", f"ABCDEFGHIJKLMNOP\u00a0{SECRET}"),
        ],
    )
    def test_that_are_odd_are_refused_without_a_request(
        self, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch, field: str, value: str
    ) -> None:
        account = upstox.add_account("AB1234")
        for name, right in {**account.credentials(), field: value}.items():
            monkeypatch.setenv(f"UPSTOX_{name.upper()}", right)
        for credentials in ({**account.credentials(), field: value}, None):
            with pytest.raises(LoginRefused, match=field) as caught:
                SdkLogin(credentials, base_domain=upstox.base_domain)()
            reveals_nothing(caught.value)
        assert upstox.attempts() == 0

    def test_may_have_what_env_files_leave_around_them(
        self, upstox: LocalUpstox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in upstox.add_account("AB1234").environ().items():
            monkeypatch.setenv(name, f'"{value}"\r')
        monkeypatch.setenv("UPSTOX_BASE_DOMAIN", f"'{upstox.base_domain}'\r")
        assert SdkLogin()().user_id == "AB1234"

    @pytest.mark.parametrize("name", [" AB1234", "", "AB 1234", 5])
    def test_of_an_account_without_a_user_id_are_refused(self, name: Any) -> None:
        with pytest.raises(LoginRefused, match="must have a user id"):
            Accounts({name: {"username": "x"}})


class TestAnAddress:
    @pytest.mark.parametrize("password", RAW_PASSWORDS)
    def test_with_a_raw_password_is_escaped_where_its_end_is_clear(self, password: str) -> None:
        rest = f"app:{password}@127.0.0.1:5"
        dsn = read_url(f"postgresql://{rest}/name", ("postgresql",), "PostgreSQL", EXAMPLE).reveal()
        assert parse_dsn(dsn)["password"] == password
        assert parse_dsn(dsn)["host"] == "127.0.0.1"
        url = read_url(f"mongodb://{rest}/", ("mongodb",), "MongoDB", EXAMPLE).reveal()
        assert parse_uri(url)["password"] == password
        client, _ = client_of(f"redis://{rest}/0", 0.1)
        assert client is not None
        assert client.connection_pool.connection_kwargs["password"] == password  # type: ignore[union-attr]

    def test_that_is_escaped_stays_as_it_is(self) -> None:
        for url in (
            "postgresql://app:p%40%2F%25@h1:1,h2:2/name?sslmode=require",
            "postgresql://%2Fvar%2Frun/name",
            "postgresql://app@[::1]:5/name",
            "postgresql:///name",
            "postgresql://",
        ):
            assert read_url(Secret(url), ("postgresql",), "PostgreSQL", EXAMPLE).reveal() == url
        assert read_url('"mongodb://h/?w=1"\r', ("mongodb",), "MongoDB", EXAMPLE).reveal() == "mongodb://h/?w=1"

    @pytest.mark.parametrize(
        "rest",
        [
            f"app:{SECRET}/{OTHER}@127.0.0.1:1/name",
            f"app:12345/{OTHER}@127.0.0.1:1/name",
            f"app:{SECRET}@{OTHER}/{SECRET}@127.0.0.1:1/name",
            f"app:{SECRET}",
            f"app:{SECRET}@[{OTHER}:1/name",
            f"app:{SECRET}@127.0.0.1:{OTHER}/name",
            f"app:{SECRET} {OTHER}@127.0.0.1:1/name",
            f"app:{SECRET}\n{OTHER}@127.0.0.1:1/name",
        ],
    )
    def test_whose_password_has_no_clear_end_is_refused_and_not_shown(self, rest: str) -> None:
        good = "postgresql://app:pw@127.0.0.1:1/name"
        calls: list[Callable[[], object]] = [
            lambda: PostgreSQLUpstoxStorage(f"postgresql://{rest}", timeout=0.2),
            lambda: MongoUpstoxStorage(f"mongodb://{rest}", timeout=0.2),
            lambda: MongoUpstoxStorage(f"mongodb+srv://{rest}", timeout=0.2),
            lambda: HybridUpstoxStorage(f"redis://{rest}", good, timeout=0.2),
            lambda: HybridUpstoxStorage("redis://127.0.0.1:1", f"postgresql://{rest}", timeout=0.2),
            lambda: open_store(f"postgresql://{rest}"),
            lambda: open_store(f"mongodb://{rest}#name"),
            lambda: open_store(f"redis://{rest} {good}"),
            lambda: open_store(f"redis://127.0.0.1:1 postgresql://{rest}"),
        ]
        for call in calls:
            with pytest.raises(StorageError) as caught:
                call()
            assert not isinstance(caught.value, StoreUnavailable), caught.value
            reveals_nothing(caught.value)

    @pytest.mark.parametrize(
        "dsn",
        [
            "host=a,b port=1,2,3",
            "host=a,b hostaddr=127.0.0.1",
            "host=a port=1,2",
            f"host=h password={SECRET} {OTHER}",
            f"dbname=postgresql://app:{SECRET}@{OTHER}",
            f"host=app:{SECRET}@{OTHER}",
            f"host=h port={SECRET}",
            f"mysql://app:{SECRET}@{OTHER}",
            "",
            None,
            5,
        ],
    )
    def test_that_libpq_cannot_use_is_refused(self, dsn: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            PostgreSQLUpstoxStorage(dsn)
        reveals_nothing(caught.value)

    def test_with_several_hosts_may_have_one_port(self) -> None:
        _, where, each = read_dsn(Secret("host=a,b,/run port=5 user='x y'"))
        assert [parse_dsn(dsn.reveal())["host"] for dsn in each] == ["a", "b", "/run"]
        assert where == "a,b,/run:5/"

    @pytest.mark.parametrize(
        "name",
        [
            f"host=h user=app password={SECRET} dbname={OTHER}",
            f"postgresql:app:{SECRET}@{OTHER}",
            f"app:{SECRET}@{OTHER}/name",
            f"app:{SECRET}@{OTHER}://x",
            f"mysql://app:{SECRET}@{OTHER}",
            f"sqlite://{SECRET}{OTHER}.db",
            f"{SECRET}{OTHER}.db?mode=ro",
            f"sqlite:///{SECRET}{OTHER}.db?mode=ro",
            f"pooled:///app:{SECRET}@{OTHER}",
            f"{SECRET}\n{OTHER}.db",
        ],
    )
    def test_that_is_no_file_makes_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("UPSTOX_DB_KEY_FILE", str(tmp_path / "keys"))
        for call in (open_store, SQLiteUpstoxStorage, PooledUpstoxStorage):
            with pytest.raises((InvalidInput, ConfigurationError)) as caught:
                call(name)
            reveals_nothing(caught.value)
        assert names_in(tmp_path) == []

    def test_of_a_file_is_cleaned(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for address in ('"a.db"', "a.db\r", " a.db", "'sqlite:///a.db'\r"):
            open_store(address, keys=KeyRing(KeyRing.new_key())).close()
        assert {name for name in names_in(tmp_path) if not name.endswith(("-wal", "-shm", "-locks"))} == {"a.db"}

    def test_of_a_file_that_an_earlier_version_made_still_opens(self, tmp_path: Path) -> None:
        (tmp_path / "a?b.db").touch()
        SQLiteUpstoxStorage(tmp_path / "a?b.db", keys=KeyRing(KeyRing.new_key())).close()
