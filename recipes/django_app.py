"""Django in one file. In a project of yours, `store` and the views go into an app, and the settings stay yours.

gunicorn recipes.django_app:application
"""

from __future__ import annotations

import functools
import os
from datetime import UTC, datetime
from urllib.parse import urlsplit

import requests
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from upstox_db_examples import StoredTokenAuth, TokenStorage, open_store

API = os.environ.get("UPSTOX_API", "https://api.upstox.com")
USER = os.environ["UPSTOX_USER_ID"]

if not settings.configured:
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["localhost", "127.0.0.1"])


@functools.cache
def store() -> TokenStorage:
    """Open the store at the first request, once for each process, and not once for each request."""
    return open_store(os.environ["UPSTOX_DB_STORE"])


@functools.cache
def auth() -> StoredTokenAuth:
    return StoredTokenAuth(store(), USER, hosts={str(urlsplit(API).hostname)})


def name(_: HttpRequest) -> JsonResponse:
    answer = requests.get(f"{API}/v2/user/profile", auth=auth(), timeout=10)
    answer.raise_for_status()
    return JsonResponse({"name": answer.json()["data"]["user_name"]})


def health(_: HttpRequest) -> JsonResponse:
    newest = store().get_token_history(USER, 1)
    if not newest or not newest[0]["is_active"]:
        return JsonResponse({"token": "none", "minutes_to_live": 0})
    left = datetime.fromisoformat(newest[0]["expires_at"]) - datetime.now(UTC)
    return JsonResponse({"token": "works", "minutes_to_live": int(left.total_seconds() // 60)})


urlpatterns = [path("name", name), path("health", health)]
application = get_wsgi_application()
