"""MongoDB: what a URL sets, and what holds instead."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pymongo
import pytest

from upstox_db_examples import ConfigurationError, KeyRing, MongoUpstoxStorage
from upstox_db_examples.local.servers import MongoDBServer

from ..support.databases import MongoDatabase
from ..support.mongodb import another_user
from ..support.processes import USER, made_up_login
from ..support.stores import living

BAD = "w=0&journal=false&readPreference=secondary&readConcernLevel=available&retryWrites=false&retryReads=false"
HOLDS = {
    "w": "majority",
    "journal": "true",
    "readPreference": "primary",
    "readConcernLevel": "local",
    "retryWrites": "true",
    "retryReads": "true",
}


@pytest.mark.usefixtures("own_servers")
class TestAReplicaSet:
    @pytest.fixture
    def url(self) -> Iterator[str]:
        """Of a replica set that is found by its name: a direct connection would ask its server whatever it prefers."""
        with MongoDBServer() as server:
            yield server.url.replace("directConnection=true", "replicaSet=rs0")

    def test_what_the_promises_need_holds_whatever_the_url_says(
        self, url: str, keys: KeyRing, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It has no secondary, so a read that prefers one would find no server."""
        with MongoUpstoxStorage(f"{url}&{BAD}", login=made_up_login, keys=keys, timeout=2) as store:
            token = store.store_token(USER)["token"]
            assert living(store)["token"] == token
            status: dict[str, Any] = store.get_storage_status()
            assert (status["mongodb"], status["details"]) == ("healthy", {"mongodb": {"overridden": HOLDS}})
            with store.backend.connection.database() as db:
                assert db.read_preference == pymongo.ReadPreference.PRIMARY
                assert db.write_concern.document == {"w": "majority", "j": True}
                assert db.read_concern.document == {"level": "local"}
                assert db.client.options.retry_writes
                assert db.client.options.retry_reads
        assert "readPreference is primary" in caplog.text

    def test_the_name_of_the_database_decides_and_a_difference_is_reported(
        self, url: str, keys: KeyRing, caplog: pytest.LogCaptureFixture
    ) -> None:
        for named, overridden in {"": {}, "tokens": {}, "admin": {}, "hunter2hunter2": {"database": "tokens"}}.items():
            caplog.clear()
            with MongoUpstoxStorage(url.replace("/?", f"/{named}?"), "tokens", keys=keys) as store:
                details: Any = store.get_storage_status()["details"]
                assert details == {"mongodb": {"overridden": overridden}}
            told = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
            assert len(told) == len(overridden)
            assert "hunter2" not in caplog.text
        with pymongo.MongoClient[Any](url) as client:
            assert {"tokens"} == set(client.list_database_names()) - {"admin", "config", "local"}


def test_a_name_that_differs_only_in_case_is_a_clear_error(mongo: MongoDatabase, keys: KeyRing) -> None:
    MongoUpstoxStorage(*mongo, keys=keys).close()
    other = mongo.name.upper()
    for options in ({}, {"create": False}):
        with pytest.raises(ConfigurationError, match=f"the database {mongo.name} whose name differs only in upper"):
            MongoUpstoxStorage(mongo.url, other, keys=keys, **options)  # type: ignore[arg-type]


def test_a_user_who_cannot_see_the_other_database_gets_a_clear_error(mongo: MongoDatabase, keys: KeyRing) -> None:
    MongoUpstoxStorage(*mongo, keys=keys).close()
    rights: Any = [{"role": "dbOwner", "db": mongo.name.upper()}]
    user = another_user(mongo, rights)
    with pytest.raises(ConfigurationError, match="one whose name differs only in upper and lower case"):
        MongoUpstoxStorage(user.url, mongo.name.upper(), keys=keys)
