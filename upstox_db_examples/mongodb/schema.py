"""The collections of the MongoDB store: what a document may hold, and which index answers each query."""

from __future__ import annotations

import logging
from typing import Any

from pymongo import ASCENDING, DESCENDING
from pymongo.database import Database
from pymongo.errors import OperationFailure

from ..core.errors import ConfigurationError

__all__ = ["runtime_role"]  # for callers; the rest belongs to the MongoDB store

logger = logging.getLogger(__name__)

# Never change what a released version made. A later version only adds, because older programs may still be running.
SCHEMA_VERSION = 2
UNAUTHORIZED = 13
ALREADY_THERE = 48
ROLE_ALREADY_THERE = 51002
BAD_ROLE_NAMES = (2, 73)
OTHER_OPTIONS = (85, 86)
DIFFERS_IN_CASE = 13297

_TEXT_OR_NONE = {"bsonType": ["string", "null"]}
_NUMBER = {"bsonType": ["int", "long"], "minimum": 0}
_DATE = {"bsonType": "date"}
_DATE_OR_NONE = {"bsonType": ["date", "null"]}


def _only(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    properties = {**required, **optional}
    schema = {"bsonType": "object", "required": list(required), "properties": properties, "additionalProperties": False}
    return {"$jsonSchema": schema}


VALIDATORS: dict[str, dict[str, Any]] = {
    # A user's active token is the document with that user's id, so the unique index on `_id` forbids a second one. The
    # pattern lets only ciphertext in. A revoked token's document stays, without ciphertext, until it expires.
    "active_tokens": _only(
        {
            "_id": {"bsonType": "string"},
            "token_id": {"bsonType": "objectId"},
            "generation": _NUMBER,
            "created_at": _DATE,
            "expires_at": _DATE,
        },
        ciphertext={"bsonType": "string", "pattern": r"^v[12]\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+={0,2}$"},
        key_id={"bsonType": "string"},
        ended={"bsonType": "object"},
        account=_TEXT_OR_NONE,
        issued_at=_DATE_OR_NONE,
        # The mark of a login names the lease that it holds. It is empty if nobody can ever say how that login ended.
        login={
            "bsonType": "object",
            "properties": {"lock": {"bsonType": "string"}, "owner": {"bsonType": "string"}},
            "additionalProperties": False,
        },
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
            "last_used_at": _DATE_OR_NONE,
            "audit": {"bsonType": "array", "items": {"bsonType": "object"}},
        },
        user_name=_TEXT_OR_NONE,
        email=_TEXT_OR_NONE,
        broker=_TEXT_OR_NONE,
        user_type=_TEXT_OR_NONE,
        account=_TEXT_OR_NONE,
        issued_at=_DATE_OR_NONE,
        products={"bsonType": "array"},
        exchanges={"bsonType": "array"},
        metadata={"bsonType": "object"},
    ),
    "login_notes": _only({"_id": {"bsonType": "string"}, "sealed": {"bsonType": "string"}}),
}

INDEXES: dict[str, list[tuple[list[tuple[str, int]], dict[str, Any]]]] = {
    "active_tokens": [
        # This is the only index on this key. The guide's program made a plain one as well, and failed with code 85.
        ([("expires_at", ASCENDING)], {"expireAfterSeconds": 0}),
        ([("key_id", ASCENDING)], {"sparse": True}),
        ([("account", ASCENDING), ("created_at", DESCENDING)], {}),
        ([("login.lock", ASCENDING)], {"sparse": True}),
    ],
    "tokens": [
        ([("user_id", ASCENDING), ("generation", DESCENDING)], {"unique": True}),
        ([("created_at", DESCENDING)], {}),
        ([("is_active", ASCENDING), ("expires_at", ASCENDING)], {"partialFilterExpression": {"is_active": True}}),
        # This covers the few records that hold audit entries. Another entry of the same user changes no index.
        ([("audit.user_id", ASCENDING)], {"sparse": True}),
    ],
    "token_audit": [
        ([("user_id", ASCENDING), ("performed_at", DESCENDING), ("_id", DESCENDING)], {}),
        ([("performed_at", ASCENDING)], {}),
        # This covers logins only, because there may be a million uses between two logins.
        ([("performed_at", DESCENDING)], {"partialFilterExpression": {"action": "login"}}),
    ],
}

# The rights of a program that stores and reads tokens. It cannot drop anything or delete history.
RUNTIME_ACTIONS = {
    "active_tokens": ["find", "insert", "update", "remove", "changeStream"],
    "tokens": ["find", "insert", "update"],
    "token_audit": ["find", "insert"],
    "leases": ["find", "insert", "update", "remove"],
    "login_notes": ["find", "insert", "update", "remove"],
    "schema_version": ["find"],
}


def runtime_role(name: str, database_name: str = "upstox_db") -> dict[str, Any]:
    """Return the command that makes a role with the least rights that storing and reading tokens need.

    Run `client[database_name].command(runtime_role("upstox_app"))` as an administrator, and open the store once as the
    owner, to make the collections. Or let the store's `init_database(runtime_role="upstox_app")` do both. The role can
    then only add audit entries. The last hundred uses of a token are an exception, because they are inside its record:
    MongoDB has no rights for single fields.
    """
    privileges = [
        {"resource": {"db": database_name, "collection": collection}, "actions": actions}
        for collection, actions in RUNTIME_ACTIONS.items()
    ]
    return {"createRole": name, "privileges": privileges, "roles": []}


