"""The settings of a session that our promises need, whatever a role, a database, the server or the environment has set.

They are set in one message when a connection is made, so that a read stays one message. (In the connection string, as
`options=-c ...`, they would need no message at all, but PgBouncer refuses that.) Behind a pooler the next transaction
may run in another session, and this one may serve other programs. So there each message sets them for itself alone.
"""

from __future__ import annotations

# Our own deadline ends each wait. A server that ended one earlier would break off the wait for another login, or free
# the lock of a login that is under way.
_TIMEOUTS = {
    "statement_timeout": 0,
    "lock_timeout": 0,
    "idle_in_transaction_session_timeout": 0,
    "idle_session_timeout": 140000,
    "transaction_timeout": 170000,
}
_TRANSACTION = {
    # At a stricter level, reads that come at once fail with 40001, because each counts itself in the same row.
    "default_transaction_isolation": "'read committed'",
    "default_transaction_deferrable": "off",
    "default_transaction_read_only": "off",  # A standby stays read-only all the same.
}
_KEEPALIVES = {
    # With keepalives, the server notices within half a minute that the machine of a lock's holder is gone.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# Anything less than "on" loses acknowledged tokens when a server dies. "remote_apply" promises more, so it stays.
_SYNCHRONOUS = """
SELECT set_config('synchronous_commit', 'on', {local}) WHERE current_setting('synchronous_commit') <> 'remote_apply'
"""

# The schema that has the tables, or otherwise the one in which they would be made.
FIND_SCHEMA = """
SELECT coalesce((SELECT n.nspname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                 WHERE c.oid = to_regclass('upstox_schema')), current_schema()) AS schema, pg_backend_pid() AS pid,
       pg_is_in_recovery() AS standby
"""
# What was set for this role and database and differs from what we set, and what we cannot set.
_UNSAFE = "name IN ('fsync', 'full_page_writes')"
DESCRIBE = f"""
SELECT coalesce(jsonb_object_agg(name, reset_val || coalesce(unit, '')) FILTER (WHERE NOT {_UNSAFE}), '{{}}')
       AS overridden, coalesce(jsonb_agg(name) FILTER (WHERE {_UNSAFE}), '[]') AS off
FROM pg_settings
WHERE name IN ({", ".join(f"'{name}'" for name in [*_TIMEOUTS, *_TRANSACTION, "synchronous_commit"])})
      AND setting <> reset_val OR {_UNSAFE} AND setting = 'off'
"""


def session_settings(server_version: int, schema: str) -> str:
    """Return the message that makes a session ours. The store keeps to the schema that it found when it was opened."""
    ours = _timeouts(server_version) | _TRANSACTION | _KEEPALIVES | {"search_path": quote(schema)}
    last = [_SYNCHRONOUS.format(local="false"), "SELECT pg_backend_pid() AS pid"]
    return "; ".join([*(f"SET {name} = {value}" for name, value in ours.items()), *last])


def transaction_settings(server_version: int, *, schema: str | None, standby: bool, **_: object) -> str:
    """Return what comes first in each message, because a pooler is in between.

    Args:
        standby: the server is a standby, which refuses to be asked for more than reading.
    """
    # The level of a transaction that has begun no longer follows the default. The timeouts come first, because an
    # earlier one counts until then.
    modes = "ISOLATION LEVEL READ COMMITTED, NOT DEFERRABLE" + ("" if standby else ", READ WRITE")
    ours = _timeouts(server_version) | {"search_path": quote(schema or "")}
    each = [f"SET LOCAL {name} = {value}" for name, value in ours.items() if name != "idle_session_timeout"]
    return "; ".join([*each, f"SET TRANSACTION {modes}", _SYNCHRONOUS.format(local="true")])


def _timeouts(server_version: int) -> dict[str, str]:
    return {name: "0" for name, since in _TIMEOUTS.items() if server_version >= since}


def quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
