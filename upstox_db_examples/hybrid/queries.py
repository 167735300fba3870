"""The additional PostgreSQL statements of the hybrid store."""

from __future__ import annotations

from ..postgresql.queries import HANDED_OUT, NO_DOUBT

LOOK = f"""
SELECT {HANDED_OUT} FROM upstox_tokens
WHERE user_id = %(user_id)s AND is_active AND expires_at > %(alive_after)s AND {NO_DOUBT}
"""
ACTIVE_USERS = "SELECT user_id FROM upstox_tokens WHERE is_active"
MARK_OF = "SELECT login_lock FROM upstox_tokens WHERE user_id = %(user_id)s AND is_active AND login_lock IS NOT NULL"
IS_READY = """
SELECT to_regclass('one_entry_a_use') IS NOT NULL AS folded_once,
       EXISTS (SELECT FROM pg_class WHERE oid = to_regclass('upstox_database') AND relispopulated) AS named
"""
# The audit trail knows which uses it holds, so folding a use twice changes nothing.
FOLDED_ONCE = """
CREATE UNIQUE INDEX one_entry_a_use ON upstox_token_audit ((metadata ->> 'use')) WHERE metadata ->> 'use' IS NOT NULL
"""
# The keys in Redis carry a name that each database has for itself. pg_dump copies how a materialized view is defined,
# not its rows, so a restored database makes its own name. A standby and pg_upgrade keep it. Each schema has its own.
# We rejected pg_control_system(): where only some roles may call it, the programs of one store would not agree.
NAME_DATABASE = """
CREATE MATERIALIZED VIEW IF NOT EXISTS upstox_database AS SELECT gen_random_uuid() AS name;
REFRESH MATERIALIZED VIEW upstox_database;
GRANT SELECT ON upstox_database TO PUBLIC
"""
MAY_READ_NAME = "SELECT has_table_privilege(%(role)s, 'upstox_database', 'SELECT') AS granted"
GRANT_NAME = "GRANT SELECT ON upstox_database TO {role}"
# CREATE DATABASE ... TEMPLATE copies the rows of the view too, and gives the copy another oid.
DATABASE = """
SELECT v.name::text AS name, d.oid::text AS oid FROM upstox_database AS v, pg_database AS d
WHERE d.datname = current_database()
"""
# Anybody who may write to Redis can write a use there. PostgreSQL confirms the token, its user, and that it was alive.
_CONFIRMED = """
    FROM unnest(%(tokens)s::bigint[], %(users)s, %(actors)s, %(times)s::timestamptz[], %(uses)s)
         WITH ORDINALITY AS u (token_id, user_id, actor, at, use, nth)
    JOIN upstox_tokens AS t ON t.id = u.token_id AND t.user_id = u.user_id AND u.at < t.expires_at
"""
CONFIRMED = f"SELECT u.nth {_CONFIRMED}"
FOLD = f"""
WITH uses AS (
    SELECT t.id AS token_id, t.user_id, u.actor, u.at, u.use {_CONFIRMED} ORDER BY u.nth
), added AS (
    INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)
    SELECT token_id, user_id, 'used', actor, at, jsonb_build_object('use', use) FROM uses
    ON CONFLICT ((metadata ->> 'use')) WHERE metadata ->> 'use' IS NOT NULL DO NOTHING
    RETURNING token_id, performed_at
), counted AS (
    SELECT token_id, count(*) AS uses, max(performed_at) AS last FROM added GROUP BY token_id ORDER BY token_id
)
UPDATE upstox_tokens AS t
SET usage_count = t.usage_count + c.uses, last_used_at = greatest(t.last_used_at, c.last)
FROM counted AS c WHERE t.id = c.token_id RETURNING c.uses
"""
