"""The smallest pooled SQLite store, for the Upstox access tokens of several accounts. Copy it and make it your own.

    storage = PooledTokens("upstox.db", bytes.fromhex(os.environ["TOKEN_KEY"]), {"AB1234": {}})
    storage.store_token_batch(["AB1234"])  # in the morning; then threads call get_valid_token("AB1234") all day

Give each user the arguments of UpstoxTOTP, or {} for the UPSTOX_* variables. The key is from `openssl rand -hex 32`.
SQLite sees only ciphertext for one user and expiry. Tokens are handed out until 03:30. One process logs in at a time.

The full pattern, upstox_db_examples.pooled, does more. It renews a token that Upstox refuses, loses no new token
if the database fails, does not repeat a refused login, changes keys, keeps history and an audit trail, and hides
tokens in output and tracebacks. minimal/README.md in that package tells what happens without that.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from queue import Queue
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from upstox_totp import UpstoxTOTP


def next_0330() -> int:
    """Return the next 03:30 in India, in seconds since 1970. Tokens die then, whenever they were made."""
    now = datetime.now(timezone(timedelta(hours=5, minutes=30)))
    today = now.replace(hour=3, minute=30, second=0, microsecond=0)
    return int((today if today > now else today + timedelta(days=1)).timestamp())


def log_in(user_id: str, credentials: dict[str, Any]) -> str:
    """Log in with these arguments of UpstoxTOTP, and return the new token. The user's earlier token dies."""
    with UpstoxTOTP(**credentials) as upstox:
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


class PooledTokens:
    def __init__(self, path: str, key: bytes, accounts: dict[str, dict[str, Any]], pool_size: int = 5) -> None:
        self.cipher, self.accounts, self.pool = AESGCM(key), accounts, Queue[sqlite3.Connection]()
        for _ in range(pool_size):
            self.pool.put(sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False))
        with self.connection() as db:
            db.execute("CREATE TABLE IF NOT EXISTS minimal_tokens (user_id PRIMARY KEY, token, expires_at)")

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Borrow a connection. If all are in use, wait for one, for up to a minute."""
        db = self.pool.get(timeout=60)
        try:
            with db:  # It commits, or rolls back after an error: nobody may borrow half a transaction.
                yield db
        finally:
            self.pool.put(db)

    def get_valid_token(self, user_id: str) -> str | None:
        """Return the user's token, or None if it is dead or missing. With a wrong key, raise InvalidTag."""
        with self.connection() as db:
            return self.find(db, user_id)

    def find(self, db: sqlite3.Connection, user_id: str) -> str | None:
        sql = "SELECT token, expires_at FROM minimal_tokens WHERE user_id = ? AND expires_at > ?"
        for sealed, expires_at in db.execute(sql, (user_id, datetime.now(UTC).timestamp())):  # one row, or none
            return self.cipher.decrypt(sealed[:12], sealed[12:], f"{user_id} {expires_at}".encode()).decode()
        return None

    def store_token_batch(self, user_ids: list[str]) -> dict[str, str | Exception]:
        """Return each user's token or error. If a token is dead or missing, log in. Upstox allows 60 in 30 minutes."""
        results: dict[str, str | Exception] = {}
        for user_id in user_ids:
            try:
                with self.connection() as db:
                    db.execute("BEGIN IMMEDIATE")  # The others wait here, until this one commits.
                    results[user_id] = self.find(db, user_id) or self.create(db, user_id)
            except Exception as error:
                results[user_id] = error
        return results

    def create(self, db: sqlite3.Connection, user_id: str) -> str:
        expires_at = next_0330()  # Ask before the login, which may last until after 03:30.
        token = log_in(user_id, self.accounts[user_id])
        nonce = os.urandom(12)
        sealed = nonce + self.cipher.encrypt(nonce, token.encode(), f"{user_id} {expires_at}".encode())
        db.execute("REPLACE INTO minimal_tokens VALUES (?, ?, ?)", (user_id, sealed, expires_at))
        return token
