"""A bot that holds a connection and makes it anew for each new token, whoever stored it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from upstox_db_examples import AsyncTokenStorage, TokenResult


class Refused(Exception):
    """Upstox refused the token of this connection."""


async def run_bot(
    tokens: AsyncTokenStorage[Any], user_id: str, connect: Callable[[TokenResult], Awaitable[None]]
) -> None:
    """Keep one connection open, with the present token.

    Args:
        tokens: the store.
        user_id: the user.
        connect: opens a connection with this token and serves it. It is cancelled when there is another token. It
            raises `Refused` when Upstox says 401 or 403. For a lost network it has to connect again by itself.

    Raises:
        StorageError: a login failed, as for `get_or_create_token` and `renew_token`. It is in an ExceptionGroup if it
            comes later than at the start.
    """
    await tokens.get_or_create_token(user_id)
    async with tokens.watch(user_id) as changes, anyio.create_task_group() as tasks:
        connection = anyio.CancelScope()
        async for token in changes:
            connection.cancel()
            connection = anyio.CancelScope()
            if token is not None:  # None: the token was revoked, or has expired.
                tasks.start_soon(_serve, connection, tokens, user_id, connect, token)
        connection.cancel()


async def _serve(
    scope: anyio.CancelScope,
    tokens: AsyncTokenStorage[Any],
    user_id: str,
    connect: Callable[[TokenResult], Awaitable[None]],
    token: TokenResult,
) -> None:
    with scope:
        try:
            await connect(token)
        except Refused:
            await tokens.renew_token(user_id, token)  # The watch then gives the new one.
