"""Pattern 5: SQLite with a bounded pool of connections."""

from .store import PooledConnections, PooledUpstoxStorage

__all__ = [
    "PooledConnections",
    "PooledUpstoxStorage",
]
