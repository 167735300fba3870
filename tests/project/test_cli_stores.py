"""`upstox-db` makes a store only when it may, on each kind of database."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ..support.command import USER, Run, good, in_json, without_variables
from ..support.databases import MongoDatabase
from ..support.postgresql import bare


def test_a_mistyped_store_is_refused_and_not_made(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ["status"],
        ["users"],
        ["history"],
        ["audit", USER],
        ["token", "--no-login"],
        ["doctor"],
        ["cleanup"],
        ["rotate-keys"],
        ["backup", "all.export"],
        ["migrate", "sqlite:///target.db"],
    ):
        for address in ("typo.db", "sqlite:///nowhere/typo.db"):
            done = run("--store", address, *arguments)
            assert done.returncode == 3, done
            told = done.stdout if arguments == ["doctor"] else done.stderr
            assert "typo.db does not exist. Check --store" in told
    assert list(tmp_path.iterdir()) == [tmp_path / "keys"]


def test_without_credentials_no_database_and_no_key_is_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").unlink()
    without_variables(monkeypatch, "PIN_CODE", "TOTP_SECRET")
    for arguments in (["token"], ["token", USER], ["login"], ["login", "--keep"], ["--one-call", "token"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("LoginRefused: ")
        assert list(tmp_path.iterdir()) == []


def test_without_credentials_no_table_is_left_on_a_server(
    run: Run, postgres_url: str, mongo: MongoDatabase, redis_server: str
) -> None:
    nothing = {"UPSTOX_PIN_CODE": "", "UPSTOX_TOTP_SECRET": ""}
    for store in (postgres_url, f"{mongo.url}#{mongo.name}", f"{redis_server} {postgres_url}"):
        for arguments in (["token"], ["token", USER], ["login"], ["login", "--keep", USER]):
            done = run(*arguments, UPSTOX_DB_STORE=store, **nothing)
            assert (done.returncode, done.stdout) == (3, "")
            assert done.stderr.startswith("LoginRefused: ")
    assert bare(postgres_url, "SELECT to_regclass('upstox_tokens') AS there") == [{"there": None}]
    with mongo.bare() as db:
        assert db.list_collection_names() == []
    token = good(run("token", UPSTOX_DB_STORE=postgres_url))
    assert good(run("token", USER, UPSTOX_DB_STORE=postgres_url, **nothing)) == token, "a stored one needs none"


def test_init_makes_the_tables_and_can_be_repeated(run: Run, postgres_url: str) -> None:
    for store, shown in (("new.db", "SQLiteUpstoxStorage"), (postgres_url, "PostgreSQLUpstoxStorage")):
        for _ in range(2):
            told = good(run("--store", store, "init"))
            assert shown in told
            assert told.endswith(" is up to date.\n")
    assert shown in in_json(run("--store", postgres_url, "init", "--json"))["store"]
    assert "healthy" in run("--store", "new.db", "status").stdout
    done = run("--store", "new.db", "init", "--runtime-role", "trader")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("InvalidInput: SQLite has no roles")
    done = run("--store", postgres_url, "init", "--runtime-role", "nobody_of_that_name")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith(" does not know that role. Create it first.\n")
    for store in ("new.db", postgres_url):
        done = run("--store", store, "init", "--runtime-role", "")
        assert (done.returncode, done.stdout) == (3, ""), "a variable that is not set must not look like a role"
    assert f":{urlsplit(postgres_url).password}@" not in told + done.stderr


def test_a_mistyped_option_of_postgresql_has_to_be_fixed_and_is_named(run: Run, postgres_url: str) -> None:
    for option, value in {
        "sslmode": "verify-ful",
        "target_session_attrs": "readwrite",
        "service": "no-such-service",
        "gssencmode": "s3cret-value",
        "keepalives": "s3cret-value",
        "replication": "s3cret-value",
        "ssl_min_protocol_version": "TLSv1.3&ssl_max_protocol_version=TLSv1.2",
        "require_auth": "none",
        "options": "-cno_such_setting%3D1",
    }.items():
        done = run("--store", f"{postgres_url}?{option}={value}", "status")
        assert (done.returncode, done.stdout) == (3, ""), done
        assert re.fullmatch(rf"ConfigurationError: .*\bthe option {option} .*\n", done.stderr)
        assert "s3cret" not in done.stderr
    standby = run("--store", f"{postgres_url}?target_session_attrs=standby", "status")
    assert (standby.returncode, standby.stdout) == (1, "")
    assert "target_session_attrs" in standby.stderr
    nobody = run("--store", "postgresql://user:password@127.0.0.1:1/db", "status")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.endswith("cannot be reached, or refused the connection. Try again later.\n")
