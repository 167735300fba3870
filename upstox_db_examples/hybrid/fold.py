"""Fold the uses that wait in Redis into PostgreSQL: each exactly once, even if a process is killed meanwhile."""

from __future__ import annotations

import logging
import threading
from typing import Any

from ..core.errors import StorageError
from ..core.forks import start_anew_in_children
from ..postgresql.connections import PostgreSQLConnections
from . import queries
from .redis import RedisTokens
from .uses import Use

logger = logging.getLogger(__name__)

FOLD_AT = 500  # waiting uses in Redis
USES_AT_ONCE = 500  # in one message to PostgreSQL


class Fold:
    """Copies uses from Redis to PostgreSQL. The caller knows which database this is.

    Uses that PostgreSQL does not confirm, because it has no such token of this user, are dropped.
    """

    def __init__(self, connections: PostgreSQLConnections, redis: RedisTokens) -> None:
        self._run, self._redis = connections.run, redis
        self._earlier_after = "-"
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        self._folding = threading.Lock()

    def all_uses(self) -> int:
        """Fold all uses, and return how many were new in PostgreSQL."""
        return self.waiting_uses() + self._earlier_uses()

    def waiting_uses(self) -> int:
        """Do the same, but leave what an earlier version left in Redis."""
        folded = 0
        while uses := self._redis.list_uses(USES_AT_ONCE):
            known = self._confirmed(uses)
            if len(known) < len(uses):
                logger.warning("Dropping %s uses of tokens that PostgreSQL does not know.", len(uses) - len(known))
            folded += self.put(known)
            self._redis.forget_uses(uses)
            if len(uses) < USES_AT_ONCE:
                break
        return folded

    def quietly(self) -> None:
        """Fold the waiting uses. If somebody else is folding, or PostgreSQL does not answer, they keep waiting.

        Those of an earlier version wait until somebody asks for a history or the statistics.
        """
        if self._folding.acquire(blocking=False):
            try:
                self.waiting_uses()
            except StorageError as error:
                logger.warning("Use counts stay in Redis for now: %s", error)
            finally:
                self._folding.release()

    def _earlier_uses(self) -> int:
        """Fold the uses that an earlier version left in Redis. Its keys named no database, so they may be another's.

        Those that PostgreSQL does not confirm stay there, for the database whose they are.
        """
        folded = 0
        while True:
            uses, after = self._redis.list_earlier_uses(self._earlier_after, USES_AT_ONCE)
            if after == self._earlier_after:
                return folded
            known = self._confirmed(uses)
            if known:
                folded += self.put(known)
                self._redis.forget_uses(known, earlier=True)
            self._earlier_after = after

    def put(self, uses: list[Use]) -> int:
        """Put these uses into PostgreSQL, and return how many were new there."""
        return sum(row["uses"] for row in self._run(queries.FOLD, **_columns(uses))) if uses else 0

    def _confirmed(self, uses: list[Use]) -> list[Use]:
        """Return the uses that PostgreSQL confirms: it has the token, of this user, and it was alive then."""
        return [uses[row["nth"] - 1] for row in self._run(queries.CONFIRMED, **_columns(uses))] if uses else []


def _columns(uses: list[Use]) -> dict[str, list[Any]]:
    return {
        "tokens": [use.token for use in uses],
        "users": [use.user for use in uses],
        "actors": [use.actor for use in uses],
        "times": [use.at.isoformat() for use in uses],
        "uses": [use.use_id for use in uses],
    }
