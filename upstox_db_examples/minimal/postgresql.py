"""The smallest PostgreSQL store for Upstox access tokens, with an audit trail. Copy this file and make it your own.

    storage = PostgreSQLTokens("postgresql://user:password@host/name", bytes.fromhex(os.environ["TOKEN_KEY"]))
    token = storage.get_or_create_token("AB1234")  # logs in only if it has to

Make the key once, with `openssl rand -hex 32`. PostgreSQL sees only ciphertext, which fits one user and one expiry. A
token is handed out until 03:30 in India, when it dies. One process logs in, and the others wait for its token. The
statement that reads a token also writes an audit entry, so that nobody gets a token without one.

The full pattern, upstox_db_examples.postgresql, does more. It renews a token that Upstox refuses, loses no new token
if the database fails, does not repeat a refused login, changes keys, keeps history and statistics, and hides
tokens in output and tracebacks. minimal/README.md in that package tells what happens without that.
"""

import os
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import parse_qs, urlsplit

import psycopg2
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from upstox_totp import UpstoxTOTP

TABLES = """
SELECT pg_advisory_xact_lock(0);  -- Without it, two programs that do this at once may fail.
CREATE TABLE IF NOT EXISTS minimal_tokens (user_id text PRIMARY KEY, token bytea, expires_at bigint);
CREATE TABLE IF NOT EXISTS minimal_audit (user_id text, action text, performed_at timestamptz DEFAULT now())
"""
READ = """
WITH living AS (SELECT * FROM minimal_tokens WHERE user_id = %s AND expires_at > %s),
     audited AS (INSERT INTO minimal_audit SELECT user_id, 'read' FROM living)
SELECT token, expires_at FROM living
"""
STORE = """
WITH stored AS (
    INSERT INTO minimal_tokens VALUES (%s, %s, %s)
    ON CONFLICT (user_id) DO UPDATE SET token = excluded.token, expires_at = excluded.expires_at RETURNING user_id
) INSERT INTO minimal_audit SELECT user_id, 'login' FROM stored
"""


def next_0330() -> int:
    """Return the next 03:30 in India, in seconds since 1970. Tokens die then, whenever they were made."""
    now = datetime.now(timezone(timedelta(hours=5, minutes=30)))
    today = now.replace(hour=3, minute=30, second=0, microsecond=0)
    return int((today if today > now else today + timedelta(days=1)).timestamp())


def log_in(user_id: str) -> str:
    """Log in with the UPSTOX_* variables, and return the new token. The user's earlier token dies."""
    with UpstoxTOTP() as upstox:
        upstox.base_domain = os.environ.get("UPSTOX_BASE_DOMAIN", upstox.base_domain)
        if upstox.app_token.get_user_id_and_user_type().user_id != user_id:
            raise ValueError(f"These credentials are not those of {user_id}. No token was made.")
        approval = upstox.app_token.oauth_authorization().model_dump()["data"]
        # The SDK's own last step fails if a field such as `poa` is missing, and the token is lost. So we do that step.
        code = parse_qs(urlsplit(approval["redirectUri"]).query)["code"][0]
        config = upstox.config
        form = {"client_id": config.client_id, "client_secret": config.client_secret.get_secret_value()}
        form |= {"code": code, "redirect_uri": config.redirect_uri, "grant_type": "authorization_code"}
        url = upstox.base_domain.format(stage="api") + "/v2/login/authorization/token"
        upstox.reset_session()
        answer = upstox.session.post(url, data=form, headers={"accept": "application/json"})
        answer.raise_for_status()
        return str(answer.json()["access_token"])


class PostgreSQLTokens:
    def __init__(self, url: str, key: bytes) -> None:
        self.url, self.cipher = url, AESGCM(key)
        with closing(psycopg2.connect(url)) as db, db, db.cursor() as cursor:
            cursor.execute(TABLES)

    def get_valid_token(self, user_id: str) -> str | None:
        """Return the user's token, or None if it is dead or missing. With a wrong key, raise InvalidTag."""
        # `closing` closes the connection. `db` commits, or rolls back after an error.
        with closing(psycopg2.connect(self.url)) as db, db, db.cursor() as cursor:
            cursor.execute(READ, (user_id, datetime.now(UTC).timestamp()))
            row = cursor.fetchone()
        if row is None:
            return None
        sealed, expires_at = bytes(row[0]), row[1]
        return self.cipher.decrypt(sealed[:12], sealed[12:], f"{user_id} {expires_at}".encode()).decode()

    def get_or_create_token(self, user_id: str) -> str:
        """Return the user's token. If it is dead or missing, log in."""
        if token := self.get_valid_token(user_id):
            return token
        with closing(psycopg2.connect(self.url)) as db, db, db.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (user_id,))  # The others wait here.
            if token := self.get_valid_token(user_id):  # Another process has logged in meanwhile.
                return token
            expires_at = next_0330()  # Ask before the login, which may last until after 03:30.
            token = log_in(user_id)
            nonce = os.urandom(12)
            sealed = nonce + self.cipher.encrypt(nonce, token.encode(), f"{user_id} {expires_at}".encode())
            cursor.execute(STORE, (user_id, sealed, expires_at))
            return token
