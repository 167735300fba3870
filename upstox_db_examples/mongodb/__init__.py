"""Pattern 3: MongoDB with a TTL."""

from .backend import MOVE_AFTER
from .documents import ATTEMPTS
from .schema import runtime_role
from .store import MongoUpstoxStorage

__all__ = [
    "ATTEMPTS",
    "MOVE_AFTER",
    "MongoUpstoxStorage",
    "runtime_role",
]
