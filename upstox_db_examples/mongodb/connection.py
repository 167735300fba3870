"""A connection to MongoDB. Each call has a time limit, each error becomes one of ours, and the URL never shows."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pymongo
from bson.errors import BSONError
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    DuplicateKeyError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)
from pymongo.errors import ConfigurationError as DriverConfigurationError
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

from ..core.addresses import read_url
from ..core.errors import ConfigurationError, StorageError, StoreUnavailable
from ..core.token import Secret

logger = logging.getLogger(__name__)

Document = dict[str, Any]


class MongoDBConnection:
    """pymongo's client and its pool, shared by the threads of a process.

    Args:
        url: as `pymongo.MongoClient` takes it.
        name: the database.
        timeout: seconds for everything in one `with database()`, including the election of a new primary.

    Attributes:
        overridden: the options of the URL that do not hold, and what holds instead.

    Raises:
        ConfigurationError: the URL or the name is invalid.
    """

    def __init__(self, url: Secret, name: str, timeout: float) -> None:
        self._url = url = read_url(
            url, ("mongodb", "mongodb+srv"), "The address of MongoDB", "mongodb://user:password@host/"
        )
        self._name = name
        self._timeout = timeout
        self._closed = False
        self.where = _describe(url, name)
        self.overridden = _overridden(url)
        self._connect()
        if self.overridden:
            # Not what the URL says: a part of a password that is not escaped could stand there.
            told = ", ".join(f"{option} is {value}" for option, value in self.overridden.items())
            logger.warning("The URL of %s says something else, but for this store %s.", self.where, told)

    @contextmanager
    def database(self) -> Iterator[Database[Document]]:
        """Lend the database for one call.

        Raises:
            StoreUnavailable, ConfigurationError: pymongo raised an error inside; this is its translation.
        """
        if self._closed:
            raise StoreUnavailable("This store is closed.")
        if self._process != os.getpid():  # A forked child must neither use nor close the parent's connections.
            self._inherited = self._client
            self._connect()
        try:
            with pymongo.timeout(self._timeout):
                yield self._db
        except (PyMongoError, BSONError) as error:
            _forget_frames(error)
            raise _translate_error(error, self.where, self._timeout) from error
        except StorageError as error:
            _forget_frames(error.__cause__)
            raise
        except RuntimeError as error:
            if "new thread" not in str(error):
                raise
            _forget_frames(error)
            raise self._no_thread() from error

    def close(self) -> None:
        # Only once: a second time, pymongo fails on what was freed since, such as the cursor of a watch.
        before, self._closed = self._closed, True
        if not before and self._process == os.getpid():
            self._client.close()

    def _no_thread(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"pymongo cannot start a thread for {self.where}: the program is ending, or has too many threads. "
            "Use the store earlier, or fewer threads."
        )

    def _connect(self) -> None:
        try:  # pymongo hides that its threads cannot start, and then finds no server.
            threading.Thread(target=int).start()
        except RuntimeError as error:
            raise self._no_thread() from error
        client: MongoClient[Document] | None = None
        try:
            # Without these two, an election is an error to each caller instead of a wait.
            retries: dict[str, Any] = {"retryWrites": True, "retryReads": True}
            client = MongoClient(self._url.reveal(), tz_aware=True, tzinfo=UTC, appname="upstox_db_examples", **retries)
            # These override the URL and the server's defaults: a secondary may not know yet that a token was revoked,
            # and a write that only one server has can be lost.
            self._db = client.get_database(
                self._name,
                read_preference=ReadPreference.PRIMARY,
                write_concern=WriteConcern(w="majority", j=True),
                read_concern=ReadConcern("local"),
            )
            # The database that the URL names stays the one that knows the user, unless there is an authSource.
            named = client.get_default_database(self._name).name
            self._client, self._process = client, os.getpid()
            logger.debug("Opened a client for %s", self.where)
            if named not in (self._name, "admin"):  # Everybody who names admin means the user's database.
                self.overridden["database"] = self._name
            return
        except (PyMongoError, ValueError, TypeError):
            if client:
                client.close()
        # We raise out here, so that our error has no cause that shows the URL.
        raise ConfigurationError(f"pymongo cannot use the database {self.where}. Check the URL and the name.")


def _overridden(url: Secret) -> dict[str, str]:
    """Return which options of the URL do not hold, and what holds instead. See `_connect`."""
    given = {name.lower(): value.lower() for name, value in parse_qsl(url.reveal().rpartition("?")[2])}
    ours = {"w": "majority", "journal": "true", "readPreference": "primary", "readConcernLevel": "local"}
    ours |= {"retryWrites": "true", "retryReads": "true"}
    return {name: value for name, value in ours.items() if given.get(name.lower(), value) != value}


def _describe(url: Secret, name: str) -> str:
    """Say where the database is, without any password."""
    try:
        if url.reveal().startswith("mongodb+srv://"):  # DNS has the hosts.
            return f"{urlsplit(url.reveal()).hostname}/{name}"
        hosts = parse_uri(url.reveal(), validate=False)["nodelist"]
        return ",".join(f"{host}:{port}" for host, port in hosts) + f"/{name}"
    except (PyMongoError, ValueError, TypeError, AttributeError):
        pass  # This error may hold the password. We raise ours below, so that it has no cause.
    raise ConfigurationError(
        "MongoDB cannot read the connection string. Use one such as mongodb://user:password@host/. Escape special "
        "characters in the password with urllib.parse.quote_plus."
    )


def _forget_frames(error: BaseException | None) -> None:
    """Drop pymongo's frames. They hold credentials and documents, and a traceback with locals would show them."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