def make_runtime_role(db: Database[dict[str, Any]], name: str, where: str) -> None:
    """Make the role, or add the rights that it lacks.

    Raises:
        ConfigurationError: the name is not valid for a role, or this user may not grant it.
    """
    making = runtime_role(name, db.name)
    try:
        try:
            db.command(making)
        except OperationFailure as error:
            if error.code != ROLE_ALREADY_THERE:
                raise
            # Not updateRole, because only a user who can revoke roles in all databases may call it.
            db.command("grantPrivilegesToRole", name, privileges=making["privileges"])
    except OperationFailure as error:
        if error.code in BAD_ROLE_NAMES:
            raise ConfigurationError(f"{name!r} is not a valid role name at {where}. Choose another one.") from error
        if error.code == UNAUTHORIZED:
            raise ConfigurationError(
                f"{where} does not allow this user to make the role {name}. Run this as the owner, with dbOwner on the "
                "database."
            ) from error
        raise
    logger.info("The role %s may store and read tokens in %s", name, where)


def make_collections(db: Database[dict[str, Any]], where: str) -> None:
    """Make what is missing, and upgrade what an earlier version made.

    This is safe to repeat, to run concurrently, and to interrupt.

    Raises:
        ConfigurationError: the database holds another program's tokens or a later schema version, or this user may
            not change it.
    """
    found = db.schema_version.find_one({"_id": "upstox"})
    version = found["version"] if found else 0
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{where} has schema version {version}, but this package knows {SCHEMA_VERSION}. Upgrade it."
        )
    if found is None:
        refuse_another_case(db, where)
    try:
        _make_all(db, where, is_ours=found is not None)
    except OperationFailure as error:
        if error.code == DIFFERS_IN_CASE:  # and this user may not see the other database
            raise ConfigurationError(_ANOTHER_CASE.format(where=where, name="one")) from error
        if error.code != UNAUTHORIZED:
            raise
        raise ConfigurationError(
            f"{where} has schema version {version}, but this package needs {SCHEMA_VERSION}, and this user may not "
            "upgrade it. The owner of the database, with dbOwner on it, has to run: upstox-db init --runtime-role ROLE"
        ) from error
    logger.info("%s now has schema version %s", where, SCHEMA_VERSION)


_ANOTHER_CASE = (
    "{where}: the server has {name} whose name differs only in upper and lower case, and MongoDB allows only one of "
    "them. Check the name of the database."
)


def refuse_another_case(db: Database[dict[str, Any]], where: str) -> None:
    """
    Raises:
        ConfigurationError: another database has this name, except for upper and lower case.
    """
    for name in db.client.list_database_names():
        if name != db.name and name.lower() == db.name.lower():
            raise ConfigurationError(_ANOTHER_CASE.format(where=where, name=f"the database {name}"))


def _make_all(db: Database[dict[str, Any]], where: str, *, is_ours: bool) -> None:
    foreign = not is_ours and (db.tokens.find_one({}, {"_id": 1}) or db.token_audit.find_one({}, {"_id": 1}))
    if foreign and not db.schema_version.find_one({"_id": "upstox"}):  # Another process may have made it meanwhile.
        raise ConfigurationError(
            f"{where} has a collection tokens that was made by another program and may hold plaintext tokens. Choose "
            "another database."
        )
    for name in ("tokens", "token_audit"):
        if any("expireAfterSeconds" in index for index in db[name].list_indexes()):
            raise ConfigurationError(f"{where} has a TTL index on {name}, which would delete history. Drop it first.")
    # From here on these collections are ours, even if this is interrupted.
    db.schema_version.update_one({"_id": "upstox"}, {"$setOnInsert": {"version": 0}}, upsert=True)
    for name, validator in VALIDATORS.items():
        _make_collection(db, name, validator)
    for name, indexes in INDEXES.items():
        for keys, options in indexes:
            _make_index(db, name, keys, options, where)
    db.schema_version.update_one({"_id": "upstox"}, {"$max": {"version": SCHEMA_VERSION}})


def _make_collection(db: Database[dict[str, Any]], name: str, validator: dict[str, Any]) -> None:
    try:
        db.command("create", name, validator=validator)
    except OperationFailure as error:
        if error.code != ALREADY_THERE:
            raise
        # If several processes start at once, all but one get here. They may have the right to create, not to change.
        if db[name].options().get("validator") != validator:
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
                f"{where} has another index on {', '.join(key for key, _ in keys)} of {name}. Drop it, then open the "
                "store again."
            ) from error
        # Turn a plain index, or a TTL of another length, into ours in place.
        db.command("collMod", name, index={"keyPattern": dict(keys), **options})
        logger.warning("%s: the index on %s of %s is now a TTL index of ours", where, ", ".join(dict(keys)), name)
