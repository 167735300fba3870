"""The playground of the notebooks: everything is there at once, and everything is gone at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
import pymongo
import pytest

from upstox_db_examples import MongoUpstoxStorage, PostgreSQLUpstoxStorage, SQLiteUpstoxStorage
from upstox_db_examples.local import Playground

from ..support.databases import MongoDatabase


def listens(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def databases(url: str) -> set[str]:
    connection = psycopg2.connect(url)
    with connection.cursor() as cursor:
        cursor.execute("SELECT datname FROM pg_database")
        names = {str(name) for (name,) in cursor}
    connection.close()
    return names


def test_everything_is_there_at_once_and_gone_at_the_end(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTOX_PIN_CODE", "of a real account")
    monkeypatch.setenv("UPSTOX_DB_STORE", "of a real account")
    monkeypatch.setenv("POSTGRES_URL", "postgresql://another/server")
    before = dict(os.environ)
    ended: list[str] = []
    with Playground("postgresql", "redis", users=("AB1234", "CD5678"), own_servers=True) as play:
        play.at_end(ended.append, "called")
        storage = play.keep(SQLiteUpstoxStorage(play.folder / "upstox.db", clock=play.clock))
        token = storage.get_or_create_token()["token"]
        assert "UPSTOX_DB_STORE" not in os.environ
        assert set(play.credentials) == {"AB1234", "CD5678"}
        reader = "from upstox_db_examples import SQLiteUpstoxStorage as Store\n"
        reader += "with Store('upstox.db', clock=clock) as store: print(store.get_valid_token('AB1234')['token'])"
        assert play.start(reader).communicate()[0].strip() == token
        play.set_time("2026-01-07 03:30")
        assert storage.get_valid_token("AB1234") is None
        copy = play.copy_folder()
        assert (copy / "upstox.db").exists()
        assert not (copy / "keys").exists()
        assert play.postgresql is not None
        addresses = [play.upstox.base_domain, play.redis_url, play.postgresql.url]
        assert all(map(listens, addresses))
        assert token not in repr(play)
    assert ended == ["called"]
    assert list(temporary.iterdir()) == []
    assert not any(map(listens, addresses))
    assert dict(os.environ) == before
    play.close()


def test_a_given_server_stays_without_our_database(
    postgres_url: str, mongo: MongoDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", postgres_url)
    monkeypatch.setenv("MONGODB_URL", mongo.url)
    with Playground("postgresql", "mongodb") as play:
        play.keep(PostgreSQLUpstoxStorage(play.postgresql_url, clock=play.clock)).store_token()
        play.keep(MongoUpstoxStorage(play.mongodb_url, play.database, clock=play.clock)).store_token()
        assert play.database in databases(postgres_url)
    assert play.database not in databases(postgres_url)
    with pymongo.MongoClient[dict[str, object]](mongo.url) as client:
        assert play.database not in client.list_database_names()


def test_it_ends_with_python_if_nobody_closes_it(temporary: Path) -> None:
    code = "from upstox_db_examples.local import Playground; print(Playground().folder)"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert Path(done.stdout.strip()).parent == temporary
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_when_it_cannot_be_made(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", "postgresql://nobody@127.0.0.1:1/postgres")
    before = dict(os.environ)
    with pytest.raises(Exception, match="POSTGRES_URL"):
        Playground("postgresql")
    assert dict(os.environ) == before
    assert list(temporary.iterdir()) == []
