"""What the tests of batches share: accounts at the local Upstox, and a batch without a bar and without pauses."""

from __future__ import annotations

from typing import Any

from upstox_db_examples import Accounts, TokenStorage
from upstox_db_examples.local.upstox import LocalUpstox

from .clocks import AT_ONCE

IDS = [f"CD{number:04}" for number in range(100)]


def made_accounts(upstox: LocalUpstox, user_ids: list[str], **wrong: str) -> Accounts:
    """Create these accounts at this Upstox. An account in `wrong`, given as `user_id=PIN`, gets that wrong PIN."""
    credentials = {user_id: upstox.add_account(user_id).credentials() for user_id in user_ids}
    for user_id, pin in wrong.items():
        credentials[user_id]["pin_code"] = pin
    return Accounts(credentials, base_domain=upstox.base_domain)


def batch(store: TokenStorage, user_ids: list[str], **options: Any) -> list[Any]:
    return list(store.store_token_batch(user_ids, **{"progress": False, "pace": AT_ONCE, **options}))
