"""Pattern 3: MongoDB with a TTL. Ciphertexts disappear by themselves, and history stays."""

from __future__ import annotations

import weakref
from datetime import datetime
from typing import Any, ClassVar, Unpack

from pymongo import DESCENDING

from ..core.checks import require_aware, require_positive
from ..core.errors import InvalidInput
from ..core.settings import Options, Settings
from ..core.store import TokenStorage
from ..core.token import Secret
from .backend import MongoBackend
from .connection import MongoDBConnection
from .documents import format_record, not_revoked


class MongoUpstoxStorage(TokenStorage):
    """Tokens in MongoDB 6.0 or newer, a replica set or a single server.

    There are three main collections. `active_tokens` has one document per user, and its `_id` is the user's id. It
    holds the ciphertext and, while a login may have replaced the token at Upstox, that login's mark. A TTL index
    removes it when the token dies. `tokens` has one record per token, without the ciphertext. The record holds the
    audit entries of the token's last uses; older entries are in `token_audit`. (The other collections are `leases`,
    `login_notes` and `schema_version`.)

    One atomic change of the document in `active_tokens` replaces the token. Everything else is written before that, or
    can be caught up later. So nothing is wrong if a client or a server dies between two writes, and no transaction is
    needed. A write is acknowledged once a majority of the replica set has it in its journal. A single server uses its
    own journal; there the driver does not retry a write whose answer was lost.

    Args:
        connection_string: a `mongodb://` or `mongodb+srv://` URL, as `pymongo.MongoClient` takes it. What it says about
            w, journal, readPreference, readConcernLevel, retryWrites and retryReads does not hold: the store sets them.
        database_name: the database, whatever the URL names. (A database in the URL is where MongoDB looks for the user,
            unless there is an authSource.) `get_storage_status` lists what of the URL does not hold.
        timeout: seconds for each step, including the election of a new primary. A read is one step, and a login is a
            few.
        lease: if a process dies during a login, another caller may log the same user in after this many seconds. A
            login that takes longer keeps its lease.
        options: see `Options`.

    Raises:
        ConfigurationError: the URL or the database is not usable.
        StoreUnavailable: the server cannot be reached.

    Example:
        >>> from upstox_db_examples import MongoUpstoxStorage
        >>> with MongoUpstoxStorage("mongodb://user:password@host/", "upstox_db") as storage:
        ...     result = storage.get_or_create_token("AB1234")
        ...     storage.get_user_dashboard("AB1234")["active_token"]["exists"]
        True
    """

    backend: MongoBackend
    backend_class: ClassVar = MongoBackend

    def __init__(
        self,
        connection_string: str,
        database_name: str = "upstox_db",
        *,
        timeout: float = 5.0,
        lease: float = 10.0,
        **options: Unpack[Options],
    ) -> None:
        url = Secret(connection_string)
        del connection_string  # A traceback that prints local variables must not show its password.
        require_positive("timeout", timeout)
        require_positive("lease", lease)
        settings = Settings(type(self).__name__, options)
        self._connection = MongoDBConnection(url, database_name, timeout)
        # As in the guide, you need not close a store.
        weakref.finalize(self, self._connection.close)
        super().__init__(self.backend_class(self._connection, lease, settings.context), settings)

    def get_user_dashboard(self, user_id: str) -> dict[str, Any]:
        """Return everything about a user in one JSON-friendly dict, without the token.

        Returns:
            `user_id`; `statistics` (`total_tokens`, `active_tokens`, `total_usage`, `avg_usage`, `last_generation`,
            `last_usage`); `recent_activity`, the last ten audit entries; `active_token` (`exists`, `expires_at`,
            `usage_count`). Times are ISO text in UTC. An unknown user has zeros, None and an empty list.
        """
        statistics = self.get_user_statistics(user_id)
        statistics["avg_usage"] = statistics.pop("avg_usage_per_token")
        # Start from the active document and not from the newest record, because that record may not be active yet.
        with self._connection.database() as db:
            active = db.active_tokens.find_one(
                {"_id": user_id, "expires_at": {"$gt": self.backend.context.now()}, **not_revoked()}
            )
            record = db.tokens.find_one({"_id": active["token_id"]}, {"usage_count": 1}) if active else None
        return {
            "user_id": user_id,
            "statistics": statistics,
            "recent_activity": self.get_audit_trail(user_id, limit=10),
            "active_token": {
                "exists": active is not None,
                "expires_at": active["expires_at"].isoformat() if active else None,
                "usage_count": record["usage_count"] if record else 0,
            },
        }

    def get_tokens_by_timeframe(self, start_date: datetime, end_date: datetime) -> list[dict[str, Any]]:
        """Return the records of all tokens made from `start_date` to `end_date`, both included, newest first.

        Args:
            start_date, end_date: aware datetimes.

        Raises:
            InvalidInput: one has no time zone, or they are in the wrong order.
        """
        start, end = require_aware(start_date, "start_date"), require_aware(end_date, "end_date")
        if start > end:
            raise InvalidInput("start_date must not be later than end_date.")
        made = {"created_at": {"$gte": start, "$lte": end}}
        with self._connection.database() as db:
            records = list(db.tokens.find(made, {"audit": 0}).sort("created_at", DESCENDING))
            users = {record["user_id"] for record in records}
            active = {
                each["token_id"] for each in db.active_tokens.find({"_id": {"$in": list(users)}, **not_revoked()})
            }
        now = self.backend.context.now()
        return [
            format_record(record, is_active=record["_id"] in active and record["expires_at"] > now)
            for record in records
        ]
