"""Pattern 3: MongoDB with a TTL."""

from .schema import runtime_role
from .store import ATTEMPTS, MOVE_AFTER, MongoUpstoxStorage

__all__ = [
    "ATTEMPTS",
    "MOVE_AFTER",
    "MongoUpstoxStorage",
    "runtime_role",
]
