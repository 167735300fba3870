"""PostgreSQL behind a pooler: one login at a time, no lost token, and no settings left behind for other programs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from upstox_db_examples import ConfigurationError, PostgreSQLUpstoxStorage, StoreUnavailable
from upstox_db_examples.local.upstox import Account, LocalUpstox

from ..contracts.backend import BackendContract
from ..contracts.logins import LoginContract
from ..contracts.one_login import OneLoginContract
from ..support import processes
from ..support.poolers import Pooled, SmallPooler, pooling
from ..support.postgresql import OnPostgreSQL, bare
from ..support.processes import USER, Address
from ..support.stores import CountsLogins, OpenStore, held, living, opening


@pytest.fixture(scope="module")
def pooled(request: pytest.FixtureRequest) -> Iterator[Pooled]:
    with pooling(*request.param) as started:
        yield started


@pytest.fixture(scope="module")
def postgres_server(pooled: Pooled) -> str:
    return pooled.server


class BehindAPooler(OnPostgreSQL):
    @pytest.fixture(autouse=True)
    def _url(self, postgres_url: str, pooled: Pooled) -> None:
        self.server, self.url = postgres_url, pooled.by_pooler(postgres_url)

    def raw_rows(self) -> list[dict[str, Any]]:
        return bare(self.server, "SELECT * FROM upstox_tokens ORDER BY id")

    def write_raw(self, token_id: Any, **values: Any) -> None:
        for column, value in values.items():
            bare(self.server, f"UPDATE upstox_tokens SET {column} = %s WHERE id = %s", value, token_id)


class Shared(BehindAPooler):
    """What is shown in each mode. In transaction mode there are two sessions for everybody."""

    def test_of_32_processes_one_logs_in(self, upstox: LocalUpstox, account: Account) -> None:
        PostgreSQLUpstoxStorage(self.url).close()
        upstox.login_seconds = 1
        address = Address("upstox_db_examples:PostgreSQLUpstoxStorage", (self.url,))
        tokens = processes.run_all(32, processes.get_or_create, address, upstox.base_domain, account.credentials())
        assert len(set(tokens)) == 1, sorted(set(tokens))
        assert upstox.logins() == 1

    def test_a_login_whose_process_is_killed_holds_nobody_up(self, upstox: LocalUpstox, account: Account) -> None:
        address = Address("upstox_db_examples:PostgreSQLUpstoxStorage", (self.url,))
        killed, connection = processes.start(processes.log_in_for_ever, address)
        assert connection.recv() == "logging in"
        process, waiting = processes.start(processes.get_or_create, address, upstox.base_domain, account.credentials())
        assert waiting.recv() == "ready"
        waiting.send("go")
        assert not waiting.poll(2), "it logs in although another process is logging in"
        processes.kill(killed)
        assert waiting.poll(5), "the dead process still holds the lock"
        assert upstox.is_living(waiting.recv())
        process.join()

    def test_other_programs_find_no_settings_of_ours(self, open_store: OpenStore) -> None:
        store = open_store()
        store.store_token()
        living(store)
        names = ("search_path", "statement_timeout", "lock_timeout", "synchronous_commit", "tcp_keepalives_idle")
        asked = f"SELECT {', '.join(f'current_setting({name!r}) AS {name}' for name in names)}"
        undisturbed = bare(self.server, asked)
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(lambda _: bare(self.url, asked), range(6))) == [undisturbed] * 6

    def test_settings_that_others_left_in_a_session_change_nothing(self, open_store: OpenStore) -> None:
        store = open_store()
        store.store_token()
        unkind = "SET statement_timeout = 100; SET search_path = nowhere; SET synchronous_commit = off"
        isolation = "SET default_transaction_isolation = 'serializable'; SET default_transaction_read_only = on"
        for _ in range(2):
            bare(self.url, f"{unkind}; {isolation}; COMMIT")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: living(store), range(40)))
        assert store.get_user_statistics(USER)["total_usage"] == 40
        backend: Any = store.backend
        backend.connections.run("SELECT pg_sleep(0.2)")
        shown = (
            "SELECT current_setting('synchronous_commit') AS commit, current_setting('transaction_isolation') AS level"
        )
        assert backend.connections.run(shown) == [{"commit": "on", "level": "read committed"}]

    def test_a_caller_that_lost_its_lock_still_stores_its_token(self, open_store: OpenStore) -> None:
        def login_while_the_session_dies(_: str | None) -> Any:
            holders = "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND database = "
            ours = "(SELECT oid FROM pg_database WHERE datname = current_database())"
            bare(self.server, f"SELECT pg_terminate_backend(pid, 5000) FROM ({holders}{ours}) AS holders")
            return processes.token_data(USER)

        store = open_store(login=login_while_the_session_dies)
        assert store.store_token(USER)["token"] == living(store)["token"]

    def test_the_status_says_that_there_is_a_pooler(self, open_store: OpenStore) -> None:
        assert open_store().get_storage_status()["details"]["postgresql"]["pooler"] is True


@pytest.mark.parametrize("pooled", [("transaction", 6)], indirect=True)
class TestTheContracts(BehindAPooler, OneLoginContract, LoginContract, BackendContract):
    """Up to five logins at a time, each of which keeps a session, and one more session for everything else."""


@pytest.mark.parametrize("pooled", [("transaction", 2)], indirect=True)
class TestInTransactionMode(Shared):
    def test_too_few_sessions_are_told_and_no_login_is_spent(self, open_store: OpenStore) -> None:
        logins = CountsLogins()
        store = open_store(timeout=1, login=logins.login)
        other = open_store().backend
        refused = pytest.raises(StoreUnavailable, match="default_pool_size")
        with store.backend.lock("CD0001"), other.lock("CD0002"), refused:
            store.get_or_create_token(USER)
        assert logins.logins == 0
        assert store.get_or_create_token(USER)["token"] == held(store)


@pytest.mark.parametrize("pooled", [("session", 100)], indirect=True)
class TestInSessionMode(Shared):
    pass


@pytest.mark.parametrize("pooled", [("statement", 2)], indirect=True)
def test_statement_mode_is_refused(pooled: Pooled, postgres_url: str) -> None:
    with pytest.raises(ConfigurationError, match="statement mode"):
        PostgreSQLUpstoxStorage(pooled.by_pooler(postgres_url))


@pytest.mark.parametrize("pooled", [("transaction", 2)], indirect=True)
def test_a_pooler_that_passes_on_process_ids_is_noticed_too(postgres_url: str) -> None:
    logins = CountsLogins()
    with SmallPooler(postgres_url, "transaction", 2, invents_ids=False) as pooler:
        parts = urlsplit(postgres_url)
        netloc = f"{parts.username}:{parts.password}@127.0.0.1:{pooler.port}"
        url = urlunsplit(parts._replace(netloc=netloc))
        with opening(PostgreSQLUpstoxStorage, login=logins.login) as open_one, ThreadPoolExecutor(8) as threads:
            stores = [open_one(url) for _ in range(2)]
            found = threads.map(lambda n: stores[n % 2].get_or_create_token(USER)["token"], range(8))
            assert len(set(found)) == 1
            assert stores[1].backend.connections.pooled
    assert logins.logins == 1
