"""The operations of a store in PostgreSQL and Redis; see core/backend.py."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from ..core.backend import Backend
from ..core.errors import StorageError, StoreUnavailable
from ..core.forks import no_fork, start_anew_in_children
from ..core.listener import Listener, TokenState
from ..core.locks import SCHEMA_LOCK
from ..core.token import AuditEntry, StoredToken
from ..postgresql.backend import PostgreSQLBackend
from ..postgresql.errors import violated_constraint
from ..postgresql.rows import read_token
from . import queries
from .fold import FOLD_AT, Fold
from .redis import Buried, Found, RedisTokens

logger = logging.getLogger(__name__)


class HybridBackend(Backend):
    """The operations on PostgreSQL, with copies of tokens in Redis in front.

    Args:
        postgres: has the truth. What is not mentioned here is its work alone.
        redis: has the copies, and the uses that PostgreSQL does not know yet.
        believed: seconds for which a copy is believed without asking PostgreSQL.
        buried_for: seconds for which a tombstone stays: longer than a commit can take, and longer than an earlier
            reader may still bring a copy.
    """

    store_kind = PostgreSQLBackend.store_kind

    def __init__(self, postgres: PostgreSQLBackend, redis: RedisTokens, believed: float, buried_for: float) -> None:
        super().__init__(postgres.context, postgres.where)
        self.postgres, self.redis = postgres, redis
        self._connections, self._run = postgres.connections, postgres.connections.run
        self.believed, self.buried_for = believed, buried_for
        self._schema_seen = False
        self._postgres_failed, self._postgres_again_at = False, 0.0
        self._tombstones: dict[str, str] = {}  # by user; from logins of this process
        self.fold = Fold(postgres.connections, redis)
        self.start_anew()
        start_anew_in_children(self)

    def start_anew(self) -> None:
        self._asking = threading.Lock()

    def has_tables(self) -> bool:
        return self.postgres.has_tables()

    def init_database(self, runtime_role: str | None = None) -> None:
        self.postgres.init_database(runtime_role)
        if not all(self._run(queries.IS_READY)[0].values()):
            with self.postgres.lock(SCHEMA_LOCK):
                there = self._run(queries.IS_READY)[0]
                if not there["folded_once"]:
                    self._run(queries.FOLDED_ONCE)
                if not there["named"]:
                    self._run(queries.NAME_DATABASE)
        if runtime_role is not None and not self._run(queries.MAY_READ_NAME, role=runtime_role)[0]["granted"]:
            # A restore without privileges has lost what NAME_DATABASE granted.
            quoted = '"' + runtime_role.replace('"', '""') + '"'
            self._run(queries.GRANT_NAME.format(role=quoted))
        (row,) = self._run(queries.DATABASE)
        self.redis.database = hashlib.sha256(f"{row['name']}/{row['oid']}".encode()).hexdigest()[:16]
        self._schema_seen, self._postgres_failed = True, False

    def fold_uses(self) -> int:
        """Copy the uses that wait in Redis to PostgreSQL, and return how many were new there."""
        self._require_database()
        return self.fold.all_uses()

    def close(self) -> None:
        self.redis.close()
        self.postgres.close()

    def lock(self, name: str) -> AbstractContextManager[None]:
        self._require_database()
        return self.postgres.lock(name)

    def _require_database(self) -> None:
        """Ask PostgreSQL which database this is, unless it has said so."""
        if not self._schema_seen:
            self.init_database()

    def find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        self._connections.refuse_if_closed()
        if not self._schema_seen:
            self._guess_database()
        use = uuid.uuid4().hex
        if locked:
            # Ask only PostgreSQL: if a login could not reach Redis and was killed while it waited, it left a copy that
            # is still believed. PostgreSQL is up, because it has just given us the lock.
            token = self.postgres.find_and_record(user_id, alive_after, now, {"use": use}, locked=True)
            return _from_postgresql(token) if token else None
        found = self.redis.read_and_count(user_id, alive_after, now, self.context.actor, use)
        if found.what == "old" and self._postgres_is_left_alone():
            found = self.redis.read_and_count(user_id, alive_after, now, self.context.actor, use, insist=True)
        if found.token is not None and found.token.expires_at > alive_after:
            if found.waiting % FOLD_AT == 0 and self._schema_seen and not self._postgres_failed:
                self.fold.quietly()
            return found.token
        try:
            # If Redis gave no answer, it may still count this use when it wakes up. The id ensures that it counts once.
            token = self.postgres.find_and_record(user_id, alive_after, now, {"use": use})
        except StoreUnavailable as error:
            if violated_constraint(error) != "one_entry_a_use":
                return self._find_without_postgresql(user_id, alive_after, now, use, error)
            # Redis did count it, and somebody has folded it already.
            rows = self._run(queries.LOOK, user_id=user_id, alive_after=alive_after)
            token = read_token(rows[0]) if rows else None
        self._postgres_failed = False
        if not self._schema_seen:
            found = Found("no answer")  # Redis was asked about a database that may be another one.
        if (token is None or token.in_doubt) and found.what == "old":
            self.redis.drop(user_id)  # Otherwise it would be handed out when PostgreSQL is down.
        if token is None:
            return None
        uses = token.usage_count
        # Put a copy only where there was none or an older one of the same token. Never replace a tombstone. If a login
        # is running, Redis would not know how it ends.
        if found.what in ("old", "nothing", "dead") and not token.in_doubt:
            uses = max(uses, self.redis.put(token, now, since=found.time) or 0)
        token.usage_count = uses
        return _from_postgresql(token)

    def _find_without_postgresql(
        self, user_id: str, alive_after: datetime, now: datetime, use: str, error: StoreUnavailable
    ) -> StoredToken | None:
        self.leave_postgresql_alone()
        found = self.redis.read_and_count(user_id, alive_after, now, self.context.actor, use, insist=True)
        if found.what == "no answer" and (self.redis.database or not self.redis.answers()):
            raise StoreUnavailable(f"Neither Redis nor PostgreSQL answers. {error}") from error
        if found.token is None or found.token.expires_at <= alive_after:
            raise error  # Redis cannot know that there is no other token.
        return found.token

    def _guess_database(self) -> None:
        """Ask PostgreSQL which database this is. While it gives no answer, take the only one that Redis knows.

        Raises:
            StoreUnavailable: Redis knows several. One may be another installation's, with another token of this user.
        """
        if not self._postgres_is_left_alone():
            try:
                self.init_database()
                return
            except StoreUnavailable as error:
                logger.info("PostgreSQL cannot say which database this is: %s", error)
                self.leave_postgresql_alone()
        if self.redis.database is None:
            known = self.redis.list_databases() or []
            if len(known) > 1:
                raise StoreUnavailable(
                    f"PostgreSQL at {self.where} gives no answer, and Redis has copies from {len(known)} databases. "
                    "Only PostgreSQL can say which of them is this one. Try again when it is back. With a redis_prefix "
                    "for each installation, a program can start without PostgreSQL."
                )
            self.redis.database = known[0] if known else None

    def leave_postgresql_alone(self) -> None:
        """Note that PostgreSQL gave no answer. For a while, only one read at a time finds out whether it is back."""
        self._postgres_failed, self._postgres_again_at = True, time.monotonic() + self.believed

    def _postgres_is_left_alone(self) -> bool:
        """Tell whether to skip PostgreSQL. While it is down, one read checks it now and then, and the others go on."""
        with self._asking:
            if not self._postgres_failed or time.monotonic() < self._postgres_again_at:
                return self._postgres_failed
            self._postgres_again_at = time.monotonic() + self.believed
            return False

    def insert(
        self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None
    ) -> StoredToken:
        buried = self._bury([token.user_id])
        unbelieved = buried.certain or self._is_marked_by_this_thread(token.user_id)
        stored = _from_postgresql(self.postgres.insert(token, action, metadata))
        if not stored.in_doubt:
            self.redis.put(stored, self.context.now(), tombstone=buried.tombstone)
        self._tombstones.pop(token.user_id, None)
        self._wait_until_unbelieved(unbelieved)
        self.fold.quietly()
        return stored

    def _bury(self, user_ids: Iterable[str]) -> Buried:
        self._require_database()
        return self.redis.bury(user_ids, self.buried_for)

    def _is_marked_by_this_thread(self, user_id: str) -> bool:
        """Tell whether a login of this thread marked the user's token, and so waited if Redis could not be reached.

        The key is 0 if the token already had a mark when this login began.
        """
        keys = {0, *self.postgres.locks.logins.values()}
        return len(keys) > 1 and any(row["login_lock"] in keys for row in self._run(queries.MARK_OF, user_id=user_id))

    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        self._require_database()
        marked = self.postgres.mark(user_id, lock, now, metadata)
        # Only now: no reader puts a copy of a marked token there, and until the login begins a copy does no harm. This
        # includes users who already had a mark, because this thread does not wait again before it stores the new token.
        users = {user_id} if user_id else {row["user_id"] for row in self._run(queries.ACTIVE_USERS)}
        buried = self._bury(users.union(marked))
        self._tombstones.update(dict.fromkeys(marked, buried.tombstone))
        self._wait_until_unbelieved(buried.certain or not (marked or user_id is None))

    def end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        ended = self.postgres.unmark(lock, in_doubt, user_id)
        if in_doubt:
            # If Redis was down when the login began, it may be back with a copy that is used when PostgreSQL is down.
            tombstone = self._bury(ended).tombstone
            self._tombstones.update(dict.fromkeys(ended, tombstone))
        else:
            self._dig_up(ended)

    def clear_doubt(self, token: StoredToken) -> None:
        self.postgres.clear_doubt(token)
        self._dig_up([token.user_id])

    def _dig_up(self, user_ids: Iterable[str]) -> None:
        """Let the next reader put a copy into Redis again for each of these users."""
        users_of: dict[str, list[str]] = {}
        for user_id in user_ids:
            if tombstone := self._tombstones.pop(user_id, None):
                users_of.setdefault(tombstone, []).append(user_id)
        for tombstone, users in users_of.items():
            self.redis.dig_up(users, tombstone)

    def revoke(self, user_id: str, now: datetime) -> bool:
        self._bury([user_id])
        revoked = self.postgres.revoke(user_id, now)
        # Bury again, because the revoked token may have been stored and copied after the first tombstone.
        self._wait_until_unbelieved(self._bury([user_id]).certain)
        return revoked

    def replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        rows = list(pairs)
        buried = self._bury([old.user_id for old, _ in rows])
        replaced = self.postgres.replace_ciphertexts(rows)
        self._wait_until_unbelieved(buried.certain)
        return replaced

    def delete_entries(self, before: datetime, limit: int) -> int:
        self.fold_uses()  # First, because only its audit entry shows that a waiting use was already folded.
        return self.postgres.delete_entries(before, limit)

    def read_tokens(self, user_id: str | None) -> list[StoredToken]:
        self.fold_uses()
        return self.postgres.read_tokens(user_id)

    def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        certain = not tokens or self._bury([token.user_id for token in tokens]).certain
        self.postgres.merge(user_id, tokens, entries)
        self._wait_until_unbelieved(certain)

    def _wait_until_unbelieved(self, out_of_redis: bool) -> None:
        if not out_of_redis:
            logger.warning("Redis could not be updated. Waiting %s s, so that its old copy expires.", self.believed)
            time.sleep(self.believed)

    def read_history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        self.fold_uses()
        return self.postgres.read_history(user_id, limit, now)

    def read_statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        self.fold_uses()
        return self.postgres.read_statistics(user_id, now)

    def read_audit_trail(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        self.fold_uses()
        return self.postgres.read_audit_trail(user_id, limit)

    def check_health(self) -> dict[str, Any]:
        health = self.postgres.check_health()
        details: dict[str, Any] = {"redis": {}, "postgresql": {}, **health.pop("details", {})}
        try:
            with no_fork():
                details["redis"] = self.redis.status()
            health["redis"] = "healthy"
        except StoreUnavailable as error:
            health["redis"] = f"error: {error}"
        try:
            begin = time.perf_counter()
            standby = self._run("SELECT pg_is_in_recovery() AS standby")[0]["standby"]
            latency = round((time.perf_counter() - begin) * 1000, 2)
            role = "standby" if standby else "primary"
            details["postgresql"] |= {"latency_ms": latency, "role": role, **self._connections.pool_use()}
        except StorageError:
            pass  # PostgreSQL's own check has reported it.
        return {"redis": health.pop("redis"), **health, "details": details}

    # PostgreSQL does these alone.

    def find_in_doubt(self, user_id: str) -> StoredToken | None:
        return self.postgres.find_in_doubt(user_id)

    def find_newest(self, user_id: str) -> StoredToken | None:
        return self.postgres.find_newest(user_id)

    def find_by_account(self, account: str) -> list[StoredToken]:
        return self.postgres.find_by_account(account)

    # PostgreSQL tells of every change, because it commits each one. Messages of Redis would be lost with Redis and in
    # its failover, and would need a second connection and more rights; and nothing can be stored without PostgreSQL.
    def listen(self) -> Listener:
        return self.postgres.listen()

    def read_states(self, user_ids: Collection[str]) -> dict[str, TokenState]:
        return self.postgres.read_states(user_ids)

    def record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        self.postgres.record(user_id, action, now, metadata)

    def logins_since(self, moment: datetime, process: str) -> list[datetime]:
        return self.postgres.logins_since(moment, process)

    def read_notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        return self.postgres.read_notes(names)

    def write_note(self, name: str, text: str) -> None:
        self.postgres.write_note(name, text)

    def erase_note(self, name: str) -> None:
        self.postgres.erase_note(name)

    def expire(self, now: datetime, limit: int) -> int:
        return self.postgres.expire(now, limit)

    def find_under_other_keys(self, key_id: str, limit: int, after: str | None = None) -> list[StoredToken]:
        return self.postgres.find_under_other_keys(key_id, limit, after)

    def count_keys(self) -> dict[str, int]:
        return self.postgres.count_keys()

    def read_users(self, after: str, limit: int) -> list[str]:
        return self.postgres.read_users(after, limit)

    def read_entries(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        return self.postgres.read_entries(user_id, after, limit)


def _from_postgresql(token: StoredToken) -> StoredToken:
    token.source = "postgresql"
    return token
