"""The statements of the SQLite store, and its schema."""

from __future__ import annotations

# Times are whole seconds since 1970, UTC. SQLite has no time type, and the guide's query handed out dead tokens because
# it stored local time as text. A row is active exactly if it holds a ciphertext, so history cannot leak one.
SCHEMA = """
CREATE TABLE upstox_tokens (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id      TEXT    NOT NULL,
    access_token TEXT,
    key_id       TEXT    NOT NULL,
    generation   INTEGER NOT NULL,
    user_name    TEXT,
    email        TEXT,
    broker       TEXT,
    user_type    TEXT,
    products     TEXT    NOT NULL CHECK (json_valid(products)),
    exchanges    TEXT    NOT NULL CHECK (json_valid(exchanges)),
    is_active    INTEGER NOT NULL DEFAULT 1,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    account      TEXT,
    metadata     TEXT    NOT NULL CHECK (json_valid(metadata)),
    usage_count  INTEGER NOT NULL DEFAULT 0,
    last_used_at INTEGER,
    UNIQUE (user_id, generation),
    CHECK (is_active = (access_token IS NOT NULL))
) STRICT;
CREATE UNIQUE INDEX one_active_token ON upstox_tokens (user_id) WHERE is_active;
CREATE INDEX active_by_expiry ON upstox_tokens (expires_at) WHERE is_active;
CREATE INDEX active_by_key ON upstox_tokens (key_id) WHERE is_active;
CREATE INDEX latest_of_account ON upstox_tokens (account, id) WHERE account IS NOT NULL;
CREATE TABLE upstox_token_audit (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    token_id     INTEGER REFERENCES upstox_tokens (id),
    user_id      TEXT,
    action       TEXT    NOT NULL,
    actor        TEXT    NOT NULL,
    performed_at INTEGER NOT NULL,
    metadata     TEXT    NOT NULL CHECK (json_valid(metadata))
) STRICT;
CREATE INDEX audit_by_user ON upstox_token_audit (user_id, performed_at, id);
"""
# The states of login_mark: NULL, no login may have replaced this token; a lock's name and a random word, the login that
# holds this lock may replace it, or may have, if the lock is free; empty, some login may have replaced it. A note is
# encrypted as a whole, except that of a login without a user id, which is its mark.
SCHEMA_2 = """
ALTER TABLE upstox_tokens ADD COLUMN issued_at INTEGER;
ALTER TABLE upstox_tokens ADD COLUMN login_mark TEXT;
CREATE INDEX logins ON upstox_token_audit (performed_at) WHERE action = 'login';
CREATE TABLE upstox_login_notes (name TEXT PRIMARY KEY, sealed TEXT NOT NULL) STRICT;
"""
SCHEMA_VERSION = """
SELECT user_version, (SELECT count(*) FROM sqlite_schema WHERE name IN ('upstox_tokens', 'upstox_token_audit'))
FROM pragma_user_version
"""

