"""MongoDB tells of changed tokens: a change stream, which a replica set has and a single server has not."""

from __future__ import annotations

from contextlib import suppress

from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from ..core.errors import StoreUnavailable
from ..core.listener import Listener
from .connection import MongoDBConnection

# How long the server holds a question back if there is nothing new. It answers at once if there is.
ANSWER_WITHIN = 250  # milliseconds
_ONLY_THAT = [{"$project": {"_id": 1}}]  # only that something has changed: no ciphertext, and no user


class ChangeStream(Listener):
    """Asks the server for changes of active tokens. pymongo finds the new primary after an election.

    Uses are counted in other documents, so a read is no change.

    Raises:
        StoreUnavailable, ConfigurationError: the server has no change streams, this user may not use them, or there is
            no server.
    """

    def __init__(self, connection: MongoDBConnection) -> None:
        self._connection = connection
        with connection.database() as db:
            # MongoDB tells only of what a majority has, and wants to be asked for that.
            tokens = db.active_tokens.with_options(read_concern=ReadConcern("majority"))
            self._stream = tokens.watch(_ONLY_THAT, max_await_time_ms=ANSWER_WITHIN)

    def wait(self) -> bool:
        with self._connection.database():
            changed = self._stream.try_next() is not None
        if not self._stream.alive:  # From now on, it would answer at once that there is nothing.
            raise StoreUnavailable(f"{self._connection.where} has ended its change stream: was a collection dropped?")
        return changed

    def close(self) -> None:
        with suppress(PyMongoError):  # There may be no server any more.
            self._stream.close()
