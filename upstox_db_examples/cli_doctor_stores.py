"""What `upstox-db doctor` checks of a store: can it be reached and written, its roles, pooler, policy, TLS, version."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import stat
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import parse_qs, urlsplit

from .cli_common import OpenStore
from .cli_doctor import FIX, LATER, NOTE, OK, WRONG_CLOCK, Finding, verdict_of
from .cli_status import has_keys
from .core.cipher import KeyRing
from .core.errors import DatabaseMissing, StorageError
from .core.locks import ACCOUNT_LOCK
from .core.token import Secret
from .patterns import INSTALLED_AS

if TYPE_CHECKING:
    from .core.store import TokenStorage
    from .hybrid.backend import HybridBackend
    from .mongodb.backend import MongoBackend
    from .postgresql.backend import PostgreSQLBackend
    from .sqlite.backend import SQLiteBackend

PROBE = "doctor"  # the name of the note that is written and erased, and of the lock
THIS_MACHINE = ("", "localhost", "127.0.0.1", "::1")


def check_store(store: OpenStore) -> Iterator[Finding]:
    """Check the store, and what its servers say about themselves."""
    try:
        opened = store()
    except DatabaseMissing as error:
        missing = str(error).partition(" Check --store")[0]
        told = f"{missing} Check --store and UPSTOX_DB_STORE. If it is new, run: upstox-db init"
        yield Finding("store", FIX, told)
        return
    health = opened.get_storage_status()
    details = health.pop("details", {})
    del health["timestamp"]
    for name, said in health.items():
        if str(said).startswith("error"):
            what = "policy" if "maxmemory-policy" in said else name
            yield Finding(what, FIX if what == "policy" else LATER, said.removeprefix("error: "))
        else:
            yield Finding(name, OK, f"{opened!r} answers.")
    for name, each in details.items():
        if each.get("overridden"):
            told = ", ".join(f"{key} {value}" for key, value in each["overridden"].items())
            yield Finding(name, NOTE, f"The store's own settings replace these: {told}.")
        if "warning" in each:
            yield Finding(name, FIX, each["warning"])
    if any(str(said).startswith("error") for said in health.values()):
        return
    yield from check_writing(opened)
    yield from check_keys_of_tokens(opened)
    kinds = {"sqlite": check_sqlite, "postgresql": check_postgresql, "mongodb": check_mongodb, "redis": check_redis}
    for name in health:
        try:
            yield from kinds[name](store, opened)
        except StorageError as error:
            yield Finding(name, verdict_of(error), str(error))


def check_writing(opened: TokenStorage) -> Iterator[Finding]:
    """Write what a login writes besides the token, and take a lock as a login does."""
    try:
        with opened.backend.lock(f"{ACCOUNT_LOCK}{PROBE}"):
            opened.backend.write_note(PROBE, "")
            opened.backend.erase_note(PROBE)
        theirs, _ = opened.backend.read_notes([])
    except StorageError as error:
        yield Finding("writable", verdict_of(error), str(error))
        return
    yield Finding("writable", OK, "It can be written, and a login can lock out others.")
    ahead = time.time() - theirs
    if abs(ahead) >= WRONG_CLOCK:
        how = "ahead of" if ahead > 0 else "behind"
        told = f"This machine's clock is {abs(ahead):.0f} s {how} the database's. Set the one that is wrong."
        yield Finding("clock", FIX, told)


def check_keys_of_tokens(opened: TokenStorage) -> Iterator[Finding]:
    try:
        known = KeyRing.default().key_ids if has_keys() else []
    except StorageError:  # The check of the keys has told it.
        return
    if unknown := [key for key in opened.keys_in_use() if key not in known]:
        told = "Put it back (UPSTOX_DB_KEYS, or the key file)" + (", or log in again." if known else ".")
        yield Finding("keys", FIX, f"The store has tokens under {', '.join(unknown)}, which this machine lacks. {told}")


def check_sqlite(_: OpenStore, opened: TokenStorage) -> Iterator[Finding]:
    import sqlite3

    yield Finding("versions", OK, f"SQLite {sqlite3.sqlite_version}")
    path = cast("SQLiteBackend", opened.backend).path
    mode, owner = stat.S_IMODE(path.stat().st_mode), path.stat().st_uid
    if mode & 0o077:
        yield Finding("roles", FIX, f"Others can open {path} (mode {mode:04o}). Run: chmod 600 {path}")
    elif owner != os.geteuid():
        yield Finding("roles", NOTE, f"{path} belongs to another user.")
    else:
        yield Finding("roles", OK, f"Only this user can open {path}.")


# What a program needs that stores and reads tokens. `init --runtime-role` grants it.
RIGHTS = """
SELECT current_user AS role, current_setting('server_version') AS version,
       (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('upstox_tokens')) AS owner,
       has_table_privilege('upstox_token_audit', 'UPDATE') OR has_table_privilege('upstox_token_audit', 'DELETE')
       AS edits, array_remove(ARRAY[
           CASE WHEN NOT has_table_privilege('upstox_tokens', 'SELECT') THEN 'SELECT on upstox_tokens' END,
           CASE WHEN NOT has_any_column_privilege('upstox_tokens', 'INSERT') THEN 'INSERT on upstox_tokens' END,
           CASE WHEN NOT has_any_column_privilege('upstox_tokens', 'UPDATE') THEN 'UPDATE on upstox_tokens' END,
           CASE WHEN NOT has_any_column_privilege('upstox_token_audit', 'INSERT')
                THEN 'INSERT on upstox_token_audit' END,
           CASE WHEN NOT has_table_privilege('upstox_token_audit', 'SELECT') THEN 'SELECT on upstox_token_audit' END
       ], NULL) AS lacks
