"""Pattern 2: PostgreSQL with an audit trail. Many machines share one truth, and see who used which token when."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar, Unpack

from psycopg2.extensions import connection

from ..core.checks import require_pool_size, require_positive
from ..core.settings import Options, Settings
from ..core.store import TokenStorage
from ..core.token import Secret
from .backend import PostgreSQLBackend
from .connections import PostgreSQLConnections


class PostgreSQLUpstoxStorage(TokenStorage):
    """Tokens in PostgreSQL 13 or newer.

    A pooler such as PgBouncer works in session mode and in transaction mode. Each login keeps one of its sessions until
    it ends, so `default_pool_size` has to be larger than the number of users who log in at the same time.

    Args:
        connection_string: a URL or a libpq string, as `psycopg2.connect` takes it. Several hosts, TLS and a password
            file work as libpq documents them.
        pool_size: the maximum number of connections. A login uses one more to hold its lock; up to `pool_size` of
            those are kept as well.
        timeout: seconds for each answer of the server, and for a free connection of the pool.
        options: see `Options`.

    Raises:
        ConfigurationError: the connection string, the role or the schema is not usable.
        StoreUnavailable: the server cannot be reached.

    Example:
        >>> from upstox_db_examples import PostgreSQLUpstoxStorage
        >>> with PostgreSQLUpstoxStorage("postgresql://user:password@host/database") as storage:
        ...     result = storage.get_or_create_token("AB1234")
        ...     [entry["action"] for entry in storage.get_audit_trail("AB1234")]
        ['used', 'created', 'login']
    """

    backend: PostgreSQLBackend
    backend_class: ClassVar = PostgreSQLBackend

    def __init__(
        self, connection_string: str, *, pool_size: int = 5, timeout: float = 5.0, **options: Unpack[Options]
    ) -> None:
        dsn = Secret(connection_string)
        del connection_string  # A traceback that prints local variables must not show its password.
        require_pool_size(pool_size)
        require_positive("timeout", timeout)
        settings = Settings(type(self).__name__, options)
        self._connections = PostgreSQLConnections(dsn, pool_size, timeout)
        super().__init__(self.backend_class(self._connections, settings.context), settings)

    def get_connection(self) -> AbstractContextManager[connection]:
        """Open an ordinary psycopg2 connection of your own, outside the pool. Commit what you write."""
        return self._connections.ordinary()
