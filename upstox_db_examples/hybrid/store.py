"""Pattern 4: Redis in front of PostgreSQL. PostgreSQL has the truth, and Redis answers most reads in one round trip."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import ClassVar, Unpack

from psycopg2.extensions import connection

from ..core.checks import require_pool_size, require_positive
from ..core.errors import StoreUnavailable
from ..core.settings import Options, Settings
from ..core.store import TokenStorage
from ..core.token import Secret
from ..postgresql.backend import PostgreSQLBackend
from ..postgresql.connections import PostgreSQLConnections
from .backend import HybridBackend
from .checks import names_a_database
from .client import Config, client_of
from .redis import RedisTokens

logger = logging.getLogger(__name__)


class HybridUpstoxStorage(TokenStorage):
    """Tokens in PostgreSQL, with copies of their ciphertexts in Redis.

    A copy is believed for `believed` seconds; then one read asks PostgreSQL again. When a token is stored or revoked,
    the old copy is out of Redis before the call returns: first a tombstone replaces the copy, then PostgreSQL commits,
    then the new copy is put there. If Redis cannot be reached, the call waits `believed` seconds longer, so that
    cached copies expire. After that, nobody believes an older copy, even if Redis comes back with one.

    Before a login, the copies of all tokens that it may replace are removed from Redis in the same way. No copy is put
    there until it is known how the login ended, because Redis cannot tell whether a login is still running.

    Without Redis, PostgreSQL does everything. Without PostgreSQL, Redis still answers reads, even from copies older
    than `believed`; nothing can be stored then, and no login is spent. `result["source"]` says who answered.

    A Redis that may throw keys away when its memory is full (any maxmemory-policy but noeviction) is treated as one
    that does not answer. `get_storage_status` says so.

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
        redis_prefix: the prefix of all keys in Redis. The keys also carry a name that each database has for itself, so
            installations may share a Redis. With a prefix for each, a program of one of them can start and read while
            PostgreSQL is down; otherwise it would not know which copies are its own.
        options: `pool_size`, `timeout`, and see `Options`.

    Raises:
        ConfigurationError: PostgreSQL or Redis refuses its configuration.
        StoreUnavailable: neither PostgreSQL nor Redis can be reached.

    Example:
        >>> from upstox_db_examples import HybridUpstoxStorage
        >>> with HybridUpstoxStorage(
        ...     "redis://:password@host/0", "postgresql://user:password@host/database"
        ... ) as storage:
        ...     result = storage.get_or_create_token("AB1234")
        ...     storage.get_valid_token("AB1234")["source"]
        'redis'
    """

    backend: HybridBackend
    backend_class: ClassVar = HybridBackend
    postgres_class: ClassVar = PostgreSQLBackend

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
        dsn = Secret(postgres_config)
        # A traceback that prints local variables must not show a password.
        del postgres_config
        try:
            times = {
                "believed": believed,
                "redis_timeout": redis_timeout,
                "redis_pause": redis_pause,
                "timeout": timeout,
            }
            for name, seconds in times.items():
                require_positive(name, seconds)
            require_pool_size(pool_size)
            settings = Settings(type(self).__name__, options)
            # (None makes the error below, whose traceback does not show the configuration.)
            client, owned = (None, True) if names_a_database(redis_config) else client_of(redis_config, redis_timeout)
        finally:
            del redis_config
        redis = RedisTokens(
            client,
            owned,
            timeout=redis_timeout,
            pause=redis_pause,
            believed=believed,
            replicas=replicas,
            prefix=redis_prefix,
        )
        self._connections = PostgreSQLConnections(dsn, pool_size, timeout)
        postgres = self.postgres_class(self._connections, settings.context)
        backend = self.backend_class(postgres, redis, believed, buried_for=max(2 * timeout, believed))
        try:
            super().__init__(backend, settings)
        except StoreUnavailable as error:
            if not redis.answers():
                self.close()
                raise
            # If a program starts while PostgreSQL is down, it reads from Redis, as a running program does.
            backend.leave_postgresql_alone()
            logger.warning("PostgreSQL is not available, so reads come from Redis alone: %s", error)

    def init_postgres(self) -> None:
        """Make the tables, as `init_database` does."""
        self.init_database()

    def get_connection(self) -> AbstractContextManager[connection]:
        """Open an ordinary psycopg2 connection to PostgreSQL, outside the pool. Commit what you write."""
        return self._connections.ordinary()

    def fold_uses(self) -> int:
        """Copy the uses that wait in Redis to PostgreSQL, each exactly once, even if a process is killed meanwhile.

        Returns:
            how many were new there.
        """
        return self.backend.fold_uses()
