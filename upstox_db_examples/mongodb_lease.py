"""One holder at a time, where the database has no lock that dies with its holder: a lease."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pymongo import ReturnDocument
from pymongo.database import Database

from .backend import lock_not_had
from .errors import LoginSuperseded, StorageError, StoreUnavailable, TokenNotStored

logger = logging.getLogger(__name__)

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class _Lease(NamedTuple):
    name: str
    owner: str


class Leases:
    """Leases in the collection `leases`. Only the server's clock counts, for those of two machines differ.

    A holder renews its lease as long as it lives. One that was stopped, or cut off from the server, for longer than
    the lease may lose it without knowing; so what it writes must be refused by what it writes to: see `prove_held`.

    Args:
        database: gives the database.
        seconds: how long a lease lasts after its holder's death.
    """

    def __init__(
        self, database: Callable[[], AbstractContextManager[Database[dict[str, Any]]]], seconds: float
    ) -> None:
        self._database = database
        self._seconds = seconds
        self._local_locks: dict[tuple[int, str], threading.Lock] = {}
        self._holding = threading.local()

    @contextmanager
    def held(self, name: str, wait: float) -> Iterator[None]:
        """
        Raises:
            StoreUnavailable: not had within `wait` seconds.
        """
        deadline = time.monotonic() + wait
        waited = lock_not_had(name, wait)
        # Of the threads of a process only one asks the server.
        # (By process, for a forked child may inherit a lock that its parent's thread holds.)
        local = self._local_locks.setdefault((os.getpid(), name), threading.Lock())
        if not local.acquire(timeout=wait):
            raise waited
        try:
            lease = _Lease(name, uuid.uuid4().hex)
            while not self._take(lease):
                if time.monotonic() >= deadline:
                    raise waited
                time.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - so that a crowd does not ask all at once
            outer: list[_Lease] = getattr(self._holding, "leases", [])
            self._holding.leases = [*outer, lease]
            released = threading.Event()
            renewing = threading.Thread(target=self._renew_until, args=(released, lease), daemon=True)
            answers = True
            try:
                renewing.start()
                yield
            except (StoreUnavailable, TokenNotStored):
                answers = False
                raise
            finally:
                self._holding.leases = outer
                released.set()  # A renewal that is under way finds another owner, or none.
                if answers:  # Else this would only wait once more, and the lease ends by itself.
                    self._release(lease)
        finally:
            local.release()

    def prove_held(self) -> None:
        """To be called just before a write whose generation was read under the lease.

        Whoever took the lease over before this call had not written yet when that generation was read, or is found
        out here; whoever takes it over afterwards writes a later generation.

        Raises:
            LoginSuperseded: another caller has taken a lease of this thread over.
        """
        if not all(self._renew(lease) for lease in getattr(self._holding, "leases", [])):
            raise LoginSuperseded(
                "This login took so long that another caller took over. Read the token that it stored."
            )

    def _take(self, lease: _Lease) -> bool:
        """The lease, if it is free. One atomic change, by the server's clock ($$NOW)."""
        free = {"$lte": [{"$ifNull": ["$until", LONG_AGO]}, "$$NOW"]}
        with self._database() as db:
            after = db.leases.find_one_and_update(
                {"_id": lease.name},
                [
                    {"$set": {"free": free}},
                    {
                        "$set": {
                            "owner": {"$cond": ["$free", lease.owner, "$owner"]},
                            "until": {"$cond": ["$free", self._until(), "$until"]},
                        }
                    },
                    {"$unset": "free"},
                ],
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        return after is not None and bool(after["owner"] == lease.owner)

    def _renew(self, lease: _Lease) -> bool:
        with self._database() as db:
            renewal = [{"$set": {"until": self._until()}}]
            return db.leases.update_one({"_id": lease.name, "owner": lease.owner}, renewal).matched_count == 1

    def _renew_until(self, released: threading.Event, lease: _Lease) -> None:
        pause = self._seconds / 3
        while not released.wait(pause):
            try:
                if not self._renew(lease):
                    if not released.is_set():
                        logger.warning("Another caller has taken the lease of %s over", lease.name)
                    return
                pause = self._seconds / 3
            except StorageError as error:
                logger.warning("The lease of %s is not renewed: %s", lease.name, error)
                pause = self._seconds / 30  # Soon again, while it can still succeed; if not, the write is refused.

    def _release(self, lease: _Lease) -> None:
        try:
            with self._database() as db:
                db.leases.delete_one({"_id": lease.name, "owner": lease.owner})
        except StorageError as error:
            logger.warning("The lease of %s stays for up to %g s: %s", lease.name, self._seconds, error)

    def _until(self) -> dict[str, Any]:
        return {"$add": ["$$NOW", int(self._seconds * 1000)]}
