"""Stores that contain something to transfer, and everything that they report about it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from upstox_db_examples import TokenStorage
from upstox_db_examples.transfer.transfer import read_entries

from .clocks import Clock

USERS = [f"CD{n:04}" for n in range(4)]


def filled(store: TokenStorage, clock: Clock) -> TokenStorage:
    """Fill the store: tokens that are active, replaced, revoked and expired, use counts, and failed logins."""
    for user_id in USERS:
        for _ in range(3):
            store.store_token(user_id)
            store.get_valid_token(user_id)
            store.get_valid_token(user_id)
            clock.advance(minutes=7)
    store.revoke_token(USERS[1])
    clock.advance(days=1)
    store.cleanup_expired_tokens()
    for user_id in USERS[:3]:
        store.store_token(user_id)
        store.get_valid_token(user_id)
    store.revoke_token(USERS[2])
    return store


def token_of(store: TokenStorage, user_id: str) -> str:
    read = store.get_valid_token(user_id)
    assert read
    return str(read["token"])


def told(store: TokenStorage) -> Any:
    """Return everything that a store reports about its users, except the ids of its rows."""
    shown = [
        (
            store.get_user_statistics(user_id),
            store.get_token_history(user_id, 1000),
            sorted(
                store.get_audit_trail(user_id, 1000), key=lambda entry: json.dumps(entry, sort_keys=True, default=str)
            ),
            (read := store.backend.find(user_id, store.backend.context.now(), store.backend.context.now()))
            and store.cipher.decrypt(read).reveal(),
        )
        for user_id in USERS
    ]
    for _, history, trail, _ in shown:
        for row in [*history, *trail]:
            row.pop("token_id")
    return shown


def as_it_was(store: TokenStorage) -> Any:
    """Return the same as `told`, but without a read, because reads are counted."""
    return [
        (store.backend.read_tokens(user_id), [entry._replace(position=None) for entry in read_entries(store, user_id)])
        for user_id in store.backend.list_users()
    ]


def to_be_compared(store: TokenStorage) -> Any:
    """Return everything that two stores should have in common, including the text of the active tokens."""
    now = store.backend.context.now()
    return {
        user_id: (
            [
                replace(
                    token,
                    ciphertext=store.cipher.decrypt(token).reveal()
                    if token.ciphertext and token.expires_at > now
                    else "",
                    key_id="",
                )
                for token in store.backend.read_tokens(user_id)
            ],
            sorted(
                json.dumps(entry._replace(position=None), default=str, sort_keys=True)
                for entry in read_entries(store, user_id)
            ),
        )
        for user_id in store.backend.list_users()
    }
