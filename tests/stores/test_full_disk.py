"""PostgreSQL on a disk that fills at each write of a store: counted, and nothing that was acknowledged is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from upstox_db_examples import KeyRing, PostgreSQLUpstoxStorage, StorageError, StoreUnavailable, TokenNotStored
from upstox_db_examples.local.servers import PostgreSQLServer

from ..support.databases import notes
from ..support.postgresql import bare, counts
from ..support.processes import USER
from ..support.stores import CountsLogins, living

PAGE = 8192
# An old token of somebody else, and an audit entry of somebody else: a thousand bytes each.
FILLER = "jsonb_build_object('filler', repeat('x', 1000)) FROM generate_series(1, 16000) AS n"
FILL = {
    "upstox_tokens": "INSERT INTO upstox_tokens (user_id, key_id, generation, products, exchanges, is_active, "
    f"created_at, expires_at, metadata) SELECT 'CD' || n, 'k', 1, '[]', '[]', false, now(), now(), {FILLER}",
    "upstox_token_audit": "INSERT INTO upstox_token_audit (user_id, action, actor, performed_at, metadata) "
    f"SELECT 'CD0001', 'filler', 'tests', now(), {FILLER}",
}


class LimitedServer(PostgreSQLServer):
    """A server none of whose files may grow beyond a limit. PostgreSQL takes that for a full disk."""

    blocks: int | None = None

    def _command(self) -> list[str]:
        limit = f"ulimit -S -f {self.blocks}; " if self.blocks else ""
        return ["sh", "-c", f'{limit}exec "$@"', "sh", *super()._command()]

    def limit_files(self, size: int | None) -> None:
        self.stop()
        self.blocks = size and size // 512
        self.start()


@pytest.mark.slow
@pytest.mark.usefixtures("own_servers")
@pytest.mark.parametrize("table", FILL)
def test_a_disk_that_fills_at_each_write_loses_nothing(table: str, keys: KeyRing) -> None:
    logins, outcomes = CountsLogins(), Counter[str]()
    with LimitedServer() as server, PostgreSQLUpstoxStorage(server.url, keys=keys, login=logins.login) as store:
        # The limit has to meet this table first, and not the 16 MB files of the log.
        bare(server.url, f"{FILL[table]}; CLUSTER {table} USING {table}_pkey")
        for spare in range(6):
            outcome, token = "stored", store.store_token(USER)["token"]
            server.limit_files(size_of(server.url, table) + spare * PAGE)
            while outcome == "stored":
                before = logins.logins
                outcome, token = attempt(store, token)
                outcomes[outcome] += 1
                spent = logins.logins > before
                assert spent == (outcome != "refused"), "a login was spent, and its token is nowhere"
            assert is_read_or_refused(store, token)
            server.limit_files(None)
            # The token that is in the error is in no store, and the one before it is dead.
            assert outcome == "in the error" or living(store)["token"] == token
            assert len(counts(server.url).active) == 1
    assert outcomes["stored"] > 20
    assert outcomes["refused"] + outcomes["in the error"] == 6
    notes.append(f"PostgreSQL's disk filled at {table}: {dict(outcomes)}, none lost")


def attempt(store: PostgreSQLUpstoxStorage, before: str) -> tuple[str, str]:
    """Store a token, and return how it went, and the user's living token."""
    try:
        return "stored", store.store_token(USER)["token"]
    except TokenNotStored as error:
        return "in the error", error.token.reveal()
    except StoreUnavailable as error:
        return ("refused" if is_no_room(error) else str(error)), before


def is_read_or_refused(store: PostgreSQLUpstoxStorage, token: str) -> bool:
    """A read writes, too: on a full disk it gives the living token, or none, or an error that says why."""
    try:
        read = store.get_valid_token(USER)
    except StorageError as error:
        return is_no_room(error)
    return read is None or bool(read["token"] == token)


def is_no_room(error: StorageError) -> bool:
    # A limit is told in other words than a full disk, by the code XX000 and not by 53100.
    return "could not extend file" in str(error.__cause__)


def size_of(url: str, table: str) -> int:
    return int(bare(url, f"SELECT pg_relation_size('{table}') AS size")[0]["size"])
