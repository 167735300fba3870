"""`upstox-db doctor` names what has to be fixed, spends no login and makes nothing."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from time import time
from typing import Any

import pytest

from upstox_db_examples.cli_doctor import FIX, NOTE, OK, Finding
from upstox_db_examples.cli_doctor_stores import read_address, tls
from upstox_db_examples.core.token import Secret
from upstox_db_examples.local.servers import RedisServer
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..support.command import USER, Run, good
from ..support.databases import MongoDatabase
from ..support.poolers import SmallPooler
from ..support.postgresql import as_role, bare


def look(run: Run, *arguments: str, code: int = 0, **environment: str) -> list[tuple[str, str, str]]:
    """Run the doctor, check its exit code, and return the findings: what, verdict, text."""
    done = run("doctor", *arguments, **environment)
    assert done.returncode == code, done  # What the store warns of, such as a file that others can read, is on stderr.
    found = []
    for line in done.stdout.splitlines():
        verdict, _, rest = line.partition("  ")
        what, _, text = rest.strip().partition("  ")
        found.append((what, verdict, text.strip()))
    return found


def verdicts(found: list[tuple[str, str, str]], verdict: str) -> dict[str, str]:
    return {what: text for what, its, text in found if its == verdict}


def test_where_all_is_well_it_says_so_and_changes_nothing(run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
    good(run("login"))
    before = (tmp_path / "upstox.db").stat().st_mtime, upstox.attempts()
    found = look(run)
    assert {what for what, _, _ in found} == {
        "versions", "variables", "TOTP", "keys", "clock", "sqlite", "writable", "roles",
    }  # fmt: skip
    assert list(verdicts(found, NOTE)) == ["variables"], "logins go to the local Upstox"
    assert verdicts(found, OK)["TOTP"].startswith("The secret has 160 bits. The present code is ")
    assert (before[1], upstox.logins()) == (upstox.attempts(), 1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keys", "upstox.db", "upstox.db-locks"]


def test_before_the_first_login_it_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "keys").unlink()
    found = look(run, code=3)
    assert "If it is new, run: upstox-db init" in verdicts(found, FIX)["store"]
    assert "does not exist. The first login makes it" in verdicts(found, NOTE)["keys"]
    assert list(tmp_path.iterdir()) == []
    good(run("init"))
    look(run)
    assert not (tmp_path / "keys").exists()


def test_each_thing_that_has_to_be_fixed_is_named(run: Run, account: Account, tmp_path: Path) -> None:
    good(run("login"))
    for environment, what, words in (
        ({"UPSTOX_PIN_CODE": ""}, "variables", "UPSTOX_PIN_CODE (pin_code) not set"),
        ({"UPSTOX_TOTP_SECRET": "JBSWY3DP"}, "TOTP", "totp_secret is cut off: it has 40 bits"),
        ({"UPSTOX_USER_ID": "a b"}, "variables", "UPSTOX_USER_ID is not a user id"),
        ({"UPSTOX_BASE_DOMAIN": "http://example.com/{stage}"}, "variables", "UPSTOX_BASE_DOMAIN must be https"),
        ({"UPSTOX_DB_KEYS": "nonsense"}, "keys", "UPSTOX_DB_KEYS holds no usable keys"),
        ({"UPSTOX_DB_KEY_FILE": "a" * 300}, "keys", "cannot be read: File name too long"),
        ({"UPSTOX_DB_KEY_FILE": str(tmp_path / "other")}, "keys", "The store has tokens under k"),
        ({"UPSTOX_DB_STORE": "oracle://scott:tiger@host/db"}, "store", "neither the path of a file nor the address"),
    ):
        found = look(run, code=3, **environment)
        assert words in verdicts(found, FIX)[what]
        for secret in (account.pin, account.totp_secret, account.client_secret, "tiger", "nonsense"):
            assert all(secret not in text for _, _, text in found)
    (tmp_path / "keys").chmod(0o644)
    (tmp_path / "upstox.db").chmod(0o604)
    wrong = verdicts(look(run, code=3), FIX)
    assert f"Run: chmod 600 {tmp_path}/keys" in wrong["keys"]
    assert f"(mode 0604). Run: chmod 600 {tmp_path}/upstox.db" in wrong["roles"]
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "upstox.db").chmod(0o600)
    found = look(run, UPSTOX_PINCODE="123456")
    assert any(text == "Nothing here reads UPSTOX_PINCODE. Is the name right?" for _, _, text in found)


def test_a_wrong_base_domain_is_named_once(run: Run) -> None:
    good(run("init"))
    found = look(run, code=3, UPSTOX_BASE_DOMAIN="http://example.com/{stage}")
    assert [what for what, verdict, text in found if "must be https" in text] == ["variables"], found
    assert verdicts(found, NOTE)["clock"] == "Not compared with Upstox's, because UPSTOX_BASE_DOMAIN is wrong."


@contextmanager
def upstox_with_clock(ahead: float) -> Iterator[str]:
    """Run a server whose Date header is this many seconds ahead of this machine's clock."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(401)
            self.send_header("Date", formatdate(time() + ahead, usegmt=True))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{{stage}}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("ahead", "verdict", "words"), [(100, FIX, "s behind"), (-100, FIX, "ahead of"), (8, NOTE, "")]
)
def test_a_wrong_clock_is_noticed(run: Run, ahead: float, verdict: str, words: str) -> None:
    good(run("init"))
    with upstox_with_clock(ahead) as base_domain:
        found = look(run, code=3 if verdict == FIX else 0, UPSTOX_BASE_DOMAIN=base_domain)
    told = verdicts(found, verdict)["clock"]
    assert words in told
    assert "timedatectl" in told


