"""A lease allows one holder at a time. MongoDB needs one, because it has no lock that dies with its holder."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any

from pymongo import UpdateOne
from pymongo.database import Database
from pymongo.write_concern import WriteConcern

from ..core.errors import StorageError, StoreUnavailable, TokenNotStored
from ..core.forks import start_anew_in_children
from ..core.locks import LocalLocks, lock_timeout
from .renewals import Lease, Renewals

logger = logging.getLogger(__name__)

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
# For writes that need not be waited for. A journal and an oplog keep the order of writes, so a later write that is
# waited for brings the earlier ones along, unless the server died or another became the primary in between. Where that
# matters, look again after the later write: what is still there was written before it. A release that is lost only
# means that the lease ends by itself.
SOON = WriteConcern(w=1)
TAKEN_OVER = "This took so long that another caller took over. Nothing was changed. Try again."


class _Holding(threading.local):
    """What this thread holds: its leases, the outer one first, and the owner ids by name of the last ones it held."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.owners: dict[str, str] = {}


class Leases:
    """Leases in the collection `leases`. Only the server's clock counts, because the clocks of two machines differ.

    A holder renews its lease as long as it lives. If it is stopped or cut off from the server for longer than the
    lease, it may lose the lease without knowing. So the generation that a login writes tells it apart from another
    login. Any step without a generation first proves that the lease is still held: see `prove_held`.

    Args:
        database: returns the database.
        seconds: how long a lease lasts after its holder dies.
    """

    def __init__(
        self, database: Callable[[], AbstractContextManager[Database[dict[str, Any]]]], seconds: float
    ) -> None:
        self._database = database
        self._seconds = seconds
        self._local_locks = LocalLocks()
        self._renewals = Renewals(self._renew_each, self._release, seconds)
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        self._holding = _Holding()  # A child that is forked during a login takes no part in it.
        self._renewals.start_anew()

    @contextmanager
    def hold(self, name: str, wait: float) -> Iterator[None]:
        """Hold the lease of this name.

        Raises:
            StoreUnavailable: the lease did not become free within `wait` seconds.
        """
        deadline = time.monotonic() + wait
        with self._local_locks.hold(name, wait):
            lease = Lease(name, uuid.uuid4().hex)
            while not self._take(lease):
                if time.monotonic() >= deadline:
                    raise lock_timeout(name, wait)
                time.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - spreads a crowd's requests
            outer, process = self._holding.leases, os.getpid()
            self._holding.leases = [*outer, lease]
            # Of earlier leases nothing is kept, because an import takes one for each user.
            self._holding.owners = dict(self._holding.leases)
            unanswered = False
            try:
                try:
                    self._renewals.add(lease)
                except RuntimeError as error:
                    self._release(lease)
                    raise StoreUnavailable(
                        "The thread that keeps this login's lease cannot be started: the program is ending, or has too "
                        "many threads. Log in earlier, or with fewer threads."
                    ) from error
                yield
            except (StoreUnavailable, TokenNotStored):
                # The server may still not answer, and this caller has waited long enough. So the other thread releases
                # the lease. If we just let it expire, a login that is over would look as if it were still running.
                unanswered = True
                raise
            finally:
                if process == os.getpid():  # Otherwise this is a child that was forked meanwhile.
                    self._holding.leases = outer
                    self._renewals.remove(lease, release=unanswered)
                    if not unanswered:
                        self._release(lease)

    def owner_of(self, name: str) -> str:
        """Return the owner of this thread's current or last lease of this name, or "", which owns no lease.

        This works after the lease has ended, until the thread takes the next one, so that a login that outlived its
        lease removes only its own marks.
        """
        return self._holding.owners.get(name, "")

    def lives(self, db: Database[dict[str, Any]], lock: str, owner: str) -> bool:
        """Tell whether this owner holds the lease of this name, by the server's clock."""
        alive = {"$expr": {"$gt": ["$until", "$$NOW"]}}
        return db.leases.find_one({"_id": lock, "owner": owner, **alive}, {"_id": 1}) is not None

    def held(self) -> dict[str, str]:
        """Return the owners of the leases that this thread has taken and not given back, by their names."""
        return dict(self._holding.leases)

    def prove_held(self, write_concern: WriteConcern | None = None) -> None:
        """Check the leases just before anything that must not happen twice.

        That is a login, or writing back what was read under the lease. Afterwards the lease is durable, too.

        Args:
            write_concern: `SOON` if the caller waits for a later write and looks again.

        Raises:
            StoreUnavailable: another caller has taken over a lease of this thread.
        """
        if not all(self._renew(lease, write_concern) for lease in self._holding.leases):
            raise StoreUnavailable(TAKEN_OVER)

    def _take(self, lease: Lease) -> bool:
        """Take the lease if it is free. This is one atomic change, by the server's clock ($$NOW)."""
        free = {"$lte": [{"$ifNull": ["$until", LONG_AGO]}, "$$NOW"]}
        with self._database() as db:
            taken = db.leases.with_options(write_concern=SOON).update_one(
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
            )
        return taken.upserted_id is not None or taken.modified_count == 1

    def _renew(self, lease: Lease, write_concern: WriteConcern | None = None) -> bool:
        with self._database() as db:
            leases, renewal = db.leases.with_options(write_concern=write_concern), [{"$set": {"until": self._until()}}]
            return leases.update_one({"_id": lease.name, "owner": lease.owner}, renewal).matched_count == 1

    def _renew_each(self, leases: Collection[Lease]) -> list[Lease]:
        renewal = [{"$set": {"until": self._until()}}]
        with self._database() as db:
            each = [UpdateOne({"_id": lease.name, "owner": lease.owner}, renewal) for lease in leases]
            if db.leases.bulk_write(each, ordered=False).matched_count == len(leases):
                return []
            held = {found["owner"] for found in db.leases.find({"_id": {"$in": [lease.name for lease in leases]}})}
            return [lease for lease in leases if lease.owner not in held]

    def _release(self, lease: Lease) -> None:
        try:
            with self._database() as db:
                db.leases.with_options(write_concern=SOON).delete_one({"_id": lease.name, "owner": lease.owner})
        except StorageError as error:
            logger.warning("The lease of %s is not released and stays up to %g s: %s", lease.name, self._seconds, error)

    def _until(self) -> dict[str, Any]:
        return {"$add": ["$$NOW", int(self._seconds * 1000)]}