"""


def check_postgresql(_: OpenStore, opened: TokenStorage) -> Iterator[Finding]:
    backend = cast("PostgreSQLBackend | HybridBackend", opened.backend)
    postgres = cast("PostgreSQLBackend", getattr(backend, "postgres", backend))
    connections = postgres.connections
    (found,) = connections.run(RIGHTS)
    yield Finding("versions", OK, f"PostgreSQL {found['version']}, {driver('psycopg2')}")
    role = found["role"]
    if found["lacks"]:
        told = (
            f"The role {role} lacks {', '.join(found['lacks'])}. Its owner runs: upstox-db init --runtime-role {role}"
        )
        yield Finding("roles", FIX, told)
    elif found["owner"] or found["edits"]:
        told = f"The role {role} can edit the audit trail. Programs need less: upstox-db init --runtime-role ROLE"
        yield Finding("roles", NOTE, told)
    else:
        yield Finding("roles", OK, f"The role {role} can store and read tokens, and cannot edit the audit trail.")
    if connections.pooled:
        told = "A pooler is in between. Its default_pool_size has to be larger than the number of users who log in"
        yield Finding("pooler", NOTE, f"{told} at the same time.")
    else:
        yield Finding("pooler", OK, "No pooler is in between, or one in session mode.")
    with connections.ordinary() as conn:
        info = conn.info
        mode = info.dsn_parameters.get("sslmode", "")
        yield tls(
            "PostgreSQL", info.host, info.ssl_in_use, mode in ("verify-full", "verify-ca"), "?sslmode=verify-full"
        )


def check_mongodb(store: OpenStore, opened: TokenStorage) -> Iterator[Finding]:
    with cast("MongoBackend", opened.backend).connection.database() as db:
        version = db.command("buildInfo")["version"]
        replica_set = db.command("hello").get("setName")
        who = db.command("connectionStatus")["authInfo"]
        hosts = [host for host, _ in db.client.nodes]
    alone = f"in the replica set {replica_set}" if replica_set else "a single server, without a replica set"
    yield Finding("versions", OK, f"MongoDB {version} ({alone}), {driver('pymongo')}")
    users = [each["user"] for each in who["authenticatedUsers"]]
    roles = [each["role"] for each in who["authenticatedUserRoles"]]
    if not users:
        yield Finding(
            "roles", FIX, "MongoDB asks for no user, so anyone who reaches it can do everything. Switch on auth."
        )
    elif {"root", "dbOwner", "readWrite", "dbAdmin"} & set(roles):
        told = f"The user {users[0]} ({', '.join(roles)}) can edit the audit trail. Programs need less: upstox-db init"
        yield Finding("roles", NOTE, f"{told} --runtime-role ROLE")
    else:
        yield Finding("roles", OK, f"The user {users[0]} has the roles {', '.join(roles)}.")
    address = read_address(Secret(store.address))
    used = address.scheme == "mongodb+srv" or "true" in (address.options.get("tls"), address.options.get("ssl"))
    checks = "true" not in (
        address.options.get("tlsinsecure"),
        address.options.get("tlsallowinvalidcertificates"),
        address.options.get("tlsallowinvalidhostnames"),
    )
    yield tls("MongoDB", hosts[0] if hosts else "", used, checks, "?tls=true")


def check_redis(store: OpenStore, opened: TokenStorage) -> Iterator[Finding]:
    from redis.exceptions import RedisError

    redis = cast("HybridBackend", opened.backend).redis
    status = redis.status()
    client: Any = redis.client
    try:
        version = client.info("server").get("redis_version", "of an unknown version")
    except RedisError:
        version = "of an unknown version"
    yield Finding("versions", OK, f"Redis {version}, {driver('redis')}")
    try:
        user = client.execute_command("ACL WHOAMI")
        user = user.decode() if isinstance(user, bytes) else user
        told = f"The Redis user {user} may do more than the store needs. See runtime_acl() for the least rights."
        yield Finding("roles", NOTE, told)
    except RedisError:  # It may not ask who it is, which is right: the store does not need that.
        yield Finding("roles", OK, "The Redis user has few rights.")
    policy = status["maxmemory_policy"]
    yield Finding("policy", OK if policy == "noeviction" else NOTE, f"Redis's maxmemory-policy is {policy}.")
    address = read_address(Secret(store.address))
    checks = address.options.get("ssl_cert_reqs", "required") == "required"
    yield tls("Redis", address.host, address.scheme == "rediss", checks, "rediss://")


def tls(name: str, host: str, used: bool, checks: bool, how: str) -> Finding:
    """Say whether a connection is encrypted, and whether the server has to prove who it is."""
    if used and checks:
        return Finding("TLS", OK, f"The connection to {name} is encrypted, and its certificate is checked.")
    if host in THIS_MACHINE or host.startswith("/"):
        return Finding("TLS", OK, f"{name} is on this machine, so its connection needs no TLS.")
    if used:
        told = f"The connection to {name} is encrypted, but nobody checks whose certificate it is. Use {how}"
        return Finding("TLS", FIX, told)
    return Finding("TLS", FIX, f"The connection to {name} is not encrypted. Use {how} in its address.")


class Address(NamedTuple):
    """What the first URL of a store's address says, without user and password."""

    scheme: str
    host: str
    options: dict[str, str]


def read_address(address: Secret) -> Address:
    """Read a store's address. The store has opened it, so it is usable."""
    parts = urlsplit(address.reveal().split(maxsplit=1)[0])
    try:
        host = parts.hostname or ""
    except ValueError:  # several hosts
        host = "several"
    options = {name.lower(): values[-1].lower() for name, values in parse_qs(parts.query).items()}
    return Address(parts.scheme, host, options)


def driver(module: str) -> str:
    """Return a driver's name and version."""
    name = INSTALLED_AS.get(module, module)
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # psycopg2 may be built from source under its own name.
        return f"{module} on Python {platform.python_version()}"
