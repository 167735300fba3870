"""The notifier webhook: the user approves a request in Upstox's app, and Upstox posts the new token here.

uvicorn recipes.webhook:app
"""

from __future__ import annotations

import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, HTTPException, Request

from upstox_db_examples import AsyncTokenStorage, InvalidInput, StorageError, open_store


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    store = await anyio.to_thread.run_sync(open_store, os.environ["UPSTOX_DB_STORE"])
    async with AsyncTokenStorage(store) as tokens:
        yield {"tokens": tokens}


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> None:
    """Tell that the receiver runs."""


@app.post("/notifier/{path}", status_code=204)
async def notifier(path: str, request: Request) -> None:
    """Save the token. Upstox sends it without any authentication, so anybody could send one.

    Therefore the last part of the URL is a secret of yours, and `verify=True` asks Upstox whose token it is.
    """
    if not hmac.compare_digest(path.encode(), os.environ["NOTIFIER_PATH"].encode()):
        raise HTTPException(404)
    try:
        message = await request.json()
        if message["user_id"] != os.environ["UPSTOX_USER_ID"] or message["message_type"] != "access_token":
            raise HTTPException(400)
        await request.state.tokens.save_token(message, verify=True)
    except (ValueError, TypeError, KeyError, InvalidInput):
        raise HTTPException(400) from None  # The cause could show what was sent.
    except StorageError as error:
        raise HTTPException(503, type(error).__name__) from None
