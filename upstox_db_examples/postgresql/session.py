"""The settings of a session that our promises need, whatever a role, a database, the server or the environment has set.

They are set in one message when a connection is made, so that a read stays one message. (In the connection string, as
`options=-c ...`, they would need no message at all, but PgBouncer refuses that.)
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
_OTHERS = {
    # At a stricter level, reads that come at once fail with 40001, because each counts itself in the same row.
    "default_transaction_isolation": "'read committed'",
    "default_transaction_deferrable": "off",
    "default_transaction_read_only": "off",  # A standby stays read-only all the same.
    # With keepalives, the server notices within half a minute that the machine of a lock's holder is gone.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# Anything less than "on" loses acknowledged tokens when a server dies. "remote_apply" promises more, so it stays.
_SYNCHRONOUS = """
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') <> 'remote_apply'
"""

# The schema that has the tables, or otherwise the one in which they would be made.
FIND_SCHEMA = """
SELECT coalesce((SELECT n.nspname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
                 WHERE c.oid = to_regclass('upstox_schema')), current_schema()) AS schema
"""
# What was set for this role and database and differs from what we set, and what we cannot set.
_UNSAFE = "name IN ('fsync', 'full_page_writes')"
DESCRIBE = f"""
SELECT coalesce(jsonb_object_agg(name, reset_val || coalesce(unit, '')) FILTER (WHERE NOT {_UNSAFE}), '{{}}')
       AS overridden, coalesce(jsonb_agg(name) FILTER (WHERE {_UNSAFE}), '[]') AS off
FROM pg_settings
WHERE name IN ({", ".join(f"'{name}'" for name in [*_TIMEOUTS, *_OTHERS, "synchronous_commit"])})
      AND name NOT LIKE 'tcp%' AND setting <> reset_val OR {_UNSAFE} AND setting = 'off'
"""


def settings(server_version: int, schema: str) -> str:
    """Return the message that makes a session ours. The store keeps to the schema that it found when it was opened."""
    ours = {name: "0" for name, since in _TIMEOUTS.items() if server_version >= since} | _OTHERS
    ours["search_path"] = quote(schema)
    return "; ".join([*(f"SET {name} = {value}" for name, value in ours.items()), _SYNCHRONOUS])


def quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
