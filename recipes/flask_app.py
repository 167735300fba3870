"""Flask: one store for each process, and a token that is read once.

gunicorn --config recipes/gunicorn_conf.py "recipes.flask_app:make_app()"
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from flask import Flask

from upstox_db_examples import StorageError, StoredTokenAuth, open_store

API = os.environ.get("UPSTOX_API", "https://api.upstox.com")


def make_app() -> Flask:
    user = os.environ["UPSTOX_USER_ID"]
    store = open_store(os.environ["UPSTOX_DB_STORE"])
    auth = StoredTokenAuth(store, user, hosts={str(urlsplit(API).hostname)})
    app = Flask(__name__)

    @app.get("/name")
    def name() -> str:
        answer = requests.get(f"{API}/v2/user/profile", auth=auth, timeout=10)
        answer.raise_for_status()
        return str(answer.json()["data"]["user_name"])

    @app.get("/health")
    def health() -> dict[str, Any]:
        newest = store.get_token_history(user, 1)
        if not newest or not newest[0]["is_active"]:
            return {"token": "none", "minutes_to_live": 0}
        left = datetime.fromisoformat(newest[0]["expires_at"]) - datetime.now(UTC)
        return {"token": "works", "minutes_to_live": int(left.total_seconds() // 60)}

    @app.errorhandler(StorageError)
    def unavailable(error: StorageError) -> tuple[dict[str, str], int]:
        return {"error": type(error).__name__}, 503

    return app
