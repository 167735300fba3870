"""MongoDB: crowds, kills, the TTL, a server that fails, and TLS."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest

from upstox_db_examples import (
    ConfigurationError,
    ExpiryPolicy,
    KeyRing,
    MongoUpstoxStorage,
    Secret,
    TokenStorage,
)
from upstox_db_examples.local.certificates import make_certificates
from upstox_db_examples.local.servers import MongoDBServer

from ..contracts.reliability import ReliabilityContract
from ..contracts.server import ServerContract
from ..support.certificates import SOON, expired_certificates
from ..support.databases import MongoDatabase
from ..support.processes import USER, Address, made_up_login, token_data, wait_until
from ..support.stores import Counts, living


class TestMongoDBUnderCrowdsAndKills(ReliabilityContract):
    takeover = 3
    killed_within = 0.2
    in_a_crowd = {"timeout": 60.0, "lease": 10.0}

    @pytest.fixture
    def address(self, mongo: MongoDatabase) -> Address:
        MongoUpstoxStorage(*mongo).close()
        return Address("upstox_db_examples:MongoUpstoxStorage", tuple(mongo), {"lease": self.takeover})

    @pytest.mark.slow
    def test_a_writer_can_be_killed_200_times(self, address: Address, count: Callable[[], Counts]) -> None:
        # Each killed writer leaves a lease that the next one waits for, so make the lease short.
        super().test_a_writer_can_be_killed_200_times(address._replace(options={"lease": 0.1}), count)

    @pytest.fixture
    def count(self, mongo: MongoDatabase) -> Iterator[Callable[[], Counts]]:
        with mongo.bare() as db:  # Opening a client takes longer than counting.

            def counted() -> Counts:
                records = {each["_id"]: each for each in db.tokens.find({}, ["generation", "audit"])}
                created = {e["token_id"] for e in db.token_audit.find({"action": "created"}, ["token_id"])}
                created |= {
                    e["token_id"] for each in records.values() for e in each["audit"] if e["action"] == "created"
                }
                active = [str(each["token_id"]) for each in db.active_tokens.find({"_id": USER})]
                generations = {str(token_id): record["generation"] for token_id, record in records.items()}
                return Counts(active, generations, len(created ^ set(records)))

            yield counted


@pytest.mark.usefixtures("own_servers")
class TestTheTTL:
    """Tests on a server whose TTL monitor runs every second. They use the real time."""

    @pytest.fixture
    def server(self) -> Iterator[MongoDBServer]:
        with MongoDBServer(settings={"ttlMonitorSleepSecs": "1"}) as server:
            yield server

    def test_the_ciphertext_goes_by_itself_and_the_history_stays(self, server: MongoDBServer, keys: KeyRing) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        with MongoUpstoxStorage(server.url, login=login, keys=keys, policy=FewSeconds()) as store:
            stored = store.store_token(USER)
            assert living(store)["usage_count"] == 1
            with store.backend.lock(USER):
                store.backend.begin_login(
                    USER, USER, store.backend.context.now(), {}
                )  # A marked document expires like any other.
            with pymongo.MongoClient[Any](server.url) as client:
                db = client.upstox_db
                assert db.active_tokens.count_documents({}) == 1
                wait_until(lambda: db.active_tokens.count_documents({}) == 0)
                assert "v2." not in "".join(map(str, [*db.tokens.find(), *db.token_audit.find()]))
            assert store.get_valid_token(USER) is None
            assert store.get_token_history(USER)[0]["token_id"] == stored["token_id"]
            assert store.get_user_statistics(USER)["total_usage"] == 1
            assert [entry["action"] for entry in store.get_audit_trail(USER)] == ["login", "used", "created", "login"]
            assert store.cleanup_expired_tokens() == 1
            assert store.get_audit_trail(USER)[0]["action"] == "expired"

    def test_a_read_does_not_wait_for_the_ttl(self, keys: KeyRing, mongo: MongoDatabase) -> None:
        login = lambda user_id: token_data(user_id or USER)  # noqa: E731
        options: dict[str, Any] = {"login": login, "keys": keys, "policy": FewSeconds()}
        with MongoUpstoxStorage(*mongo, **options) as store:
            store.store_token(USER)
            time.sleep(3)
            assert store.get_valid_token(USER) is None


class FewSeconds(ExpiryPolicy):
    """Tokens that die soon, so that a test need not wait until 03:30."""

    def __init__(self) -> None:
        super().__init__(margin=timedelta(0))

    def expires_at(self, _: Secret, now: datetime) -> datetime:
        return now + timedelta(seconds=2)


class TestAServerThatFails(ServerContract):
    kind, name = MongoDBServer, "mongodb"

    def connect(self, url: str, **options: Any) -> TokenStorage:
        # A writer whose server is killed leaves a lease that others wait for, so make the lease short.
        return MongoUpstoxStorage(url, lease=0.3, **options)


@pytest.mark.usefixtures("own_servers")
def test_tls_is_verified_and_a_wrong_authority_is_refused(tmp_path: Path, keys: KeyRing) -> None:
    stranger, _, _ = make_certificates(tmp_path)
    with MongoDBServer(tls=True) as server:
        url = f"{server.url}&tls=true"
        with MongoUpstoxStorage(f"{url}&tlsCAFile={server.ca_file}", login=made_up_login, keys=keys) as store:
            assert store.store_token(USER)["token"] == living(store)["token"]
        for refused in (f"{url}&tlsCAFile={stranger}", url):
            with pytest.raises(ConfigurationError, match="failed the TLS check"):
                MongoUpstoxStorage(refused, timeout=1)


@pytest.mark.usefixtures("own_servers")
def test_a_certificate_that_has_expired_is_refused_and_named() -> None:
    # MongoDB does not start with one that has expired already.
    with expired_certificates(SOON), MongoDBServer(tls=True) as server:
        time.sleep(SOON.total_seconds())
        url = f"{server.url}&tls=true&tlsCAFile={server.ca_file}"
        with pytest.raises(ConfigurationError, match="certificate has expired"):
            MongoUpstoxStorage(url, timeout=1)
