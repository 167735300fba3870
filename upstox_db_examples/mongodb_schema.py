"""The collections of the MongoDB store: what a document may hold, and by which index each query is answered."""

from __future__ import annotations

import logging
from typing import Any

from pymongo import ASCENDING, DESCENDING
from pymongo.database import Database
from pymongo.errors import OperationFailure

from .errors import ConfigurationError

__all__ = ["runtime_role"]  # what a reader calls; the rest is the MongoDB store's own

logger = logging.getLogger(__name__)

VERSION = 1
ALREADY_THERE = 48
OTHER_OPTIONS = (85, 86)

_TEXT_OR_NONE = {"bsonType": ["string", "null"]}
_NUMBER = {"bsonType": ["int", "long"], "minimum": 0}
_DATE = {"bsonType": "date"}


def _only(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    properties = {**required, **optional}
    schema = {"bsonType": "object", "required": list(required), "properties": properties, "additionalProperties": False}
    return {"$jsonSchema": schema}


VALIDATORS: dict[str, dict[str, Any]] = {
    # The one active token of a user is the one document with that user's id, so `_id` is the unique index that forbids
    # a second one. Only ciphertext is let in. A revoked token's document stays without it until it expires.
    "active_tokens": _only(
        {
            "_id": {"bsonType": "string"},
            "token_id": {"bsonType": "objectId"},
            "generation": _NUMBER,
            "created_at": _DATE,
            "expires_at": _DATE,
        },
        ciphertext={"bsonType": "string", "pattern": r"^v1\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+={0,2}$"},
        key_id={"bsonType": "string"},
        ended={"bsonType": "object"},
    ),
    # No field here is meant for a token.
    "tokens": _only(
        {
            "_id": {"bsonType": "objectId"},
            "user_id": {"bsonType": "string"},
            "generation": _NUMBER,
            "is_active": {"bsonType": "bool"},
            "created_at": _DATE,
            "expires_at": _DATE,
            "usage_count": _NUMBER,
            "last_used_at": {"bsonType": ["date", "null"]},
            "audit": {"bsonType": "array", "items": {"bsonType": "object"}},
        },
        user_name=_TEXT_OR_NONE,
        email=_TEXT_OR_NONE,
        broker=_TEXT_OR_NONE,
        user_type=_TEXT_OR_NONE,
        account=_TEXT_OR_NONE,
        products={"bsonType": "array"},
        exchanges={"bsonType": "array"},
        metadata={"bsonType": "object"},
    ),
}

INDEXES: dict[str, list[tuple[list[tuple[str, int]], dict[str, Any]]]] = {
    "active_tokens": [
        # The only index on this key. A plain one beside it is what made the guide's program fail with code 85.
        ([("expires_at", ASCENDING)], {"expireAfterSeconds": 0}),
        ([("key_id", ASCENDING)], {"sparse": True}),
    ],
    "tokens": [
        ([("user_id", ASCENDING), ("generation", DESCENDING)], {"unique": True}),
        ([("created_at", DESCENDING)], {}),
        ([("account", ASCENDING), ("created_at", DESCENDING), ("_id", DESCENDING)], {"sparse": True}),
        ([("is_active", ASCENDING), ("expires_at", ASCENDING)], {"partialFilterExpression": {"is_active": True}}),
        # Of the few records that hold audit entries. A further entry of the same user changes no index.
        ([("audit.user_id", ASCENDING)], {"sparse": True}),
    ],
    "token_audit": [
        ([("user_id", ASCENDING), ("performed_at", DESCENDING), ("_id", DESCENDING)], {}),
        ([("performed_at", ASCENDING)], {}),
    ],
}

# What a program needs that stores and reads tokens. It can drop nothing and delete no history.
RUNTIME_ACTIONS = {
    "active_tokens": ["find", "insert", "update", "remove"],
    "tokens": ["find", "insert", "update"],
    "token_audit": ["find", "insert"],
    "leases": ["find", "insert", "update", "remove"],
    "schema_version": ["find"],
}


def runtime_role(name: str, database_name: str = "upstox_db") -> dict[str, Any]:
    """The command that makes a role for such a program: `client[database_name].command(runtime_role("upstox_app"))`.

    Run it as an administrator, and open the store once as the owner, who makes the collections. Its audit entries can
    then only be added to, but for the last hundred uses of a token, which are inside its record: MongoDB knows no right
    to change one field and not another.
    """
    privileges = [
        {"resource": {"db": database_name, "collection": collection}, "actions": actions}
        for collection, actions in RUNTIME_ACTIONS.items()
    ]
    return {"createRole": name, "privileges": privileges, "roles": []}


def make_collections(db: Database[dict[str, Any]], where: str) -> None:
    """Make what is missing. Safe to repeat, to run at once, and to be cut off.

    Raises:
        ConfigurationError: the database holds another program's tokens, or a later version of this one's.
    """
    found = db.schema_version.find_one({"_id": "upstox"})
    version = found["version"] if found else 0
    if version == VERSION:
        return
    if version > VERSION:
        raise ConfigurationError(f"{where} has schema version {version}; this package knows {VERSION}. Upgrade it.")
    foreign = found is None and (db.tokens.find_one({}, {"_id": 1}) or db.token_audit.find_one({}, {"_id": 1}))
    if foreign and not db.schema_version.find_one({"_id": "upstox"}):  # Another opener may have made it meanwhile.
        raise ConfigurationError(
            f"{where} has a collection tokens that was made by another program and may hold plaintext tokens. Name "
            "another database."
        )
    for name in ("tokens", "token_audit"):
        if any("expireAfterSeconds" in index for index in db[name].list_indexes()):
            raise ConfigurationError(f"{where} has a TTL index on {name}, which would delete history. Drop it first.")
    # From here on these collections are ours, also if this is cut off before its end.
    db.schema_version.update_one({"_id": "upstox"}, {"$setOnInsert": {"version": 0}}, upsert=True)
    for name, validator in VALIDATORS.items():
        _make_collection(db, name, validator)
    for name, indexes in INDEXES.items():
        for keys, options in indexes:
            _make_index(db, name, keys, options, where)
    db.schema_version.update_one({"_id": "upstox"}, {"$max": {"version": VERSION}})
    logger.info("%s has schema version %s now", where, VERSION)


def _make_collection(db: Database[dict[str, Any]], name: str, validator: dict[str, Any]) -> None:
    try:
        db.command("create", name, validator=validator)
    except OperationFailure as error:
        if error.code != ALREADY_THERE:
            raise
        db.command("collMod", name, validator=validator)


def _make_index(
    db: Database[dict[str, Any]], name: str, keys: list[tuple[str, int]], options: dict[str, Any], where: str
) -> None:
    try:
        db[name].create_index(keys, **options)
    except OperationFailure as error:
        if error.code not in OTHER_OPTIONS:
            raise
        if "expireAfterSeconds" not in options:
            raise ConfigurationError(
                f"{where} has another index on {', '.join(key for key, _ in keys)} of {name}. Drop it, and open the "
                "store again."
            ) from error
        # A plain index, or a TTL of another length, is turned into ours where it stands.
        db.command("collMod", name, index={"keyPattern": dict(keys), **options})
        logger.warning("%s had an index on %s of %s, which is a TTL now", where, ", ".join(dict(keys)), name)
