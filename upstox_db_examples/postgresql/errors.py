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


_TOO_MANY = "has no free connections. Use a smaller pool_size, or a pooler, or wait until other programs close theirs."
_TRANSLATIONS: dict[str, tuple[type[StorageError], str]] = {
    errorcodes.INSUFFICIENT_PRIVILEGE: (
        ConfigurationError,
        "does not allow this role to do that. Do it as the owner of the tables. For storing and reading tokens, the "
        "owner can let the role in: upstox-db init --runtime-role ROLE, or init_database(runtime_role=...).",
    ),
    errorcodes.READ_ONLY_SQL_TRANSACTION: (StoreUnavailable, "is read-only, like a standby. Connect to the primary."),
    errorcodes.DISK_FULL: (StoreUnavailable, "has a full disk. Free some space and try again."),
    errorcodes.TOO_MANY_CONNECTIONS: (StoreUnavailable, _TOO_MANY),
    errorcodes.UNDEFINED_TABLE: (ConfigurationError, "is missing the store's tables. Run init_database()."),
    errorcodes.INVALID_SCHEMA_NAME: (ConfigurationError, "is missing the store's schema. Create it first."),
    errorcodes.UNTRANSLATABLE_CHARACTER: (
        ConfigurationError,
        "has a database whose encoding lacks a letter of this text. Move the store to a database with UTF8: upstox-db "
        "migrate.",
    ),
}
# An option in the connection string, or in the environment, with a value that cannot be right, and its name. libpq
# shows the value, which may be a misplaced password, so we name only the option. These come before the refusals below,
# because such a value may hold any words.
_INVALID_OPTIONS = [
    (r'invalid "?(\w+)"? value: "', r"\1"),
    (r'invalid integer value "[^\n]*" for connection option "(\w+)"', r"\1"),
    (r'invalid value for parameter "(\w+)"', r"\1"),
    (r'unrecognized configuration parameter "|invalid command-line argument', "options"),
    (r"definition of service |service file ", "service"),
    (r"(sslmode|gssencmode) value [^\n]* invalid", r"\1"),
    (r"weak sslmode ", "sslmode"),
    (r"invalid SSL protocol version range", "ssl_min_protocol_version"),
    (r"authentication method requirement ", "require_auth"),
    (r"channel binding (is )?required", "channel_binding"),
    (r"GSSAPI encryption required", "gssencmode"),
]
# A refused connection has no SQLSTATE in psycopg2, so only the server's words tell the reason. A server that speaks
# another language than English gives the general error below, which names no reason that may be wrong.
_REFUSALS: list[tuple[str, type[StorageError], str]] = [
    (
        r"server is (not )?in hot standby mode|session is (not )?read-only",
        StoreUnavailable,
        "is not the kind of server that target_session_attrs asks for. Try again after the failover, or correct that "
        "option.",
    ),
    (
        r'database "[^\n]*" does not exist|no such database',
        ConfigurationError,
        "has no database of this name (upper and lower case matter). Create it, or correct the connection string.",
    ),
    (
        r"too many clients|remaining connection slots|too many connections for|no more connections allowed",
        StoreUnavailable,
        _TOO_MANY,
    ),
    (
        r"authentication failed|no password supplied|role \"[^\n]*\" does not exist|no such user",
        ConfigurationError,
        "refused the role or its password. Check both.",
    ),
    (
        r"not permitted to log in|no pg_hba\.conf entry|pg_hba\.conf rejects|permission denied for database",
        ConfigurationError,
        "does not let this role in. It needs LOGIN, CONNECT on the database, and a line in the server's pg_hba.conf.",
    ),
    (
        r"unsupported startup parameter",
        ConfigurationError,
        "is behind a pooler that refuses a setting in the connection string. Set it for the role: ALTER ROLE ... SET.",
    ),
    (
        r"transaction blocks not allowed in statement pooling mode",
        ConfigurationError,
        "is behind a pooler in statement mode, where no lock can be held. Use its transaction or session mode.",
    ),
    # (An unexpected EOF means that the server died.)
    (
        r"certificate|not support SSL|SSL error: (?!unexpected eof)",
        ConfigurationError,
        "failed the TLS check. Fix its certificate (has it expired?), its host name, or the authority in sslrootcert. "
        "Without the check, somebody else could be listening.",
    ),
]
# Classes of errors that another attempt repeats: a wrong type, a column or a function that is missing, and so on.
_NEVER = (
    "0A",
    errorcodes.CLASS_DATA_EXCEPTION,
    errorcodes.CLASS_INVALID_CATALOG_NAME,
    errorcodes.CLASS_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION,
)


def translate_error(error: Exception, where: str, timeout: float, *, pooled: bool = False) -> StorageError:
    """Translate an error of psycopg2 or of the pool into one of ours that says what to do."""
    if isinstance(error, PoolClosed):
        return StoreUnavailable("This store is closed.")
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(f"No connection to {where} was free for {timeout:g} s. Use a larger pool_size.")
    if isinstance(error, TimeoutError) and pooled:
        return StoreUnavailable(
            f"The pooler at {where} gave no answer for {timeout:g} s. Perhaps it has too few connections: each login "
            "keeps one until it ends. Raise its default_pool_size."
        )
    if isinstance(error, TimeoutError):
        return StoreUnavailable(f"PostgreSQL at {where} gave no answer for {timeout:g} s. Try again.")
    state, text = getattr(error, "pgcode", None), str(error)
    if state is None:
        for pattern, option in _INVALID_OPTIONS:
            if found := re.search(pattern, text):
                return ConfigurationError(
                    f"PostgreSQL at {where} cannot be used with the option {found.expand(option)} as it is. Correct it "
                    "in the connection string or in the environment."
                )
        for pattern, kind, what in _REFUSALS:
            if re.search(pattern, text):
                return kind(f"PostgreSQL at {where} {what}")
        return StoreUnavailable(f"PostgreSQL at {where} cannot be reached, or refused the connection. Try again later.")
    if pooled and state == errorcodes.FEATURE_NOT_SUPPORTED:
        state = errorcodes.READ_ONLY_SQL_TRANSACTION  # A primary that became a standby refuses READ WRITE.
    if state in _TRANSLATIONS:
        kind, what = _TRANSLATIONS[state]
        return kind(f"PostgreSQL at {where} {what}")
    if state.startswith("23"):
        name = getattr(getattr(error, "diag", None), "constraint_name", None)
        return StoreUnavailable(f"The constraint {name} of PostgreSQL at {where} refused this (SQLSTATE {state}).")
    if state.startswith(_NEVER):
        return ConfigurationError(
            f"PostgreSQL at {where} cannot do this (SQLSTATE {state}). Another attempt would fail, too."
        )
    return StoreUnavailable(f"PostgreSQL at {where} reported an error (SQLSTATE {state}). Try again.")