_TRANSLATIONS: dict[int, tuple[type[StorageError], str]] = {
    13: (
        ConfigurationError,
        "does not allow this user to do that. Grant it readWrite on the database. If it has a runtime role, the owner "
        "of the database has to update that role: upstox-db init --runtime-role ROLE",
    ),
    18: (ConfigurationError, "refused the user or its password. Check both."),
    121: (StoreUnavailable, "has a validator that refused the document. Check whether somebody changed the validator."),
    13297: (
        ConfigurationError,
        "has a database whose name differs only in upper and lower case. Write database_name as it is there.",
    ),
    8000: (ConfigurationError, "refused the user or its password (Atlas). Check both."),
    **dict.fromkeys(
        (11, 33, 334),
        (
            ConfigurationError,
            "cannot authenticate this user in this way. Check the user, authSource and authMechanism.",
        ),
    ),
    **dict.fromkeys(
        (73, 166, 26),
        (
            ConfigurationError,
            "has no usable collection for this: check database_name, and whether somebody made a view.",
        ),
    ),
    **dict.fromkeys(
        (67, 68, 85, 86),
        (
            ConfigurationError,
            "has an index of another shape on a collection of this package. Drop that index, then run upstox-db init.",
        ),
    ),
    **dict.fromkeys(
        (59, 115, 323, 352),
        (ConfigurationError, "does not know a command that this package needs. It needs MongoDB 6.0 or newer."),
    ),
    **dict.fromkeys(
        (79, 100),
        (ConfigurationError, "cannot confirm a write by a majority. Check the members of the replica set."),
    ),
    14031: (StoreUnavailable, "has a full disk. Free some space and try again."),
}


def index_keys(error: DuplicateKeyError) -> tuple[str, ...]:
    """Return the keys of the unique index that refused a document."""
    return tuple((error.details or {}).get("keyPattern", {}))


def _translate_error(error: Exception, where: str, timeout: float) -> StorageError:
    code = getattr(error, "code", None)
    if isinstance(error, BulkWriteError):  # Its own code only says that one of the writes failed.
        code = next((each.get("code") for each in error.details.get("writeErrors", ())), code)
    if code in _TRANSLATIONS:
        kind, what = _TRANSLATIONS[code]
        return kind(f"MongoDB at {where} {what}")
    if isinstance(error, DuplicateKeyError):
        return ConfigurationError(
            f"MongoDB at {where} has a unique index on {', '.join(index_keys(error))} that this package did not make "
            "and that refuses this document. Drop that index."
        )
    if "certificate has expired" in str(error):
        return ConfigurationError(
            f"MongoDB at {where} failed the TLS check, because its certificate has expired. Give the server a new one."
        )
    if "certificate" in str(error):
        return ConfigurationError(
            f"MongoDB at {where} failed the TLS check. Fix its certificate, its host name, or the authority in "
            "tlsCAFile. Without the check, somebody else could be listening."
        )
    if isinstance(error, OperationFailure) and not error.timeout:
        return StoreUnavailable(
            f"MongoDB at {where} reported an error (code {code}). Try again. If it comes back, look that code up."
        )
    if isinstance(error, DriverConfigurationError | InvalidURI):
        return ConfigurationError(f"pymongo cannot use {where} in this way. Check the host and the options of the URL.")
    if isinstance(error, WaitQueueTimeoutError):
        return StoreUnavailable(f"All connections to {where} were in use for {timeout:g} s. Try again.")
    if isinstance(error, ServerSelectionTimeoutError) and "replica set name" in str(error):
        return ConfigurationError(f"MongoDB at {where} is no member of the replica set that the URL names. Check both.")
    return StoreUnavailable(
        f"MongoDB at {where} cannot be reached, or gave no answer for {timeout:g} s. Check that it is running, "
        "then try again."
    )
