"""The PostgreSQL store's statements."""

from __future__ import annotations

from .schema import COPIED, ENTRY

_KNOWN = """id AS token_id, user_id, key_id, generation, created_at, expires_at, user_name, email,
              account, usage_count, issued_at, login_lock IS NOT NULL AS in_doubt"""
HANDED_OUT = f"""{_KNOWN},
              access_token AS ciphertext"""
# We get the shared lock exactly if the login with the exclusive one is over. This is a CASE, because PostgreSQL may
# evaluate the sides of an OR in any order: for a token without a mark, no lock is tried.
NO_DOUBT = """CASE WHEN login_lock IS NULL THEN true WHEN login_lock = 0 THEN false
                   ELSE NOT pg_try_advisory_xact_lock_shared(login_lock) END"""
_AUDIT = f"INSERT INTO upstox_token_audit ({ENTRY})"
# One statement reads, counts and audits. That is one round trip, and all of it happens or nothing does.
_FIND = f"""
WITH used AS (
    UPDATE upstox_tokens SET usage_count = usage_count + 1, last_used_at = %(now)s
    WHERE user_id = %(user_id)s AND is_active AND expires_at > %(alive_after)s
          AND {{condition}}
    RETURNING {HANDED_OUT}
), audited AS (
    {_AUDIT}
    SELECT token_id, user_id, 'used', %(actor)s, %(now)s,
           jsonb_build_object('usage_count', usage_count) || %(metadata)s::jsonb FROM used
)
SELECT * FROM used
"""
FIND = _FIND.format(condition=NO_DOUBT)
FIND_UNMARKED = _FIND.format(condition="login_lock IS NULL")
_ERASE = f"""
WITH erased AS (
    UPDATE upstox_tokens SET is_active = false, access_token = NULL, login_lock = NULL
    WHERE user_id = %(user_id)s AND is_active AND {{condition}}
    RETURNING id, user_id
)
{_AUDIT} SELECT id, user_id, %(action)s, %(actor)s, %(now)s, %(reason)s FROM erased RETURNING token_id
"""
ERASE = _ERASE.format(condition="true")
# A later token stays active, so that the insert that follows is refused.
ERASE_EARLIER = _ERASE.format(condition="generation < %(generation)s")
# The mark of a login without a user id that may replace this token; see core/backend.py. Its end brings the next one's.
_MARK_OF_RUNNING = """(SELECT sealed::bigint FROM upstox_login_notes
                WHERE starts_with(name, 'running ') AND NOT sealed = ANY (%(harmless)s) LIMIT 1)"""
