"""Pattern 4: Redis in front of PostgreSQL."""

from ..postgresql.queries import HANDED_OUT
from .client import runtime_acl
from .fold import FOLD_AT
from .queries import (
    ACTIVE_USERS,
    FOLD,
    FOLDED_ONCE,
    LOOK,
    MARK_OF,
)
from .store import HybridUpstoxStorage

__all__ = [
    "ACTIVE_USERS",
    "FOLD",
    "FOLDED_ONCE",
    "FOLD_AT",
    "HANDED_OUT",
    "LOOK",
    "MARK_OF",
    "HybridUpstoxStorage",
    "runtime_acl",
]
