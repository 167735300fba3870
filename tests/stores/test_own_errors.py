"""An error that the caller's own code raises while it holds a connection of a store comes out as it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from upstox_db_examples import (
    ConfigurationError,
    KeyRing,
    MongoUpstoxStorage,
    PooledUpstoxStorage,
    SQLiteUpstoxStorage,
    StoreUnavailable,
)

from ..support.databases import MongoDatabase


def raise_timeout(_: Path) -> None:
    raise TimeoutError("my own request")


def open_another_database(folder: Path) -> None:
    sqlite3.connect(folder / "none" / "other.db")


def raise_ours(_: Path) -> None:
    raise StoreUnavailable("Another store's.")


@pytest.fixture(params=[SQLiteUpstoxStorage, PooledUpstoxStorage])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLiteUpstoxStorage]:
    with request.param(tmp_path / "a.db", keys=KeyRing(KeyRing.new_key())) as opened:
        yield opened


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        (raise_timeout, TimeoutError),
        (open_another_database, sqlite3.OperationalError),
        (raise_ours, StoreUnavailable),
    ],
)
def test_in_a_connection_to_sqlite(
    store: SQLiteUpstoxStorage, tmp_path: Path, own: Callable[[Path], None], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught, store.get_connection():
        own(tmp_path)
    assert str(store.db_path) not in str(caught.value)
    assert type(caught.value) is kind


def test_but_a_connection_that_cannot_be_lent_is_our_error(store: SQLiteUpstoxStorage) -> None:
    with pytest.raises(StoreUnavailable), store.get_connection() as conn:
        conn.close()
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"), store.get_connection():
        pass


@pytest.mark.parametrize("own", [raise_timeout, raise_ours])
def test_in_a_loan_of_mongodb(mongo: MongoDatabase, tmp_path: Path, own: Callable[[Path], None]) -> None:
    with MongoUpstoxStorage(*mongo) as opened:
        with pytest.raises((TimeoutError, StoreUnavailable)) as caught, opened.backend.connection.database():
            own(tmp_path)
        assert mongo.name not in str(caught.value)


def test_a_database_in_another_case_of_mongodb_has_to_be_fixed(mongo: MongoDatabase) -> None:
    MongoUpstoxStorage(*mongo).close()
    with pytest.raises(ConfigurationError, match="upper and lower case"):
        MongoUpstoxStorage(mongo.url, mongo.name.upper())


def test_a_view_in_place_of_a_collection_of_mongodb_has_to_be_fixed(mongo: MongoDatabase) -> None:
    with MongoUpstoxStorage(*mongo) as opened, mongo.bare() as db:
        db.login_notes.drop()
        db.create_collection("login_notes", viewOn="tokens", pipeline=[])
        with pytest.raises(ConfigurationError, match="somebody made a view"):
            opened.backend.write_note("a", "b")


def test_another_replica_set_of_mongodb_has_to_be_fixed(mongo: MongoDatabase) -> None:
    address, _, _ = mongo.url.partition("/?")
    url = f"{address}/?replicaSet=another"
    with pytest.raises(ConfigurationError, match="replica set"):
        MongoUpstoxStorage(url, mongo.name, timeout=2.0)
