"""The smallest SQLite store for Upstox access tokens. Copy this file and make it your own.

    storage = SQLiteTokens("upstox.db", bytes.fromhex(os.environ["TOKEN_KEY"]))
    token = storage.get_or_create_token("AB1234")  # logs in only if it has to

Make the key once, with `openssl rand -hex 32`. SQLite sees only ciphertext, which fits one user and one expiry. A
token is handed out until 03:30 in India, when it dies. One process logs in, and the others wait for its token.

The full pattern, upstox_db_examples.sqlite, does more. It renews a token that Upstox refuses, loses no new token
if the database fails, does not repeat a refused login, changes keys, keeps history and an audit trail, makes backups,
and hides tokens in output and tracebacks. minimal/README.md in that package tells what happens without that.
"""

import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from upstox_totp import UpstoxTOTP


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


class SQLiteTokens:
    def __init__(self, path: str, key: bytes) -> None:
        self.path, self.cipher = path, AESGCM(key)
        with closing(self.connect()) as db:
            db.execute("CREATE TABLE IF NOT EXISTS minimal_tokens (user_id PRIMARY KEY, token, expires_at)")

    def connect(self) -> sqlite3.Connection:
        """Open the file. A statement that finds it locked waits, for up to a minute."""
        return sqlite3.connect(self.path, timeout=60, isolation_level=None)

    def get_valid_token(self, user_id: str) -> str | None:
        """Return the user's token, or None if it is dead or missing. With a wrong key, raise InvalidTag."""
        sql = "SELECT token, expires_at FROM minimal_tokens WHERE user_id = ? AND expires_at > ?"
        with closing(self.connect()) as db:
            row = db.execute(sql, (user_id, datetime.now(UTC).timestamp())).fetchone()
        if row is None:
            return None
        sealed, expires_at = row
        return self.cipher.decrypt(sealed[:12], sealed[12:], f"{user_id} {expires_at}".encode()).decode()

    def get_or_create_token(self, user_id: str) -> str:
        """Return the user's token. If it is dead or missing, log in."""
        if token := self.get_valid_token(user_id):
            return token
        # `closing` closes the file. `db` commits, or rolls back after an error.
        with closing(self.connect()) as db, db:
            db.execute("BEGIN IMMEDIATE")  # The others wait here, until this one commits.
            if token := self.get_valid_token(user_id):  # Another process has logged in meanwhile.
                return token
            expires_at = next_0330()  # Ask before the login, which may last until after 03:30.
            token = log_in(user_id)
            nonce = os.urandom(12)
            sealed = nonce + self.cipher.encrypt(nonce, token.encode(), f"{user_id} {expires_at}".encode())
            db.execute("REPLACE INTO minimal_tokens VALUES (?, ?, ?)", (user_id, sealed, expires_at))
            return token
