"""The copies of tokens in Redis. We ask them first, may lose them at any time, and never believe them for long."""

from __future__ import annotations

import json
import logging
import ssl
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
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from ..core.errors import ConfigurationError, StoreUnavailable, TokenRefused
from ..core.forks import no_fork, start_anew_in_children
from ..core.token import StoredToken
from .client import NO_CONFIGURATION, Client

logger = logging.getLogger(__name__)

COPIED = ("ciphertext", "key_id", "generation", "user_name", "email", "account")
LUA = Path(__file__).parent / "lua"

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


class Use(NamedTuple):
    """A use that was counted in Redis. `entry` is its id in the stream, and `use_id` is globally unique."""

    entry: str
    token: int
    user: str
    actor: str
    at: datetime
    use_id: str


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
        self._uses = f"{self._prefix}uses"
        self._read_and_count = self.client.register_script((LUA / "use.lua").read_text())
        self._put = self.client.register_script((LUA / "put.lua").read_text())
        self._drop = self.client.register_script((LUA / "drop.lua").read_text())
        self._dig_up = self.client.register_script((LUA / "dig_up.lua").read_text())
        self._closed = self._failed = False
        self._ask_again_at = 0.0
        self.start_anew()
        start_anew_in_children(self)
        self.ask(self._refuse_a_wrong_configuration)

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
        keys = [*self.keys_of(user_id), self._uses]
        values: list[str | int] = [user_id, _seconds(alive_after), actor, _seconds(now), use_id, int(insist)]
        answer = self.ask(lambda: self._read_and_count(keys=keys, args=values), insist=insist)
        if answer is None:
            return Found("no answer")
        what, clock, *more = answer
        if _text(what) != "used":
            return Found(_text(what), int(clock))  # type: ignore[arg-type]
        text, count, waiting = more
        token = _load(user_id, _text(text), int(count))
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
        keys = self.keys_of(token.user_id)
        values: list[str | int] = [_dump(token), token.generation, _seconds(token.expires_at), str(token.token_id)]
        values += [token.usage_count, lifetime, self._believed_ms, since, tombstone]
        answer = self.ask(lambda: self._put(keys=keys, args=values), insist=not since)
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
            return not self._replicas or int(answers[-1]) >= self._replicas

        return Buried(tombstone, bool(self.ask(write, insist=True)))

    def dig_up(self, user_ids: Iterable[str], tombstone: str) -> None:
        """Remove this tombstone wherever it still is, so that readers may put copies there again."""
        keys = [self.keys_of(user_id)[0] for user_id in user_ids]
        self.ask(lambda: self._dig_up(keys=keys, args=[tombstone, self._believed_ms]))

    def drop(self, user_id: str) -> None:
        """Remove a copy that is no longer believed, because PostgreSQL has no such token."""
        self.ask(lambda: self._drop(keys=self.keys_of(user_id)[:1]))

    def list_uses(self, limit: int) -> list[Use]:
        """Return uses that wait to be folded into PostgreSQL, oldest first."""
        entries = self.ask(lambda: self.client.xrange(self._uses, count=limit)) or []
        uses, foreign = [], []
        for entry, fields in entries:
            try:
                uses.append(_read_use(_text(entry), {_text(k): _text(v) for k, v in fields.items()}))
            except (KeyError, ValueError, OverflowError, OSError):
                foreign.append(entry)
        if foreign:
            logger.warning("%s entries of %s did not come from this package. Deleting them.", len(foreign), self._uses)
            self.ask(lambda: self.client.xdel(self._uses, *foreign))
        return uses

    def forget_uses(self, uses: Iterable[Use]) -> None:
        self.ask(lambda: self.client.xdel(self._uses, *(use.entry for use in uses)))

    def status(self) -> dict[str, Any]:
        """Return `latency_ms`, `role`, `uses_waiting`, and `in_use`, the number of connections in use.

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
            waiting = self.client.xlen(self._uses)
            return {"latency_ms": round(latency, 2), "role": role, "uses_waiting": waiting, "in_use": in_use}
        except NoPermissionError:
            why = "does not give this user all the rights that the store needs. Use the rules of runtime_acl()"
        except (OutOfMemoryError, ReadOnlyError) as error:
            why = f"does not accept writes ({type(error).__name__}). Check that it has free memory and is not a replica"
        except NO_ANSWER as error:
            why = f"gave no answer ({type(error).__name__}). Check that it is running"
        # We raise out here, so that our error has no cause: a cluster's frames hold the password.
        raise StoreUnavailable(f"Redis {why}.")

    def answers(self) -> bool:
        return self.ask(self.client.ping, insist=True) is not None

    def close(self) -> None:
        self._closed = True
        if self._owned:
            self.client.close()

    def _refuse_a_wrong_configuration(self) -> None:
        """Check the configuration, only at the start. If the password changes later, PostgreSQL takes over."""
        try:
            self.client.ping()
            return
        except (ValueError, TypeError):  # redis-py checks some options, such as the port, only when it connects.
            raise ConfigurationError(NO_CONFIGURATION) from None
        except (AuthenticationError, NoPermissionError):
            wrong = "the user or the password"
        except RedisConnectionError as error:
            if not isinstance(error.__context__, ssl.SSLError):
                raise
            wrong = "TLS (the certificate or its authority)"
        # We raise out here, so that our error has no cause: redis-py's frames hold the password.
        raise ConfigurationError(f"The connection to Redis failed because of {wrong}. Check redis_config.")

    def keys_of(self, user_id: str) -> list[str]:
        return [f"{self._prefix}token:{user_id}", f"{self._prefix}count:{user_id}"]

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


def _read_use(entry: str, fields: dict[str, str]) -> Use:
    at = datetime.fromtimestamp(int(fields["at"]), UTC)
    token = int(fields["token"])
    if token >= 2**63:
        raise ValueError
    return Use(entry, token, fields["user"], fields["actor"], at, fields["use"])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
