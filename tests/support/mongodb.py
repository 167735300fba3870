"""A MongoDB database for one test, a record of what is sent to it, and lost connections."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from bson import json_util
from bson.codec_options import CodecOptions
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect

from upstox_db_examples import MongoUpstoxStorage, TokenStorage

from .databases import MongoDatabase
from .project import VERSION_1
from .stores import OnAStore, OpenStore

PASSWORD = "hunter2hunter2"
RUNTIME_1 = ["the_runtime_role_of_version_1"]
RUNTIME_ACTIONS_1 = {
    "active_tokens": ["find", "insert", "update", "remove"],
    "tokens": ["find", "insert", "update"],
    "token_audit": ["find", "insert"],
    "leases": ["find", "insert", "update", "remove"],
    "schema_version": ["find"],
}


class OnMongoDB(OnAStore):
    @pytest.fixture(autouse=True)
    def _database(self, mongo: MongoDatabase) -> None:
        self.mongo = mongo

    def connect(self, **options: Any) -> TokenStorage:
        return MongoUpstoxStorage(self.mongo.url, self.mongo.name, **options)

    def raw_rows(self) -> list[dict[str, Any]]:
        with self.mongo.bare() as db:
            active = {each["token_id"]: each for each in db.active_tokens.find()}
            return [
                {
                    "id": record["_id"],
                    "access_token": active.get(record["_id"], {}).get("ciphertext"),
                    "key_id": active.get(record["_id"], {}).get("key_id"),
                    "account": active.get(record["_id"], {}).get("account"),
                }
                for record in db.tokens.find().sort("_id")
            ]

    def write_raw(self, token_id: Any, **values: Any) -> None:
        change = {"ciphertext" if name == "access_token" else name: value for name, value in values.items()}
        with self.mongo.bare() as db:
            db.active_tokens.with_options(CodecOptions(tz_aware=True)).update_one(
                {"token_id": token_id}, {"$set": change}, bypass_document_validation=True
            )

    @pytest.fixture
    def store(self, open_store: OpenStore) -> MongoUpstoxStorage:
        store = open_store()
        assert isinstance(store, MongoUpstoxStorage)
        return store


@contextmanager
def cut_off_before(
    patch: pytest.MonkeyPatch, method: str, collection: str | None = None, times: float = float("inf")
) -> Iterator[None]:
    """Lose the connection whenever pymongo calls this method: in one collection only, or a limited number of times."""
    original, lost = getattr(Collection, method), 0

    def lose(self: Collection[Any], *arguments: Any, **options: Any) -> Any:
        nonlocal lost
        if collection in (None, self.name) and lost < times:
            lost += 1
            raise AutoReconnect("connection closed")
        return original(self, *arguments, **options)

    with patch.context() as patched:
        patched.setattr(Collection, method, lose)
        yield


@contextmanager
def sent(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect the names of the commands that the driver sends in this block. The list is filled when the block ends."""
    commands: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "pymongo.command"):
        yield commands
    told = [record.getMessage() for record in caplog.records if record.name == "pymongo.command"]
    begun = "".join(text for text in told if "Command started" in text)
    commands += re.findall('"commandName": "(.+?)"', begun)


def another_user(mongo: MongoDatabase, rights: list[str]) -> MongoDatabase:
    """Return the same database, opened by a user with these rights. A missing role gets those of version 1."""
    name = f"user_{uuid.uuid4().hex}"
    with mongo.bare() as db:
        if rights == RUNTIME_1:
            privileges = [
                {"resource": {"db": mongo.name, "collection": collection}, "actions": actions}
                for collection, actions in RUNTIME_ACTIONS_1.items()
            ]
            db.command("createRole", RUNTIME_1[0], privileges=privileges, roles=[])
        db.command("createUser", name, pwd=PASSWORD, roles=rights)
    host = urlsplit(mongo.url).netloc.rpartition("@")[2]
    options = f"authSource={mongo.name}&directConnection=true"
    return MongoDatabase(f"mongodb://{name}:{PASSWORD}@{host}/?{options}", mongo.name)


def restore_version_1(mongo: MongoDatabase) -> None:
    """Restore what version 1 of the package wrote."""
    with mongo.bare() as db:
        for name, made in json_util.loads((VERSION_1 / "mongodb.json").read_text()).items():
            collection = db.create_collection(name, **made["options"])
            for index in made["indexes"]:
                options = {key: value for key, value in index.items() if key not in ("v", "key")}
                if index["name"] != "_id_":
                    collection.create_index(list(index["key"].items()), **options)
            if made["documents"]:
                collection.insert_many(made["documents"])
