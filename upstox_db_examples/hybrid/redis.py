"""The copies of tokens in Redis. We ask them first, may lose them at any time, and never believe them for long."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import redis
from redis.cluster import RedisCluster
from redis.exceptions import (
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from ..core.errors import ConfigurationError, StoreUnavailable, TokenRefused
from ..core.forks import no_fork, start_anew_in_children
from ..core.token import StoredToken
from .checks import Policy, read_policy, refuse_a_wrong_configuration
from .client import NO_CONFIGURATION, Client
from .uses import Use, read_use, text_of

logger = logging.getLogger(__name__)

COPIED = ("ciphertext", "key_id", "generation", "user_name", "email", "account")
LUA = Path(__file__).parent / "lua"
LOOK_AGAIN = 10.0  # seconds after which a read also asks for Redis's maxmemory-policy

# A cluster's exceptions are not subclasses of RedisError.
NO_ANSWER = (RedisError, RedisClusterException, OSError)


class Found(NamedTuple):
    """What Redis says about a user.

    Attributes:
        what: "used" (here is the token, and this use is counted), "old" (there is a copy that has to be confirmed),
            "nothing", "gone" (the token is being replaced, or was revoked), "dead", or "no answer".
        time: Redis's clock, in milliseconds.
        token: the token, if `what` is "used".
        waiting: how many uses have not been folded into PostgreSQL yet.
    """

    what: Literal["used", "old", "nothing", "gone", "dead", "no answer"]
    time: int = 0
    token: StoredToken | None = None
    waiting: int = 0


class Buried(NamedTuple):
    """A tombstone: its value, and whether it is certain that no copy is left."""

    tombstone: str
    certain: bool


class RedisTokens:
    """The store's keys in Redis: copies of tokens, counts, tombstones, and the stream of uses.

    Args:
        client: the client that `client_of` returned.
        owned: whether `close` closes it.
        timeout: seconds for each answer; replicas get half of that to confirm a tombstone.
        pause: seconds for which we do not ask Redis again after it gave no answer, so that not every read waits for it.
        believed: seconds for which a copy is believed without asking PostgreSQL.
        replicas: how many replicas must have a tombstone before it counts as written.
        prefix: the prefix of all keys.

    Attributes:
        database: the name of PostgreSQL's database, which all keys of this store carry; None until it is known.

    Raises:
        ConfigurationError: the configuration is invalid, or Redis refuses the user or the password.
    """

    def __init__(
        self,
        client: Client | None,
        owned: bool,
        *,
        timeout: float,
        pause: float,
        believed: float,
        replicas: int,
        prefix: str,
    ) -> None:
        if client is None:
            raise ConfigurationError(NO_CONFIGURATION)
        if replicas and isinstance(client, RedisCluster):
            raise ConfigurationError(
                "A Redis Cluster cannot tell whether a key's replicas are up to date. Leave out replicas."
            )
        self.client, self._owned = client, owned
        self._pause = pause
        self._believed_ms = int(believed * 1000)
        self._timeout_ms = max(1, int(timeout * 500))  # half, so that slow replicas do not look like a dead Redis
        self._replicas = replicas
        # The braces make a Redis Cluster keep all keys in one slot, because a script may only touch keys of one slot.
        self._prefix = f"{{{prefix}}}:"
        self._databases, self._earlier_uses = f"{self._prefix}databases", f"{self._prefix}uses"
        self.database: str | None = None
        self._read_and_count = self.client.register_script((LUA / "use.lua").read_text())
        self._put = self.client.register_script((LUA / "put.lua").read_text())
        self._drop = self.client.register_script((LUA / "drop.lua").read_text())
        self._dig_up = self.client.register_script((LUA / "dig_up.lua").read_text())
        self._list_databases = self.client.register_script((LUA / "databases.lua").read_text())
        self._closed = self._failed = False
        self._ask_again_at = 0.0
        self._policy, self._look_at = Policy("unknown", False), 0.0
        self.start_anew()
        start_anew_in_children(self)
        self.ask(lambda: refuse_a_wrong_configuration(self.client))
        self.ask(self._evicts)

    def start_anew(self) -> None:
        self._lock = threading.Lock()

    def read_and_count(
        self, user_id: str, alive_after: datetime, now: datetime, actor: str, use_id: str, *, insist: bool = False
    ) -> Found:
        """Get the token in one round trip, if it is there and still believed, and count the use.

        Args:
            use_id: unique, so that this use counts once.
            insist: also hand out a copy that is no longer believed.
        """
        if self.database is None:
            return Found("no answer")
        keys = [*self.keys_of(user_id), self._uses]
        values: list[str | int] = [user_id, _seconds(alive_after), actor, _seconds(now), use_id, int(insist)]
        answer = self._ask_if_it_keeps(lambda: self._read_and_count(keys=keys, args=values), insist=insist)
        if answer is None:
            return Found("no answer")
        what, clock, *more = answer
        if text_of(what) != "used":
            return Found(text_of(what), int(clock))  # type: ignore[arg-type]
        text, count, waiting = more
        token = _load(user_id, text_of(text), int(count))
        if token is None:  # Now PostgreSQL is asked. The id of this use ensures that it counts once.
            return Found("nothing", int(clock))
        return Found("used", int(clock), token, int(waiting))

    def put(self, token: StoredToken, now: datetime, *, since: int = 0, tombstone: str = "") -> int | None:
        """Keep a copy until the token dies.

        Args:
            since: Redis's time when a reader found nothing.
            tombstone: the tombstone that a writer wrote before it stored the token. The copy may only replace that one.

        Returns:
            the number of uses, -1 if there was something newer, or None if Redis gave no answer.
        """
        lifetime = int((token.expires_at - now).total_seconds() * 1000)
        if lifetime <= 0:
            return -1
        keys = [*self.keys_of(token.user_id), self._databases]
        values: list[str | int] = [_dump(token), token.generation, _seconds(token.expires_at), str(token.token_id)]
        values += [token.usage_count, lifetime, self._believed_ms, since, tombstone, str(self.database)]
        answer = self._ask_if_it_keeps(lambda: self._put(keys=keys, args=values), insist=not since)
        return None if answer is None else int(answer)

    def bury(self, user_ids: Iterable[str], seconds: float) -> Buried:
        """Replace each copy with a tombstone, so that a late reader cannot put an old copy back."""
        keys, tombstone = [self.keys_of(user_id)[0] for user_id in user_ids], f"tombstone-{uuid.uuid4().hex}"
        if not keys:
            return Buried(tombstone, True)

        def write() -> bool:
            try:
                # Use one connection, because WAIT asks about the writes of its own connection.
                with self.client.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.set(key, tombstone, px=max(1, int(seconds * 1000)))
                    if self._replicas:
                        pipeline.execute_command("WAIT", self._replicas, self._timeout_ms)
                    answers = pipeline.execute()
            except OutOfMemoryError:
                self.client.delete(*keys)  # Not certain: there may soon be room again for a late copy.
                return False
            return not self._evicts() and (not self._replicas or int(answers[-1]) >= self._replicas)

        return Buried(tombstone, bool(self.ask(write, insist=True)))

    def dig_up(self, user_ids: Iterable[str], tombstone: str) -> None:
        """Remove this tombstone wherever it still is, so that readers may put copies there again."""
        keys = [self.keys_of(user_id)[0] for user_id in user_ids]
        self.ask(lambda: self._dig_up(keys=keys, args=[tombstone, self._believed_ms]))

    def drop(self, user_id: str) -> None:
        """Remove a copy that is no longer believed, because PostgreSQL has no such token."""
        self.ask(lambda: self._drop(keys=self.keys_of(user_id)[:1]))

    def list_databases(self) -> list[str] | None:
        """Return the names of the databases of whose tokens Redis has copies, or None if Redis gave no answer."""
        names = self.ask(lambda: self._list_databases(keys=[self._databases]), insist=True)
        return None if names is None else [text_of(name) for name in names]

    def list_uses(self, limit: int) -> list[Use]:
        """Return uses that wait to be folded into PostgreSQL, oldest first."""
        uses, foreign = self._read_stream(self._uses, "-", limit)
        if foreign:
            logger.warning("%s entries of %s did not come from this package. Deleting them.", len(foreign), self._uses)
            self.ask(lambda: self.client.xdel(self._uses, *foreign))
        return uses

    def list_earlier_uses(self, after: str, limit: int) -> tuple[list[Use], str]:
        """Return uses that an earlier version wrote, whose keys named no database, and the position behind them.

        Args:
            after: the position behind the entries that were listed before, or "-" for the first ones.
        """
        uses, foreign = self._read_stream(self._earlier_uses, after, limit)
        last = max((*(use.entry for use in uses), *foreign), key=_position, default=None)
        return uses, after if last is None else "{}-{}".format(*_position(last, add=1))

    def _read_stream(self, key: str, begin: str, limit: int) -> tuple[list[Use], list[str]]:
        """Return uses, and the ids of entries that this package did not write."""
        # Not decoded by the client: one entry that is not UTF-8 would make each answer an error.
        client: Any = self.client
        question = ("XRANGE", key, begin, "+", "COUNT", limit)
        entries = self.ask(lambda: client.execute_command(*question, NEVER_DECODE=True)) or []
        uses, foreign = [], []
        for entry, fields in entries:
            use = read_use(text_of(entry), {text_of(name): text_of(value) for name, value in fields.items()})
            uses.append(use) if use else foreign.append(text_of(entry))
        return uses, foreign

    def forget_uses(self, uses: Iterable[Use], *, earlier: bool = False) -> None:
        key = self._earlier_uses if earlier else self._uses
        self.ask(lambda: self.client.xdel(key, *(use.entry for use in uses)))

    def status(self) -> dict[str, Any]:
        """Return `latency_ms`, `role`, `db`, `maxmemory_policy`, `uses_waiting`, and `in_use`, the connections in use.

        This writes a key that lives for a second, because a full Redis, or one that became a replica, still answers a
        PING.

        Raises:
            StoreUnavailable: Redis does not answer, takes no writes, or does not allow all that the store needs.
        """
        if self._closed:
            raise StoreUnavailable("This store is closed.")
        try:
            begin = time.perf_counter()
            self.client.set(f"{self._prefix}probe", "", px=1000)
            latency = (time.perf_counter() - begin) * 1000
            role = self.client.info("replication")["role"] if isinstance(self.client, redis.Redis) else "cluster"
            in_use = len(getattr(getattr(self.client, "connection_pool", None), "_in_use_connections", ()))
            waiting = self.client.xlen(self._uses) if self.database else None
            evicts, where = (
                self._evicts(look=True),
                {"role": role, "db": self._number(), "maxmemory_policy": self._policy.name},
            )
            if not evicts:
                return {"latency_ms": round(latency, 2), **where, "uses_waiting": waiting, "in_use": in_use}
            why = _may_evict(self._policy)
        except NoPermissionError:
            why = "does not give this user all the rights that the store needs. Use the rules of runtime_acl()"
        except (OutOfMemoryError, ReadOnlyError) as error:
            why = f"does not accept writes ({type(error).__name__}). Check that it has free memory and is not a replica"
        except NO_ANSWER as error:
            why = f"gave no answer ({type(error).__name__}). Check that it is running"
        # We raise out here, so that our error has no cause: a cluster's frames hold the password.
        raise StoreUnavailable(f"Redis {why}.")

    def _ask_if_it_keeps(self, question: Callable[[], Any], *, insist: bool) -> Any:
        """Do the same as `ask`, and treat a Redis that may throw uses or tombstones away as one that gives no answer.

        Uses that wait there are still read, and folded while they are there.
        """
        return self.ask(lambda: None if self._evicts() else question(), insist=insist)

    def _evicts(self, *, look: bool = False) -> bool:
        """Return whether Redis may throw keys away. It may be set so at any time, so this looks again now and then."""
        if look or self._failed or time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_AGAIN
            before, self._policy = self._policy, read_policy(self.client)
            if self._policy.evicts and not before.evicts:
                logger.warning("Redis %s.", _may_evict(self._policy))
        return self._policy.evicts

    def answers(self) -> bool:
        return self.ask(self.client.ping, insist=True) is not None

    def close(self) -> None:
        self._closed = True
        if self._owned:
            self.client.close()

    def keys_of(self, user_id: str) -> list[str]:
        return [f"{self._prefix}{self.database}:{kind}:{user_id}" for kind in ("token", "count")]

    def _number(self) -> int:
        """Return the number of the database in Redis. A cluster has only 0."""
        pool = getattr(self.client, "connection_pool", None)
        return int(getattr(pool, "connection_kwargs", {}).get("db") or 0)

    @property
    def _uses(self) -> str:
        return f"{self._prefix}{self.database}:uses"

    def ask(self, question: Callable[[], Any], *, insist: bool = False) -> Any:
        """Return Redis's answer, or None. Then the caller asks PostgreSQL, and we ask Redis again after a pause.

        Args:
            insist: ask even during the pause. Writes do, because a write that cannot reach Redis has to wait longer.
        """
        with self._lock:
            if self._closed or (time.monotonic() < self._ask_again_at and not insist):
                return None
            if self._failed:
                # One caller finds out whether Redis is back, and the others need not wait.
                self._ask_again_at = time.monotonic() + self._pause
        try:
            # redis-py has locks of its own, which a child that is forked meanwhile would wait for.
            with no_fork():
                answer = question()
        except UnicodeDecodeError:  # from a client that decodes
            logger.warning("A key of the store in Redis is not text. PostgreSQL answers for this user.")
            return None
        except NO_ANSWER as error:
            if isinstance(error, ResponseError) and "WRONGTYPE" in str(error):
                logger.warning("A key of the store in Redis has the wrong type. PostgreSQL answers for this user.")
                return None
            if not self._failed:
                logger.warning("Redis does not answer (%s), so PostgreSQL answers alone.", type(error).__name__)
            self._failed, self._ask_again_at = True, time.monotonic() + self._pause
            return None
        if self._failed:
            logger.info("Redis answers again.")
            self._failed, self._ask_again_at = False, 0.0
        return answer


def _may_evict(policy: Policy) -> str:
    return (
        f"may throw away uses that wait there, and tombstones (maxmemory-policy {policy.name}), so PostgreSQL answers "
        "alone. Set maxmemory-policy to noeviction, or use another Redis"
    )


def _position(entry: str, add: int = 0) -> tuple[int, int]:
    """Return the id of an entry of a stream as numbers."""
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number) + add


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _dump(token: StoredToken) -> str:
    times = {"created_at": _seconds(token.created_at), "expires_at": _seconds(token.expires_at)}
    return json.dumps({**{name: getattr(token, name) for name in COPIED}, **times, "token_id": token.token_id})


def _load(user_id: str, text: str, count: int) -> StoredToken | None:
    """Load the copy. Return None if the program that made it left out the account that the ciphertext is bound to."""
    # Use the requested user and not one that the copy names. Otherwise another user's copy would get through.
    try:
        fields = json.loads(text)
        for name in ("created_at", "expires_at"):
            fields[name] = datetime.fromtimestamp(fields[name], UTC)
        if "account" not in fields and not fields["ciphertext"].startswith("v1."):
            return None
        return StoredToken(user_id, **fields, usage_count=count, source="redis")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenRefused(f"Something else wrote the copy of {user_id}'s token in Redis. Delete its key.") from error
