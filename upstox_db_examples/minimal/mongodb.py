"""The smallest MongoDB store for Upstox access tokens. Copy this file and make it your own.

    storage = MongoTokens("mongodb://user:password@host/", bytes.fromhex(os.environ["TOKEN_KEY"]))
    token = storage.get_or_create_token("AB1234")  # logs in only if it has to

Make the key once, with `openssl rand -hex 32`. MongoDB sees only ciphertext, which fits one user and one expiry. A
token is handed out until 03:30 in India, when it dies. One process logs in, and the others wait for its token.

The full pattern, upstox_db_examples.mongodb, does more. It renews a token that Upstox refuses, loses no new token
if the database fails, does not repeat a refused login, changes keys, keeps history and an audit trail, and hides
tokens in output and tracebacks. minimal/README.md in that package tells what happens without that.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError
from upstox_totp import UpstoxTOTP

LEASE = timedelta(minutes=1)  # A login that takes longer counts as dead, and another process may log in.


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


class MongoTokens:
    def __init__(self, url: str, key: bytes, database: str = "upstox") -> None:
        self.cipher, self.client = AESGCM(key), MongoClient[dict[str, Any]](url, tz_aware=True)
        self.tokens = self.client[database].minimal_tokens
        self.leases = self.client[database].minimal_leases
        # MongoDB deletes dead tokens, by its own clock. It gives them an hour's grace, in case that clock is fast.
        self.tokens.create_index("expires_at", expireAfterSeconds=3600)

    def get_valid_token(self, user_id: str) -> str | None:
        """Return the user's token, or None if it is dead or missing. With a wrong key, raise InvalidTag."""
        row = self.tokens.find_one({"_id": user_id, "expires_at": {"$gt": datetime.now(UTC)}})
        if row is None:
            return None
        sealed, expires_at = row["token"], int(row["expires_at"].timestamp())
        return self.cipher.decrypt(sealed[:12], sealed[12:], f"{user_id} {expires_at}".encode()).decode()

    @contextmanager
    def lease(self, user_id: str) -> Iterator[None]:
        """Wait until no other process logs this user in, and let the others wait."""
        while True:
            mine = {"_id": user_id, "until": datetime.now(UTC) + LEASE}
            try:  # Take over a lease that has ended, or make one. While another process has it, the id is a duplicate.
                self.leases.replace_one({"_id": user_id, "until": {"$lt": datetime.now(UTC)}}, mine, upsert=True)
                break
            except DuplicateKeyError:
                time.sleep(0.1)
        try:
            yield
        finally:
            self.leases.delete_one(mine)

    def get_or_create_token(self, user_id: str) -> str:
        """Return the user's token. If it is dead or missing, log in."""
        if token := self.get_valid_token(user_id):
            return token
        with self.lease(user_id):
            if token := self.get_valid_token(user_id):  # Another process has logged in meanwhile.
                return token
            expires_at = next_0330()  # Ask before the login, which may last until after 03:30.
            token = log_in(user_id)
            nonce = os.urandom(12)
            sealed = nonce + self.cipher.encrypt(nonce, token.encode(), f"{user_id} {expires_at}".encode())
            row = {"token": sealed, "expires_at": datetime.fromtimestamp(expires_at, UTC)}
            self.tokens.replace_one({"_id": user_id}, row, upsert=True)
            return token
