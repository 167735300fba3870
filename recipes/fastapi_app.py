"""FastAPI: one store for each process, and nothing that blocks the event loop.

uvicorn recipes.fastapi_app:app --workers 3
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from upstox_db_examples import AsyncTokenStorage, StorageError, StoredTokenAuth, open_store

API = os.environ.get("UPSTOX_API", "https://api.upstox.com")
USER = os.environ["UPSTOX_USER_ID"]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    store = await anyio.to_thread.run_sync(open_store, os.environ["UPSTOX_DB_STORE"])
    auth = StoredTokenAuth(store, USER, hosts={httpx.URL(API).host})
    client = httpx.AsyncClient(base_url=API, auth=auth)
    async with AsyncTokenStorage(store) as tokens, client as upstox:
        yield {"tokens": tokens, "upstox": upstox}


app = FastAPI(lifespan=lifespan)


@app.get("/name")
async def name(request: Request) -> str:
    answer = await request.state.upstox.get("/v2/user/profile")
    return str(answer.raise_for_status().json()["data"]["user_name"])


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Tell how long the token lives. The history holds no token, and reading it counts no use.

    Without a token the answer is still 200: the next request logs in. With another status, Kubernetes would send no
    request here, and so nobody would log in.
    """
    newest = await request.state.tokens.get_token_history(USER, 1)
    if not newest or not newest[0]["is_active"]:
        return {"token": "none", "minutes_to_live": 0}
    left = datetime.fromisoformat(newest[0]["expires_at"]) - datetime.now(UTC)
    return {"token": "works", "minutes_to_live": int(left.total_seconds() // 60)}


@app.exception_handler(StorageError)
async def unavailable(_: Request, error: StorageError) -> JSONResponse:
    """Tell the caller the kind of error only. What to do is for the log."""
    return JSONResponse({"error": type(error).__name__}, status_code=503)
