"""Errors of psycopg2 become ours here."""

from __future__ import annotations

import re

from psycopg2 import errorcodes

from ..core.errors import ConfigurationError, StorageError, StoreUnavailable
from ..core.pool import PoolClosed, PoolTimeout


def violated_constraint(error: StorageError) -> str | None:
    """Return the constraint that refused a statement."""
    diagnosis = getattr(error.__cause__, "diag", None)
    return getattr(diagnosis, "constraint_name", None)


_TRANSLATIONS: dict[str, tuple[type[StorageError], str]] = {
    errorcodes.INSUFFICIENT_PRIVILEGE: (
        ConfigurationError,
        "does not allow this role to do that. The owner can grant it with init_database(runtime_role=...).",
    ),
    errorcodes.READ_ONLY_SQL_TRANSACTION: (StoreUnavailable, "is read-only, like a standby. Connect to the primary."),
    errorcodes.DISK_FULL: (StoreUnavailable, "has a full disk. Free some space and try again."),
    errorcodes.TOO_MANY_CONNECTIONS: (
        StoreUnavailable,
        "has no free connections. Use a smaller pool_size, or a pooler.",
    ),
    errorcodes.UNDEFINED_TABLE: (ConfigurationError, "is missing the store's tables. Run init_database()."),
    errorcodes.UNDEFINED_OBJECT: (ConfigurationError, "does not know that role. Create it first."),
}


def translate_error(error: Exception, where: str, timeout: float) -> StorageError:
    """Translate an error of psycopg2 or of the pool into one of ours that says what to do."""
    if isinstance(error, PoolClosed):
        return StoreUnavailable("This store is closed.")
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(f"No connection to {where} was free for {timeout:g} s. Use a larger pool_size.")
    if isinstance(error, TimeoutError):
        return StoreUnavailable(f"PostgreSQL at {where} gave no answer for {timeout:g} s. Try again.")
    state, text = getattr(error, "pgcode", None), str(error)
    # (An unexpected EOF means that the server died.)
    if state is None and re.search(r"certificate|not support SSL|SSL error: (?!unexpected eof)", text):
        return ConfigurationError(
            f"PostgreSQL at {where} failed the TLS check. Fix its certificate, its host name, or the authority in "
            "sslrootcert. Without the check, somebody else could be listening."
        )
    if state is None and "authentication failed" in text:
        return ConfigurationError(f"PostgreSQL at {where} refused the role or its password. Check both.")
    if state in _TRANSLATIONS:
        kind, what = _TRANSLATIONS[state]
        return kind(f"PostgreSQL at {where} {what}")
    if state and state.startswith("23"):
        name = getattr(getattr(error, "diag", None), "constraint_name", None)
        return StoreUnavailable(f"The constraint {name} of PostgreSQL at {where} refused this (SQLSTATE {state}).")
    if state is None:
        return StoreUnavailable(
            f"PostgreSQL at {where} cannot be reached, or refused the role or its password. Check both and try again."
        )
    return StoreUnavailable(f"PostgreSQL at {where} reported an error (SQLSTATE {state}). Try again.")
