"""The additional PostgreSQL statements of the hybrid store."""

from __future__ import annotations

from ..postgresql.queries import HANDED_OUT, NO_DOUBT

LOOK = f"""
SELECT {HANDED_OUT} FROM upstox_tokens
WHERE user_id = %(user_id)s AND is_active AND expires_at > %(alive_after)s AND {NO_DOUBT}
"""
ACTIVE_USERS = "SELECT user_id FROM upstox_tokens WHERE is_active"
MARK_OF = "SELECT login_lock FROM upstox_tokens WHERE user_id = %(user_id)s AND is_active AND login_lock IS NOT NULL"
IS_FOLDED_ONCE = "SELECT to_regclass('one_entry_a_use') IS NOT NULL AS there"
# The audit trail knows which uses it holds, so folding a use twice changes nothing.
FOLDED_ONCE = """
CREATE UNIQUE INDEX one_entry_a_use ON upstox_token_audit ((metadata ->> 'use')) WHERE metadata ->> 'use' IS NOT NULL
"""
FOLD = """
WITH uses AS (
    SELECT t.id AS token_id, u.user_id, u.actor, u.at, u.use
    FROM unnest(%(tokens)s::bigint[], %(users)s, %(actors)s, %(times)s::timestamptz[], %(uses)s)
         WITH ORDINALITY AS u (token_id, user_id, actor, at, use, nth)
    JOIN upstox_tokens AS t ON t.id = u.token_id ORDER BY u.nth
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
