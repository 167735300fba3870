"""Pattern 4: Redis in front of PostgreSQL. PostgreSQL has the truth, and Redis answers most reads in one round trip."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from typing import Any, Unpack

from ..core.backend import SCHEMA_LOCK
from ..core.checks import require_positive
from ..core.errors import StorageError, StoreUnavailable
from ..core.store import BATCH, Options
from ..core.token import AuditEntry, StoredToken
from ..postgresql.connections import violated
from ..postgresql.store import PostgreSQLUpstoxStorage, _token
from . import queries
from .redis import Config, RedisTokens, Use, client_of

logger = logging.getLogger(__name__)

FOLD_AT = 500  # waiting uses in Redis


class HybridUpstoxStorage(PostgreSQLUpstoxStorage):
    """Tokens in PostgreSQL, with copies of their ciphertexts in Redis.

    A copy is believed for `believed` seconds; then one read asks PostgreSQL again. When a token is stored or revoked,
    the old copy is out of Redis before the call returns: first a tombstone replaces the copy, then PostgreSQL commits,
    then the new copy is put there. If Redis cannot be reached, the call waits `believed` seconds longer, so that
    cached copies expire. After that, nobody believes an older copy, even if Redis comes back with one.

    Before a login, the copies of all tokens that it may replace are removed from Redis in the same way. No copy is put
    there until it is known how the login ended, because Redis cannot tell whether a login is still running.

    Without Redis, PostgreSQL does everything. Without PostgreSQL, Redis still answers reads, even from copies older
    than `believed`; nothing can be stored then, and no login is spent. `result["source"]` says who answered.

    Uses that Redis counts wait there in a stream, until they are folded into PostgreSQL. That happens after 500 of
    them, at the next login, and before statistics, history and audit are read.

    Args:
        redis_config: keyword arguments of `redis.Redis`, a URL, or a client of redis-py (for Sentinel or a cluster).
            You close your own client. Give it a `socket_timeout` and a `socket_connect_timeout` of 0.25 and
            `retry=Retry(NoBackoff(), 0)`. Otherwise a dead server delays reads.
        postgres_config: as `PostgreSQLUpstoxStorage` takes it.
        redis_timeout: seconds for each answer of Redis.
        redis_pause: seconds for which Redis is not asked again after it gave no answer.
        believed: seconds, see above. It must be the same for all programs that share a Redis.
        replicas: how many replicas of Redis must confirm a tombstone. If they do not, the call waits `believed` seconds
            as well. This does not work with a cluster.
        redis_prefix: the prefix of all keys in Redis, for installations that share one.
        options: `pool_size`, `timeout`, and see `Options`.

    Raises:
        ConfigurationError: PostgreSQL or Redis refuses its configuration.
        StoreUnavailable: neither PostgreSQL nor Redis can be reached.
    """

    def __init__(
        self,
        redis_config: Config,
        postgres_config: str,
        *,
        redis_timeout: float = 0.25,
        redis_pause: float = 2.0,
        believed: float = 5.0,
        replicas: int = 0,
        redis_prefix: str = "upstox",
        pool_size: int = 5,
        timeout: float = 5.0,
        **options: Unpack[Options],
    ) -> None:
        for name, seconds in (("believed", believed), ("redis_timeout", redis_timeout), ("redis_pause", redis_pause)):
            require_positive(name, seconds)
        self._believed = believed
        # Longer than a commit can take, and longer than an earlier reader may still bring a copy.
        self._buried_for = max(2 * timeout, believed)
        self._postgres_failed, self._postgres_again_at = False, 0.0
        self._asking, self._folding = threading.Lock(), threading.Lock()
        self._tombstones: dict[str, str] = {}  # by user; from logins of this process
        client, owned = client_of(redis_config, redis_timeout)
        del redis_config  # A traceback that prints local variables must not show its password.
        self._redis = RedisTokens(
            client,
            owned,
            timeout=redis_timeout,
            pause=redis_pause,
            believed=believed,
            replicas=replicas,
            prefix=redis_prefix,
        )
        self._schema_unseen = False
        try:
            super().__init__(postgres_config, pool_size=pool_size, timeout=timeout, **options)
        except StoreUnavailable as error:
            if not self._redis.answers():
                self.close()
                raise
            # If a program starts while PostgreSQL is down, it reads from Redis, as a running program does.
            self._schema_unseen = True
            logger.warning("PostgreSQL is not available, so reads come from Redis alone: %s", error)

    def init_postgres(self) -> None:
        """Make the tables, as `init_database` does."""
        self.init_database()

    def init_database(self, runtime_role: str | None = None) -> None:
        super().init_database(runtime_role)
        there = "SELECT to_regclass('one_entry_a_use') IS NOT NULL AS there"
        if not self._run(there)[0]["there"]:
            with self._lock(SCHEMA_LOCK):
                if not self._run(there)[0]["there"]:
                    self._run(queries.FOLDED_ONCE)
        self._schema_unseen = False

    def fold_uses(self) -> int:
        """Copy the uses that wait in Redis to PostgreSQL, each exactly once, even if a process is killed meanwhile.

        Returns:
            how many were new there.
        """
        folded = 0
        while uses := self._redis.uses(BATCH):
            folded += self._fold(uses)
            self._redis.forget_uses(uses)
            if len(uses) < BATCH:
                break
        return folded

    def close(self) -> None:
        self._redis.close()
        super().close()

    def __repr__(self) -> str:
        return f"HybridUpstoxStorage({self._connections.where})"

    def _lock(self, name: str) -> AbstractContextManager[None]:
        if self._schema_unseen and name != SCHEMA_LOCK:
            self.init_database()
        return super()._lock(name)

    def _find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        self._connections.refuse_if_closed()
        use = uuid.uuid4().hex
        if locked:
            # Ask only PostgreSQL: if a login could not reach Redis and was killed while it waited, it left a copy that
            # is still believed. PostgreSQL is up, because it has just given us the lock.
            token = self._use(user_id, alive_after, now, json.dumps({"use": use}), locked=True)
            return replace(token, source="postgresql") if token else None
        found = self._redis.use(user_id, alive_after, now, self._actor, use)
        if found.what == "old" and self._postgres_is_left_alone():
            found = self._redis.use(user_id, alive_after, now, self._actor, use, insist=True)
        if found.token is not None and found.token.expires_at > alive_after:
            if found.waiting % FOLD_AT == 0 and not self._postgres_failed:
                self._fold_quietly()
            return found.token
        try:
            # If Redis gave no answer, it may still count this use when it wakes up. The id ensures that it counts once.
            token = self._use(user_id, alive_after, now, json.dumps({"use": use}))
        except StoreUnavailable as error:
            if violated(error) != "one_entry_a_use":
                return self._find_without_postgresql(user_id, alive_after, now, use, error)
            # Redis did count it, and somebody has folded it already.
            rows = self._run(queries.LOOK, user_id=user_id, alive_after=alive_after)
            token = _token(rows[0]) if rows else None
        self._postgres_failed = False
        if (token is None or token.in_doubt) and found.what == "old":
            self._redis.drop(user_id)  # Otherwise it would be handed out when PostgreSQL is down.
        if token is None:
            return None
        token.source = "postgresql"
        if token.in_doubt:  # A login is running, and Redis would not know how it ends.
            return token
        # Put a copy only where there was none or an older one of the same token. Never replace a tombstone.
        if found.what in ("old", "nothing", "dead"):
            token.usage_count = max(token.usage_count, self._redis.put(token, now, since=found.time) or 0)
        return token

    def _find_without_postgresql(
        self, user_id: str, alive_after: datetime, now: datetime, use: str, error: StoreUnavailable
    ) -> StoredToken | None:
        self._postgres_failed, self._postgres_again_at = True, time.monotonic() + self._believed
        found = self._redis.use(user_id, alive_after, now, self._actor, use, insist=True)
        if found.what == "no answer":
            raise StoreUnavailable(f"Neither Redis nor PostgreSQL answers. {error}") from error
        if found.token is None or found.token.expires_at <= alive_after:
            raise error  # Redis cannot know that there is no other token.
        return found.token

    def _postgres_is_left_alone(self) -> bool:
        """Tell whether to skip PostgreSQL. While it is down, one read checks it now and then, and the others go on."""
        with self._asking:
            if not self._postgres_failed or time.monotonic() < self._postgres_again_at:
                return self._postgres_failed
            self._postgres_again_at = time.monotonic() + self._believed
            return False

    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> int:
        buried = self._redis.bury([token.user_id], self._buried_for)
        unbelieved = buried.certain or self._is_marked_by_this_thread(token.user_id)
        token_id = super()._insert(token, action, metadata)
        self._redis.put(replace(token, token_id=token_id), self._now(), tombstone=buried.tombstone)
        self._tombstones.pop(token.user_id, None)
        self._wait_until_unbelieved(unbelieved)
        token.source = "postgresql"
        self._fold_quietly()
        return token_id

    def _is_marked_by_this_thread(self, user_id: str) -> bool:
        """Tell whether a login of this thread marked the user's token, and so waited if Redis could not be reached.

        The key is 0 if the token already had a mark when this login began.
        """
        keys = {0, *self._connections.logins.values()}
        return len(keys) > 1 and any(row["login_lock"] in keys for row in self._run(queries.MARK_OF, user_id=user_id))

    def _begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        users = {user_id} if user_id else {row["user_id"] for row in self._run(queries.ACTIVE_USERS)}
        self._redis.bury(users, self._buried_for)
        marked = self._mark(user_id, lock, now, metadata)
        # Bury again, as in _revoke: a reader may have put a copy there before the token was marked. This includes users
        # who already had a mark, because this thread does not wait again before it stores the new token.
        users.update(marked)
        buried = self._redis.bury(users, self._buried_for)
        self._tombstones.update(dict.fromkeys(marked, buried.tombstone))
        self._wait_until_unbelieved(buried.certain or not (marked or user_id is None))

    def _end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        ended = self._unmark(lock, in_doubt, user_id)
        if in_doubt:
            # If Redis was down when the login began, it may be back with a copy that is used when PostgreSQL is down.
            tombstone = self._redis.bury(ended, self._buried_for).tombstone
            self._tombstones.update(dict.fromkeys(ended, tombstone))
        else:
            self._dig_up(ended)

    def _clear_doubt(self, token: StoredToken) -> None:
        super()._clear_doubt(token)
        self._dig_up([token.user_id])

    def _dig_up(self, user_ids: Iterable[str]) -> None:
        """Let the next reader put a copy into Redis again for each of these users."""
        users_of: dict[str, list[str]] = {}
        for user_id in user_ids:
            if tombstone := self._tombstones.pop(user_id, None):
                users_of.setdefault(tombstone, []).append(user_id)
        for tombstone, users in users_of.items():
            self._redis.dig_up(users, tombstone)

    def _revoke(self, user_id: str, now: datetime) -> bool:
        self._redis.bury([user_id], self._buried_for)
        revoked = super()._revoke(user_id, now)
        # Bury again, because the revoked token may have been stored and copied after the first tombstone.
        self._wait_until_unbelieved(self._redis.bury([user_id], self._buried_for).certain)
        return revoked

    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        buried = self._redis.bury([old.user_id for old, _ in rows], self._buried_for)
        replaced = super()._replace_ciphertexts(rows)
        self._wait_until_unbelieved(buried.certain)
        return replaced

    def _forget_entries(self, before: datetime, limit: int) -> int:
        self.fold_uses()  # First, because only its audit entry shows that a waiting use was already folded.
        return super()._forget_entries(before, limit)

    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        self.fold_uses()
        return super()._tokens_of(user_id)

    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        certain = not tokens or self._redis.bury([token.user_id for token in tokens], self._buried_for).certain
        super()._put_in(user_id, tokens, entries)
        self._wait_until_unbelieved(certain)

    def _wait_until_unbelieved(self, out_of_redis: bool) -> None:
        if not out_of_redis:
            logger.warning("Redis could not be updated. Waiting %s s, so that its old copy expires.", self._believed)
            time.sleep(self._believed)

    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        self.fold_uses()
        return super()._history(user_id, limit, now)

    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        self.fold_uses()
        return super()._statistics(user_id, now)

    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        self.fold_uses()
        return super()._audit(user_id, limit)

    def _health(self) -> dict[str, Any]:
        health = super()._health()
        details: dict[str, Any] = {"redis": {}, "postgresql": {}}
        try:
            details["redis"] = self._redis.status()
            health["redis"] = "healthy"
        except StoreUnavailable as error:
            health["redis"] = f"error: {error}"
        try:
            begin = time.perf_counter()
            standby = self._run("SELECT pg_is_in_recovery() AS standby")[0]["standby"]
            latency = round((time.perf_counter() - begin) * 1000, 2)
            role = "standby" if standby else "primary"
            details["postgresql"] = {"latency_ms": latency, "role": role, **self._connections.pool_use()}
        except StorageError:
            pass  # super()._health() has reported it.
        return {"redis": health.pop("redis"), **health, "details": details}

    def _fold_quietly(self) -> None:
        """Fold the uses. If somebody else is folding, or PostgreSQL does not answer, they keep waiting."""
        if self._folding.acquire(blocking=False):
            try:
                self.fold_uses()
            except StorageError as error:
                logger.warning("Use counts stay in Redis for now: %s", error)
            finally:
                self._folding.release()

    def _fold(self, uses: list[Use]) -> int:
        rows = self._run(
            queries.FOLD,
            tokens=[use.token for use in uses],
            users=[use.user for use in uses],
            actors=[use.actor for use in uses],
            times=[use.at.isoformat() for use in uses],
            uses=[use.use for use in uses],
        )
        return sum(row["uses"] for row in rows)