def test_a_server_that_does_not_answer_can_be_asked_again(run: Run) -> None:
    good(run("init"))
    found = look(run, code=1, UPSTOX_BASE_DOMAIN="http://127.0.0.1:1/{stage}")
    assert verdicts(found, "try again")["clock"].startswith("127.0.0.1 did not tell the time (")
    found = look(run, code=1, UPSTOX_DB_STORE="postgresql://user:hunter2hunter2@127.0.0.1:1/db")
    assert verdicts(found, "try again")["store"].startswith("PostgreSQL at 127.0.0.1:1/db cannot be reached")


def test_postgresqls_roles_and_poolers_are_told(run: Run, postgres_url: str) -> None:
    good(run("--store", postgres_url, "init"))
    assert "can edit the audit trail" in verdicts(look(run, "--store", postgres_url), NOTE)["roles"]
    role = f"trader_{uuid.uuid4().hex}"
    bare(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    try:
        good(run("--store", postgres_url, "init", "--runtime-role", role))
        with SmallPooler(as_role(postgres_url, role, "secret"), "transaction", 3) as pooler:
            by_pooler = f"postgresql://{role}:secret@127.0.0.1:{pooler.port}{postgres_url[postgres_url.rindex('/') :]}"
            found = look(run, "--store", by_pooler)
        assert "cannot edit the audit trail" in verdicts(found, OK)["roles"]
        assert verdicts(found, NOTE)["pooler"].startswith("A pooler is in between. Its default_pool_size ")
        assert "PostgreSQL is on this machine" in verdicts(found, OK)["TLS"]
        bare(postgres_url, f"REVOKE SELECT ON upstox_token_audit FROM {role}")
        found = look(run, "--store", as_role(postgres_url, role, "secret"), code=3)
        assert (
            f"lacks SELECT on upstox_token_audit. Its owner runs: upstox-db init --runtime-role {role}"
            in (verdicts(found, FIX)["roles"])
        )
        assert all("secret" not in text for what, _, text in found if what != "TOTP")
    finally:
        bare(postgres_url, f"DROP OWNED BY {role}")
        bare(postgres_url, f"DROP ROLE {role}")


@pytest.mark.usefixtures("own_servers")
def test_a_redis_that_may_throw_keys_away_has_to_be_fixed(run: Run, postgres_url: str) -> None:
    with RedisServer(settings={"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}) as server:
        store = "--store", f"{server.url} {postgres_url}"
        assert run(*store, "init").returncode == 0
        sick = run(*store, "doctor")
        assert sick.returncode == 3
        assert re.search("^fix +policy .*Set maxmemory-policy to noeviction", sick.stdout, re.MULTILINE)
        assert run(*store, "status").returncode == 1


def test_mongodb_tells_its_version_and_the_users_rights(run: Run, mongo: MongoDatabase) -> None:
    store = "--store", f"{mongo.url}#{mongo.name}"
    good(run(*store, "init"))
    found = run(*store, "doctor")
    assert "MongoDB 6.0" in found.stdout
    assert "  roles " in found.stdout


@pytest.mark.parametrize(
    ("host", "used", "checks", "verdict"),
    [
        ("127.0.0.1", False, False, OK),
        ("/var/run/postgresql", False, False, OK),
        ("db.example.com", False, False, FIX),
        ("db.example.com", True, False, FIX),
        ("db.example.com", True, True, OK),
    ],
)
def test_a_connection_to_another_machine_needs_tls_with_a_check(
    host: str, used: bool, checks: bool, verdict: str
) -> None:
    found = tls("PostgreSQL", host, used, checks, "?sslmode=verify-full")
    assert isinstance(found, Finding)
    assert found.verdict == verdict
    assert ("?sslmode=verify-full" in found.text) == (verdict == FIX)


def test_an_address_is_read_without_its_password() -> None:
    hybrid = read_address(Secret("rediss://:hunter2@redis.example.com/0?ssl_cert_reqs=none postgresql://u:p@h/n"))
    assert hybrid == ("rediss", "redis.example.com", {"ssl_cert_reqs": "none"})
    several = read_address(Secret("mongodb://u:p@a:1,b:2/?tls=true&replicaSet=rs0#name"))
    assert (several.scheme, several.options["tls"]) == ("mongodb", "true")
    assert USER not in str(several)
