"""The PostgreSQL store's tables, and the rights of the runtime role."""

from __future__ import annotations

# user_type is text and not an enum: Upstox may add a type, and the token must be stored anyway. A row is active exactly
# if it holds a ciphertext. Pages are left half empty, so that counting a use writes no index.
SCHEMA = """
CREATE TABLE upstox_tokens (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      text        NOT NULL,
    access_token text,
    key_id       text        NOT NULL,
    generation   integer     NOT NULL,
    user_name    text,
    email        text,
    broker       text,
    user_type    text,
    products     jsonb       NOT NULL,
    exchanges    jsonb       NOT NULL,
    is_active    boolean     NOT NULL DEFAULT true,
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    account      text,
    metadata     jsonb       NOT NULL,
    usage_count  integer     NOT NULL DEFAULT 0,
    last_used_at timestamptz,
    UNIQUE (user_id, generation),
    CHECK (is_active = (access_token IS NOT NULL))
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX one_active_token ON upstox_tokens (user_id) WHERE is_active;
-- Not WHERE is_active: a planner that misjudges how many tokens live would then find a user's token by this index.
CREATE INDEX ciphertext_by_expiry ON upstox_tokens (expires_at) WHERE access_token IS NOT NULL;
CREATE INDEX active_by_key ON upstox_tokens (key_id) WHERE is_active;
CREATE INDEX latest_of_account ON upstox_tokens (account, id) WHERE account IS NOT NULL;
CREATE TABLE upstox_token_audit (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    token_id     bigint REFERENCES upstox_tokens (id),
    user_id      text,
    action       text        NOT NULL,
    actor        text        NOT NULL,
    performed_at timestamptz NOT NULL,
    metadata     jsonb       NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_by_user ON upstox_token_audit (user_id, performed_at, id);
"""
# login_lock is the advisory lock of the login that marked this token. That login holds it while it runs; the value is 0
# once nobody can know how the login ended. Each login has its own lock. With the user's lock instead, the next holder
# would be mistaken for the login that died, and so would a reader who looks at the same moment.
# Readers never change this column, so the index on logins is the only one that makes a write slower.
SCHEMA_2 = """
ALTER TABLE upstox_tokens ADD COLUMN issued_at timestamptz, ADD COLUMN login_lock bigint;
CREATE INDEX logins ON upstox_token_audit (performed_at) WHERE action = 'login';
CREATE TABLE upstox_login_notes (name text PRIMARY KEY, sealed text NOT NULL);
"""
# A role that only stores and reads can make no entry look older or like another's: the database fills recorded_by and
# recorded_at. Earlier entries have none. A trigger on the audit trail would do the same, but each read would pay for
# it. So INSERT is granted by column, and without the ids: a row that has taken the next id would make the store of a
# token fail after its login. A row with a later generation than the user's next would do so, too.
# The owner can do all this anyway, and must be able to: an import may have gaps between generations.
SCHEMA_3 = """
ALTER TABLE upstox_token_audit ADD COLUMN recorded_by text, ADD COLUMN recorded_at timestamptz;
ALTER TABLE upstox_token_audit
    ALTER COLUMN recorded_by SET DEFAULT session_user, ALTER COLUMN recorded_at SET DEFAULT clock_timestamp();
-- Each store of a token reads this as a number.
ALTER TABLE upstox_login_notes ADD CONSTRAINT a_running_login_has_a_key
    CHECK (CASE WHEN starts_with(name, 'running ') THEN sealed::bigint IS NOT NULL ELSE true END);
CREATE FUNCTION upstox_next_generation() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    next bigint;
    taken boolean;
BEGIN
    IF pg_has_role((SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'USAGE') THEN
        RETURN NEW;
    END IF;
    EXECUTE format('SELECT coalesce(max(generation), 0)::bigint + 1, '
                   'EXISTS (SELECT FROM %1$s WHERE user_id = $1 AND generation = $2) FROM %1$s WHERE user_id = $1',
                   TG_RELID::regclass) INTO next, taken USING NEW.user_id, NEW.generation;
    IF NEW.generation <> next AND NOT taken THEN  -- The unique constraint answers for one that is taken.
        RAISE EXCEPTION 'The next generation of % is %, not %', NEW.user_id, next, NEW.generation
              USING ERRCODE = 'check_violation', CONSTRAINT = 'next_generation', TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER next_generation BEFORE INSERT ON upstox_tokens
    FOR EACH ROW EXECUTE FUNCTION upstox_next_generation();
DO $$
DECLARE
    given record;
BEGIN
    FOR given IN
        SELECT c.oid::regclass AS relation,
               CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END AS role,
               (SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute
                WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
                      AND attname NOT IN ('id', 'recorded_by', 'recorded_at')) AS columns
        FROM pg_class AS c, aclexplode(c.relacl) AS g
        WHERE c.oid IN ('upstox_tokens'::regclass, 'upstox_token_audit'::regclass)
              AND g.privilege_type = 'INSERT' AND g.grantee <> c.relowner
    LOOP
        EXECUTE format('REVOKE INSERT ON %s FROM %s', given.relation, given.role);
        EXECUTE format('GRANT INSERT (%s) ON %s TO %s', given.columns, given.relation, given.role);
    END LOOP;
END $$;
"""
VERSION_TABLE = "CREATE TABLE IF NOT EXISTS upstox_schema (version integer NOT NULL)"
# What an import brings of a token, and every program of an audit entry.
COPIED = """user_id, key_id, generation, created_at, expires_at, user_name, email, broker, user_type, products,
             exchanges, account, metadata, usage_count, last_used_at, issued_at"""
ENTRY = "token_id, user_id, action, actor, performed_at, metadata"
GRANT_SCHEMA = "GRANT USAGE ON SCHEMA {schema} TO {role};"
# The rights of a program that stores and reads tokens. It can only add to the audit trail, and cannot drop anything.
GRANTS = f"""
REVOKE INSERT ON upstox_tokens, upstox_token_audit FROM {{role}};
GRANT SELECT ON upstox_schema TO {{role}};
GRANT SELECT, INSERT ({COPIED}, access_token, is_active, login_lock),
      UPDATE (access_token, key_id, is_active, usage_count, last_used_at, login_lock) ON upstox_tokens TO {{role}};
GRANT SELECT, INSERT ({ENTRY}) ON upstox_token_audit TO {{role}};
GRANT SELECT, INSERT, UPDATE, DELETE ON upstox_login_notes TO {{role}};
"""
