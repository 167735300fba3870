"""The smallest store for Upstox access tokens with Redis in front of PostgreSQL. Copy this file and make it your own.

    key = bytes.fromhex(os.environ["TOKEN_KEY"])  # made once, with `openssl rand -hex 32`
    storage = HybridTokens("redis://:password@host/0", "postgresql://user:password@host/name", key)
    token = storage.get_or_create_token("AB1234")  # logs in only if it has to

PostgreSQL has the truth. Redis answers from copies, which it keeps for a minute. Both see only ciphertext for one user
and expiry. A token is handed out until 03:30 in India, when it dies. One process logs in, and the others wait.

The full pattern, upstox_db_examples.hybrid, does more. It renews a token that Upstox refuses, reads on while PostgreSQL
is down, loses no new token if the database fails, does not repeat a refused login, changes keys, keeps an audit
trail, and hides tokens in output and tracebacks. minimal/README.md in that package tells what happens without that.
"""

import os
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import parse_qs, urlsplit

import psycopg2
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from redis import Redis, RedisError
from upstox_totp import UpstoxTOTP

TABLE = "CREATE TABLE IF NOT EXISTS minimal_tokens (user_id text PRIMARY KEY, token bytea, expires_at bigint)"


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


class HybridTokens:
    def __init__(self, redis_url: str, postgres_url: str, key: bytes) -> None:
        self.redis = Redis.from_url(redis_url, socket_timeout=0.25, retry=None)
        self.url, self.cipher = postgres_url, AESGCM(key)
        with closing(psycopg2.connect(self.url)) as db, db, db.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(0)")  # Without it, two programs that do this at once may fail.
            cursor.execute(TABLE)

    def get_valid_token(self, user_id: str) -> str | None:
        """Return the user's token, or None if it is dead or missing. With a wrong key, raise InvalidTag."""
        name = f"minimal_token:{user_id}"
        with suppress(RedisError):  # If Redis is down, PostgreSQL answers.
            copy = self.redis.get(name)
            if isinstance(copy, bytes) and (token := self.decrypt(user_id, copy)):
                return token
        with closing(psycopg2.connect(self.url)) as db, db, db.cursor() as cursor:
            cursor.execute("SELECT expires_at, token FROM minimal_tokens WHERE user_id = %s", (user_id,))
            row = cursor.fetchone()
        if row is None:
            return None
        copy = b"%d %b" % row
        with suppress(RedisError):
            self.redis.set(name, copy, ex=60)
        return self.decrypt(user_id, copy)

    def decrypt(self, user_id: str, copy: bytes) -> str | None:
        """Return the token of a copy (expiry, space, ciphertext), or None if it is dead."""
        expires_at, _, sealed = copy.partition(b" ")
        if int(expires_at) <= datetime.now(UTC).timestamp():
            return None
        return self.cipher.decrypt(sealed[:12], sealed[12:], f"{user_id} {int(expires_at)}".encode()).decode()

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
            cursor.execute("DELETE FROM minimal_tokens WHERE user_id = %s", (user_id,))
            cursor.execute("INSERT INTO minimal_tokens VALUES (%s, %s, %s)", (user_id, sealed, expires_at))
            return token
