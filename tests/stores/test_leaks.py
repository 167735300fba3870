"""After a full run of successes and failures, no secret can be found anywhere. The search looks at the bytes."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from redis import Redis

from upstox_db_examples import (
    HybridUpstoxStorage,
    KeyRing,
    MongoUpstoxStorage,
    PostgreSQLUpstoxStorage,
    SdkLogin,
    SQLiteUpstoxStorage,
    TokenStorage,
    export_tokens,
    import_tokens,
    migrate,
)
from upstox_db_examples.core.notes import applicant_of
from upstox_db_examples.local.servers import MongoDBServer, PostgreSQLServer, RedisServer
from upstox_db_examples.local.upstox import Account, Failure, LocalUpstox
from upstox_db_examples.patterns import PATTERNS

from ..support import leaks
from ..support.clocks import Clock, FakeTime
from ..support.leaks import shown_with_locals
from ..support.processes import USER, Address

PASSWORD = "the-password-of-this-account"


class PlainMongoDB(MongoDBServer):
    """A MongoDB with uncompressed files, because a search finds nothing in compressed ones."""

    def _command(self) -> list[str]:
        none = ["--wiredTigerCollectionBlockCompressor", "none", "--wiredTigerJournalCompressor", "none"]
        return [*super()._command(), *none]


class Surroundings(NamedTuple):
    """A store, its servers, the folders with its data, and the names of its own loggers."""

    open: Callable[..., TokenStorage]
    servers: list[Any]
    folders: list[Path]
    loggers: set[str]


EVERY_STORE = {
    *(f"core.{name}" for name in ("store", "life_cycle", "saving", "sdk_login", "upstox_api", "batch", "cipher")),
    *("transfer.transfer", "sqlite.backend", "sqlite.connections"),
}
POSTGRESQL = {"postgresql.backend", "postgresql.connections"}
# The slow log keeps each command, and nothing in the snapshot is compressed.
SHOWS_ALL = {"slowlog-log-slower-than": "0", "slowlog-max-len": "10000", "rdbcompression": "no"}


def at_a_path(pattern: str, folder: Path) -> Surroundings:
    address = Address(f"upstox_db_examples:{PATTERNS[pattern].store}", (str(folder / "a.db"),))

    def open_one(**options: Any) -> Any:
        return address.open(**address.counting(), **options)

    return Surroundings(open_one, [], [folder], {"pooled.store"} if pattern == "pooled" else set())


def postgresql(stack: ExitStack, _: Path) -> Surroundings:
    server = stack.enter_context(PostgreSQLServer(settings={"log_statement": "all", "log_min_messages": "info"}))
    folders = [server.folder]
    return Surroundings(lambda **o: PostgreSQLUpstoxStorage(server.url, timeout=1, **o), [server], folders, POSTGRESQL)


def mongodb(stack: ExitStack, _: Path) -> Surroundings:
    server = stack.enter_context(PlainMongoDB())
    folders, own = [server.folder], {"mongodb.connection", "mongodb.schema"}
    return Surroundings(lambda **o: MongoUpstoxStorage(server.url, timeout=2, **o), [server], folders, own)


def hybrid(stack: ExitStack, _: Path) -> Surroundings:
    server = stack.enter_context(PostgreSQLServer(settings={"log_statement": "all"}))
    redis = stack.enter_context(RedisServer(settings={**SHOWS_ALL, "appendfsync": "always"}))
    both = [redis, server]

    def open_one(**options: Any) -> TokenStorage:
        return HybridUpstoxStorage(redis.url, server.url, timeout=1, believed=0.1, redis_pause=0.1, **options)

    own = {"hybrid.backend", "hybrid.redis"} | POSTGRESQL
    return Surroundings(open_one, both, [server.folder, redis.folder], own)


ON_SERVERS = {"postgresql": postgresql, "mongodb": mongodb, "hybrid": hybrid}


@pytest.fixture(params=PATTERNS)
def surroundings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Surroundings]:
    folder = tmp_path / "data"
    folder.mkdir()
    with ExitStack() as stack:
        on_servers = ON_SERVERS.get(request.param)
        yield on_servers(stack, folder) if on_servers else at_a_path(request.param, folder)


def full_run(
    surroundings: Surroundings, upstox: LocalUpstox, account: Account, keys: list[bytes], clock: Clock, folder: Path
) -> tuple[list[str], str]:
    """Run everything that a store can do and that can go wrong. Return the tokens, and everything that was shown."""
    tokens: list[str] = []
    shown: list[str] = []

    def look_at(result: Any) -> Any:
        shown.append(f"{result} {result!r}")
        return result

    def fails(call: Callable[[], object]) -> None:
        try:
            look_at(call())
        except Exception as error:
            shown.append(shown_with_locals(error))

    upstox.stall_seconds = 0.1
    at_once = FakeTime().pace()
    login = SdkLogin({**account.credentials(), "password": PASSWORD}, base_domain=upstox.base_domain)
    options: dict[str, Any] = {"login": login, "clock": clock}
    with surroundings.open(**options, keys=KeyRing(keys[0])) as store:
        for call in (store.store_token, store.store_token, store.get_or_create_token):
            tokens.append(look_at(call())["token"])
        look_at(store.get_valid_token(USER))
        look_at(store.store_token_batch([USER], progress=False, pace=at_once))
        for failure in Failure:
            upstox.fail(failure)
            fails(store.store_token)
            forget_failures(store)
            upstox.fail(failure)
            fails(lambda: store.store_token_batch([USER], replace=True, progress=False, pace=at_once))
            forget_failures(store)
        clock.advance(seconds=1)
        tokens.append(look_at(store.save_token(upstox.notify(USER), verify=True))["token"])
        upstox.kill_token(USER)
        tokens.append(look_at(store.renew_token(USER, tokens[-1]))["token"])
        fails(lambda: store.renew_token(USER, tokens[-1]))
        fails(lambda: store.save_token({"access_token": tokens[-1], "user_id": "ZZ9999"}))
        look_at(store.log_out(USER))
        tokens.append(look_at(store.store_token())["token"])
        with surroundings.open(**options, keys=KeyRing(KeyRing.new_key())) as stranger:
            fails(lambda: stranger.get_valid_token(USER))
        fails(lambda: store.get_valid_token("not a user"))
        fails(lambda: store.store_token("CD0001"))
        export_tokens(store, folder / "export", progress=False)
        if isinstance(store, SQLiteUpstoxStorage):
            store.backup(folder / "copy.db")
            fails(lambda: wrong_statement(store))
        look_at(KeyRing.from_file(folder / "another key"))
        with SQLiteUpstoxStorage(folder / "moved.db", keys=KeyRing(keys[0]), clock=clock) as moved:
            look_at(migrate(store, moved, progress=False))
        with surroundings.open(**options, keys=KeyRing(keys[1], keys[0])) as rotating:
            look_at(rotating.rotate_keys())
            look_at(rotating.keys_in_use())
            fails(lambda: import_tokens(rotating, folder / "export", progress=False))
            tokens.append(look_at(rotating.store_token())["token"])
            for told in (rotating.get_token_history, rotating.get_user_statistics, rotating.get_audit_trail):
                look_at(json.dumps(told(USER)))
            look_at(rotating.get_storage_status())
            for server in surroundings.servers:
                server.pause()
                fails(lambda: rotating.get_valid_token(USER))
                fails(rotating.store_token)
                look_at(rotating.get_storage_status())
                server.resume()
            look_at(rotating.revoke_token(USER))
            tokens.append(look_at(rotating.store_token())["token"])
            clock.advance(days=1)
            look_at(rotating.cleanup_expired_tokens())
        look_at(vars(store))
        look_at(store)
    return tokens, "\n".join(shown)


def forget_failures(store: TokenStorage) -> None:
    """Let the next login reach Upstox: the notes of an earlier failure would stop it."""
    who = applicant_of(store.login, USER).who
    for name in ("limit", f"limit {who}", f"refusal {who}"):
        store.backend.erase_note(name)
    store.revoke_token("ZZ9999")  # the user in Failure.OTHER_USER


def wrong_statement(store: SQLiteUpstoxStorage) -> None:
    with store.get_connection() as conn:
        conn.execute("SELECT access_token FROM nowhere")


@pytest.mark.parametrize("secret", ["eyJ0eXAiOiJKV1Qi" + "abc/def" * 9, KeyRing.new_key()], ids=["token", "key"])
def test_the_search_finds_a_secret_in_each_form(secret: str | bytes) -> None:
    raw = secret.encode() if isinstance(secret, str) else secret
    shown: list[str | bytes] = [raw, raw.hex(), raw.hex().upper(), repr(secret), f"x{secret!r}"]
    if isinstance(secret, str):
        shown.append(json.dumps(secret))
    for shift in range(3):
        shifted = b"x" * shift + raw + b"y"
        shown += [base64.b64encode(shifted), base64.urlsafe_b64encode(shifted)]
    for form in shown:
        text = form if isinstance(form, bytes) else form.encode()
        assert leaks.find([secret], b"\0\xffnoise " + text + b" noise\0"), form
    part = raw[5:25] if isinstance(secret, str) else raw.hex().encode()[5:25]
    for before in range(9):
        assert leaks.find([secret], b"x" * before + part)
    assert not leaks.find([secret], b"noise" + raw[:10] + b"noise" * 100)


@pytest.mark.usefixtures("own_servers")
@pytest.mark.slow
def test_no_secret_lies_anywhere(
    surroundings: Surroundings,
    upstox: LocalUpstox,
    account: Account,
    clock: Clock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    sdk = logging.getLogger("upstox-totp")
    before = sdk.level
    sdk.setLevel(logging.DEBUG)
    keys = [KeyRing.new_key(), KeyRing.new_key()]
    try:
        tokens, shown = full_run(surroundings, upstox, account, keys, clock, tmp_path)
    finally:
        sdk.setLevel(before)
    passwords = [str(urlsplit(server.url).password) for server in surroundings.servers]
    secrets: list[str | bytes] = [*tokens, account.totp_secret, account.client_secret, PASSWORD, *keys]
    # pymongo gives its requests random numbers. In one run of forty, six digits of these were the PIN.
    texts = shown + re.sub(r'"(requestId|operationId)": -?\d+', "", caplog.text)
    spoke = {record.name.removeprefix("upstox_db_examples.") for record in caplog.records}
    assert EVERY_STORE | surroundings.loggers <= spoke
    assert len(tokens) == 8
    assert len(texts) > 10_000
    assert USER in texts
    assert not leaks.find([*secrets, *passwords, account.pin], texts.encode()), "a secret was shown or logged"
    assert leaks.files_with(secrets, tmp_path) == []
    for server in surroundings.servers:
        with contextlib.suppress(AttributeError):
            dump = [str(server.binaries / "pg_dump"), server.url]
            dumped = subprocess.run(dump, check=True, capture_output=True).stdout
            assert leaks.find("upstox_token_audit", dumped)
            assert not leaks.find(secrets, dumped)
        if isinstance(server, RedisServer):
            with Redis.from_url(server.url) as client:
                client.save()
                asked = repr(client.slowlog_get(10_000)).encode()
            assert leaks.find(USER, asked)
            assert not leaks.find(secrets, asked)
        server.stop()
    for folder in surroundings.folders:
        assert leaks.files_with(USER, folder), f"{folder.name} should contain the user's name"
        # Leave out the copy of the server's own files, and the files that hold its password on purpose.
        data = [each for each in folder.iterdir() if each.is_dir() and each.name != "install"]
        assert [found for each in data for found in leaks.files_with(secrets, each)] == []
        log = folder / "server.log"
        assert not log.exists() or not leaks.find([*secrets, *passwords], log.read_bytes())