LOGINS_THAT_ARE_OVER = """
SELECT sealed FROM upstox_login_notes
WHERE starts_with(name, 'running ') AND pg_try_advisory_xact_lock_shared(sealed::bigint)
"""
# A login without a user id begins and ends alone, so that no writer misses its mark or keeps it for ever.
_RUNNING_LOCK = 7095211384
INSERT = f"""
WITH stored AS (
    INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, user_name, email, broker, user_type,
                               products, exchanges, created_at, expires_at, account, metadata, issued_at, login_lock)
    VALUES (%(user_id)s, %(ciphertext)s, %(key_id)s, %(generation)s, %(user_name)s, %(email)s, %(broker)s,
            %(user_type)s, %(products)s, %(exchanges)s, %(created_at)s, %(expires_at)s, %(account)s, %(metadata)s,
            %(issued_at)s, {_MARK_OF_RUNNING})
    RETURNING id, user_id, login_lock
), audited AS (
    {_AUDIT} SELECT id, user_id, %(how)s, %(actor)s, %(created_at)s, %(details)s FROM stored
)
SELECT id AS token_id, login_lock IS NOT NULL AS in_doubt FROM stored
"""
# Each change of a token tells those who listen, as it commits, only that something is new; see notices.py. It names
# nobody, because everyone who may connect to the database may listen. (A trigger would need a schema step.)
CHANNEL = "upstox_tokens"
_TOLD = f"pg_notify('{CHANNEL}', '')"
# The statements in one message are one transaction and one round trip.
STORE = f"SELECT pg_advisory_xact_lock_shared({_RUNNING_LOCK}), {_TOLD};{ERASE_EARLIER};{INSERT}"
REVOKE = f"SELECT {_TOLD};{ERASE}"
# The constraints that refuse a second token of a generation, or one that is not the latest.
SUPERSEDED = ("upstox_tokens_user_id_generation_key", "one_active_token")
EXPIRE = f"""
WITH dead AS (
    SELECT id FROM upstox_tokens WHERE access_token IS NOT NULL AND expires_at <= %(now)s
    ORDER BY expires_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), erased AS (
    UPDATE upstox_tokens SET is_active = false, access_token = NULL, login_lock = NULL
    WHERE id IN (SELECT id FROM dead) RETURNING id, user_id
)
{_AUDIT} SELECT id, user_id, 'expired', %(actor)s, %(now)s, '{{}}' FROM erased RETURNING token_id
"""
RECORD = f"{_AUDIT} VALUES (NULL, %(user_id)s, %(action)s, %(actor)s, %(now)s, %(metadata)s)"
# An existing mark may be from a login that died. One column cannot hold two marks, so it becomes 0 for good. The rows
# are locked first, because an UPDATE that had to wait for a writer would miss the row that the writer made. They are
# locked in the order of their ids, so that two logins that mark everybody do not deadlock. Rows with a mark are locked
# too, because the mark may be gone in a moment.
_MARK = f"""
{RECORD};
SELECT id FROM upstox_tokens WHERE is_active AND {{whose}} ORDER BY id FOR NO KEY UPDATE;
UPDATE upstox_tokens SET login_lock = CASE WHEN login_lock IS NULL THEN %(key)s ELSE 0 END
WHERE is_active AND {{marked}} RETURNING user_id
"""
MARK = _MARK.format(whose="user_id = %(user_id)s", marked="user_id = %(user_id)s")
MARK_ALL = f"""
SELECT pg_advisory_xact_lock({_RUNNING_LOCK});
INSERT INTO upstox_login_notes (name, sealed) VALUES (%(note)s, (%(key)s)::text)
ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed;
{_MARK.format(whose="true", marked="login_lock IS NULL")}"""
# The planner drops the half of the user condition that does not apply.
_MARKED = "is_active AND login_lock = %(key)s AND (%(user_id)s IS NULL OR user_id = %(user_id)s)"
# Under the lock, because another login that ends at the same moment has to see the mark that this one puts in place.
UNMARK = f"""
SELECT pg_advisory_xact_lock({_RUNNING_LOCK});
SELECT id FROM upstox_tokens WHERE {_MARKED} ORDER BY id FOR NO KEY UPDATE;
DELETE FROM upstox_login_notes WHERE name = %(note)s;
UPDATE upstox_tokens SET login_lock = coalesce(%(mark)s, {_MARK_OF_RUNNING}) WHERE {_MARKED} RETURNING user_id
"""
# The mark of a running login stays, because that login may still kill the token, even if Upstox has just accepted it.
CLEAR_DOUBT = """
UPDATE upstox_tokens SET login_lock = NULL
WHERE user_id = %(user_id)s AND is_active AND generation = %(generation)s
      AND CASE WHEN coalesce(login_lock, 0) = 0 THEN true ELSE pg_try_advisory_xact_lock_shared(login_lock) END
RETURNING user_id
"""
TRUST = f"SELECT {_TOLD};{CLEAR_DOUBT}"
NOTIFY = "SELECT pg_notify(%(channel)s, '')"
IN_DOUBT = f"""
SELECT {HANDED_OUT} FROM upstox_tokens WHERE user_id = %(user_id)s AND is_active AND login_lock IS NOT NULL
"""
LOGINS_SINCE = """
SELECT performed_at FROM upstox_token_audit
WHERE action = 'login' AND performed_at > %(moment)s AND metadata ->> 'process' <> %(process)s
ORDER BY performed_at DESC LIMIT 100
"""
NOTES = """
SELECT extract(epoch FROM clock_timestamp())::float AS now,
       (SELECT coalesce(jsonb_object_agg(name, sealed), '{}') FROM upstox_login_notes WHERE name = ANY (%(names)s))
       AS notes
"""
WRITE_NOTE = """
INSERT INTO upstox_login_notes (name, sealed) VALUES (%(name)s, %(sealed)s)
ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed
"""
ERASE_NOTE = "DELETE FROM upstox_login_notes WHERE name = %(name)s"
HISTORY = """
SELECT id AS token_id, created_at, expires_at, is_active AND expires_at > %(now)s AS is_active, user_name, email,
       broker, usage_count, last_used_at
FROM upstox_tokens WHERE user_id = %(user_id)s ORDER BY generation DESC LIMIT %(limit)s
"""
STATISTICS = """
SELECT count(*) AS total_tokens, count(*) FILTER (WHERE is_active AND expires_at > %(now)s) AS active_tokens,
       coalesce(sum(usage_count), 0) AS total_usage, coalesce(avg(usage_count), 0)::float AS avg_usage_per_token,
       max(created_at) AS last_generation, max(last_used_at) AS last_usage
FROM upstox_tokens WHERE user_id = %(user_id)s
"""
AUDIT = """
SELECT a.action, a.performed_at, a.actor, a.metadata, a.user_id, a.token_id, t.created_at AS token_created
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE a.user_id = %(user_id)s ORDER BY a.performed_at DESC, a.id DESC LIMIT %(limit)s
"""
# Ordered by id, because old entries have low ids. An index on the time would cost something at every read.
FORGET = """
DELETE FROM upstox_token_audit
WHERE id IN (SELECT id FROM upstox_token_audit WHERE performed_at < %(before)s ORDER BY id LIMIT %(limit)s) RETURNING id
"""
NEWEST = f"""
SELECT {_KNOWN}, coalesce(access_token, '') AS ciphertext FROM upstox_tokens WHERE user_id = %(user_id)s
ORDER BY generation DESC LIMIT 1
"""
STATES = """
SELECT asked.user_id, t.generation, t.is_active AS active, t.login_lock IS NOT NULL AS in_doubt
FROM unnest(%(user_ids)s) AS asked (user_id), LATERAL (
    SELECT generation, is_active, login_lock FROM upstox_tokens AS t WHERE t.user_id = asked.user_id
    ORDER BY generation DESC LIMIT 1
) AS t
"""
OF_ACCOUNT = f"""
SELECT {HANDED_OUT} FROM upstox_tokens WHERE account = %(account)s AND is_active ORDER BY id DESC LIMIT 100
"""
# We no longer use these names, but somebody may import them.
USE, USE_UNMARKED = FIND, FIND_UNMARKED
GENERATION = "SELECT coalesce(max(generation), 0) AS latest FROM upstox_tokens WHERE user_id = %(user_id)s"
USER_OF_ACCOUNT = "SELECT user_id FROM upstox_tokens WHERE account = %(account)s ORDER BY id DESC LIMIT 1"
# The key is the ciphertext's own. An earlier version could record another one beside it.
_KEY = "split_part(access_token, '.', 2)"
OTHER_KEYS = f"""
SELECT {HANDED_OUT} FROM upstox_tokens
WHERE is_active AND user_id > %(after)s AND (key_id <> %(key_id)s OR {_KEY} <> %(key_id)s)
ORDER BY user_id LIMIT %(limit)s
"""
REPLACE = """
UPDATE upstox_tokens AS t SET access_token = new.ciphertext, key_id = new.key_id
FROM unnest(%(ids)s, %(old)s, %(new)s, %(key_ids)s) AS new (id, old, ciphertext, key_id)
WHERE t.id = new.id AND t.access_token = new.old RETURNING t.id
"""
COUNT_KEYS = f"""
SELECT coalesce(nullif({_KEY}, ''), key_id) AS key_id, count(*) FROM upstox_tokens WHERE is_active GROUP BY 1
"""
# This jumps from one user to the next, because the audit trail may have millions of entries and few users.
USERS = """
WITH RECURSIVE stored (user_id) AS (
    SELECT min(user_id) FROM upstox_tokens WHERE user_id > %(after)s UNION ALL
    SELECT (SELECT min(t.user_id) FROM upstox_tokens AS t WHERE t.user_id > stored.user_id) FROM stored
    WHERE user_id IS NOT NULL
), audited (user_id) AS (
    SELECT min(user_id) FROM upstox_token_audit WHERE user_id > %(after)s UNION ALL
    SELECT (SELECT min(a.user_id) FROM upstox_token_audit AS a WHERE a.user_id > audited.user_id) FROM audited
    WHERE user_id IS NOT NULL
)
SELECT user_id FROM (SELECT user_id FROM stored LIMIT %(limit)s) AS s WHERE user_id IS NOT NULL UNION
SELECT user_id FROM (SELECT user_id FROM audited LIMIT %(limit)s) AS a WHERE user_id IS NOT NULL
ORDER BY 1 LIMIT %(limit)s
"""
TOKENS_OF = f"""
SELECT {COPIED}, coalesce(access_token, '') AS ciphertext, login_lock IS NOT NULL AS in_doubt
FROM upstox_tokens WHERE user_id = %(user_id)s ORDER BY generation
"""
# No index serves IS NOT DISTINCT FROM. Here the planner drops the half of the OR that does not apply.
ENTRIES_OF = """
SELECT a.action, a.actor, a.performed_at, a.metadata, t.generation, a.id AS position
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE (a.user_id = %(user_id)s OR (%(user_id)s IS NULL AND a.user_id IS NULL))
      AND (a.performed_at, a.id) > (%(performed_at)s, %(position)s)
ORDER BY a.performed_at, a.id LIMIT %(limit)s
"""
# The statements in one message are one transaction. The merged token gets the mark of a login that is running now.
PUT_IN = f"""
SELECT pg_advisory_xact_lock_shared({_RUNNING_LOCK}), {_TOLD};
INSERT INTO upstox_tokens AS t ({COPIED}, access_token, is_active, login_lock)
SELECT {COPIED}, access_token, is_active, login_lock FROM jsonb_populate_recordset(NULL::upstox_tokens, %(tokens)s)
ORDER BY generation
ON CONFLICT (user_id, generation) DO UPDATE SET
    access_token = CASE WHEN excluded.is_active THEN t.access_token END, is_active = t.is_active AND excluded.is_active,
    login_lock = CASE WHEN excluded.is_active THEN t.login_lock END,
    usage_count = greatest(t.usage_count, excluded.usage_count),
    last_used_at = greatest(t.last_used_at, excluded.last_used_at);
UPDATE upstox_tokens SET login_lock = running.mark
FROM (SELECT sealed::bigint AS mark FROM upstox_login_notes
      WHERE starts_with(name, 'running ') AND NOT pg_try_advisory_xact_lock_shared(sealed::bigint) LIMIT 1) AS running
WHERE user_id = %(user_id)s AND is_active AND login_lock IS NULL;
{_AUDIT}
SELECT t.id, %(user_id)s, e.entry ->> 'action', e.entry ->> 'actor', (e.entry ->> 'performed_at')::timestamptz,
       e.entry -> 'metadata'
FROM jsonb_array_elements(%(entries)s) WITH ORDINALITY AS e (entry, nth)
LEFT JOIN upstox_tokens AS t ON t.user_id = %(user_id)s AND t.generation = (e.entry ->> 'generation')::integer
ORDER BY e.nth ON CONFLICT DO NOTHING
"""