_HANDED_OUT = (
    "id AS token_id, user_id, access_token AS ciphertext, key_id, generation, created_at, expires_at, user_name, "
    "email, usage_count, account, login_mark"
)
_KNOWN = f"{_HANDED_OUT}, issued_at"
FIND = f"SELECT {_HANDED_OUT} FROM upstox_tokens WHERE user_id = ? AND is_active AND expires_at > ?"
IN_DOUBT = f"SELECT {_KNOWN} FROM upstox_tokens WHERE user_id = ? AND is_active AND login_mark IS NOT NULL"
DOUBT = "UPDATE upstox_tokens SET login_mark = '' WHERE user_id = ? AND is_active AND login_mark = ?"
USE = f"""
UPDATE upstox_tokens SET usage_count = usage_count + 1, last_used_at = ?
WHERE user_id = ? AND is_active AND expires_at > ? RETURNING {_HANDED_OUT}
"""
INSERT = """
INSERT INTO upstox_tokens (user_id, access_token, key_id, generation, user_name, email, broker, user_type, products,
                           exchanges, created_at, expires_at, account, metadata, issued_at, login_mark)
VALUES (:user_id, :ciphertext, :key_id, :generation, :user_name, :email, :broker, :user_type, :products,
        :exchanges, :created_at, :expires_at, :account, :metadata, :issued_at, :login_mark) RETURNING id
"""
ERASE = """
UPDATE upstox_tokens SET is_active = 0, access_token = NULL, login_mark = NULL
WHERE user_id = ? AND is_active RETURNING id, user_id
"""
ERASE_EARLIER = """
UPDATE upstox_tokens SET is_active = 0, access_token = NULL, login_mark = NULL
WHERE user_id = ? AND generation < ? AND is_active RETURNING id, user_id
"""
# What SQLite says when a second token of a generation is refused, or one that is not the latest.
SUPERSEDED = (
    "UNIQUE constraint failed: upstox_tokens.user_id, upstox_tokens.generation",
    "UNIQUE constraint failed: upstox_tokens.user_id",
)
EXPIRE = """
UPDATE upstox_tokens SET is_active = 0, access_token = NULL, login_mark = NULL
WHERE id IN (SELECT id FROM upstox_tokens WHERE is_active AND expires_at <= ? LIMIT ?) RETURNING id, user_id
"""
RECORD = """
INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata) VALUES (?, ?, ?, ?, ?, ?)
"""
HISTORY = """
SELECT id AS token_id, created_at, expires_at, is_active AND expires_at > ? AS is_active, user_name, email, broker,
       usage_count, last_used_at
FROM upstox_tokens WHERE user_id = ? ORDER BY generation DESC LIMIT ?
"""
STATISTICS = """
SELECT count(*) AS total_tokens, count(*) FILTER (WHERE is_active AND expires_at > ?) AS active_tokens,
       coalesce(sum(usage_count), 0) AS total_usage, coalesce(avg(usage_count), 0.0) AS avg_usage_per_token,
       max(created_at) AS last_generation, max(last_used_at) AS last_usage
FROM upstox_tokens WHERE user_id = ?
"""
AUDIT = """
SELECT a.action, a.performed_at, a.actor, a.metadata, a.user_id, a.token_id, t.created_at AS token_created
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE a.user_id = ? ORDER BY a.performed_at DESC, a.id DESC LIMIT ?
"""
# Ordered by id, because old entries have low ids. An index on the time would cost something at every write.
OLD_ENTRIES = "SELECT id FROM upstox_token_audit WHERE performed_at < ? ORDER BY id LIMIT ?"
# One column cannot hold two marks, so it becomes empty for good. A login without a user id leaves the marks of others:
# when one of those ends, it finds the note that this one is running.
_OF_THIS_LOCK = "substr(login_mark, 1, length(:lock) + 1) = :lock || ' '"
MARK = """
UPDATE upstox_tokens SET login_mark = CASE WHEN login_mark IS NULL THEN :mark ELSE '' END
WHERE is_active AND user_id = :user_id
"""
MARK_ALL = f"""
UPDATE upstox_tokens SET login_mark = CASE WHEN login_mark IS NULL THEN :mark ELSE '' END
WHERE is_active AND (login_mark IS NULL OR {_OF_THIS_LOCK})
"""
UNMARK = f"""
UPDATE upstox_tokens SET login_mark = :mark
WHERE is_active AND {_OF_THIS_LOCK} AND (:user_id IS NULL OR user_id = :user_id)
"""
RUNNING_LOGINS = "SELECT sealed FROM upstox_login_notes WHERE name >= 'running ' AND name < 'running!'"
MARK_OF = """
SELECT login_mark FROM upstox_tokens WHERE user_id = ? AND generation = ? AND is_active AND login_mark IS NOT NULL
"""
CLEAR_DOUBT = "UPDATE upstox_tokens SET login_mark = NULL WHERE user_id = ? AND generation = ? AND is_active"
LOGINS_SINCE = """
SELECT performed_at FROM upstox_token_audit
WHERE action = 'login' AND performed_at > ? AND json_extract(metadata, '$.process') IS NOT ?
ORDER BY performed_at DESC LIMIT 100
"""
# This uses the machine's clock, the only one that SQLite has. It does not use the store's, which a program may set.
NOTES = """
SELECT (julianday('now') - 2440587.5) * 86400 AS now, name, sealed FROM (SELECT 1) LEFT JOIN upstox_login_notes
ON name IN (SELECT value FROM json_each(?))
"""
WRITE_NOTE = """
INSERT INTO upstox_login_notes (name, sealed) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed
"""
ERASE_NOTE = "DELETE FROM upstox_login_notes WHERE name = ?"
OF_ACCOUNT = f"SELECT {_KNOWN} FROM upstox_tokens WHERE account = ? AND is_active ORDER BY id DESC LIMIT 100"
NEWEST = f"SELECT {_KNOWN} FROM upstox_tokens WHERE user_id = ? ORDER BY generation DESC LIMIT 1"
STATES = """
SELECT t.user_id, t.generation, t.is_active, t.login_mark IS NOT NULL
FROM json_each(?) AS asked JOIN upstox_tokens AS t ON t.user_id = asked.value
     AND t.generation = (SELECT max(generation) FROM upstox_tokens WHERE user_id = asked.value)
"""
# We no longer use these names, but somebody may import them.
VERSION = SCHEMA_VERSION
GENERATION = "SELECT coalesce(max(generation), 0) FROM upstox_tokens WHERE user_id = ?"
USER_OF_ACCOUNT = "SELECT user_id FROM upstox_tokens WHERE account = ? ORDER BY id DESC LIMIT 1"
# The key is the ciphertext's own. An earlier version could record another one beside it.
_KEY = "substr(access_token, 4, instr(substr(access_token, 4), '.') - 1)"
OTHER_KEYS = f"""
SELECT {_HANDED_OUT} FROM upstox_tokens WHERE is_active AND user_id > ? AND (key_id <> ? OR {_KEY} <> ?)
ORDER BY user_id LIMIT ?
"""
REPLACE = "UPDATE upstox_tokens SET access_token = ?, key_id = ? WHERE id = ? AND access_token = ?"
COUNT_KEYS = (
    f"SELECT coalesce(nullif({_KEY}, ''), key_id) AS key_id, count(*) FROM upstox_tokens WHERE is_active GROUP BY 1"
)
# This jumps from one user to the next, because the audit trail may have millions of entries and few users.
USERS = """
WITH RECURSIVE stored (user_id) AS (
    SELECT min(user_id) FROM upstox_tokens WHERE user_id > ? UNION ALL
    SELECT (SELECT min(t.user_id) FROM upstox_tokens AS t WHERE t.user_id > stored.user_id) FROM stored
    WHERE user_id IS NOT NULL
), audited (user_id) AS (
    SELECT min(user_id) FROM upstox_token_audit WHERE user_id > ? UNION ALL
    SELECT (SELECT min(a.user_id) FROM upstox_token_audit AS a WHERE a.user_id > audited.user_id) FROM audited
    WHERE user_id IS NOT NULL
)
SELECT user_id FROM (SELECT user_id FROM stored LIMIT ?) AS s WHERE user_id IS NOT NULL UNION
SELECT user_id FROM (SELECT user_id FROM audited LIMIT ?) AS a WHERE user_id IS NOT NULL
ORDER BY 1 LIMIT ?
"""
_COPIED = (
    "user_id, key_id, generation, created_at, expires_at, user_name, email, broker, user_type, products, exchanges, "
    "account, metadata, usage_count, last_used_at, issued_at"
)
TOKENS_OF = (
    f"SELECT {_COPIED}, coalesce(access_token, '') AS ciphertext, login_mark IS NOT NULL AS in_doubt "
    "FROM upstox_tokens WHERE user_id = ? ORDER BY generation"
)
ENTRIES_OF = """
SELECT a.action, a.actor, a.performed_at, a.metadata, t.generation, a.id
FROM upstox_token_audit AS a LEFT JOIN upstox_tokens AS t ON t.id = a.token_id
WHERE a.user_id IS ? AND (a.performed_at, a.id) > (?, ?) ORDER BY a.performed_at, a.id LIMIT ?
"""
PUT_IN = f"""
INSERT INTO upstox_tokens ({_COPIED}, access_token, is_active, login_mark)
VALUES ({", ".join(f":{name}" for name in _COPIED.split(", "))}, nullif(:ciphertext, ''), :ciphertext <> '',
        CASE WHEN :in_doubt THEN '' END)
ON CONFLICT (user_id, generation) DO UPDATE SET
    access_token = CASE WHEN excluded.is_active THEN access_token END, is_active = is_active AND excluded.is_active,
    login_mark = CASE WHEN excluded.is_active THEN login_mark END,
    usage_count = max(usage_count, excluded.usage_count),
    last_used_at = nullif(max(coalesce(last_used_at, 0), coalesce(excluded.last_used_at, 0)), 0)
"""
MARK_MERGED = "UPDATE upstox_tokens SET login_mark = ? WHERE user_id = ? AND is_active AND login_mark IS NULL"
PUT_IN_AUDIT = """
INSERT INTO upstox_token_audit (token_id, user_id, action, actor, performed_at, metadata)
VALUES ((SELECT id FROM upstox_tokens WHERE user_id = :user_id AND generation = :generation), :user_id, :action, :actor,
        :performed_at, :metadata)
"""
