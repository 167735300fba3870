"""Whose token it is: the spelling of a user id, and the user that an account logs in."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from .backend import Backend
from .checks import USER_ID
from .errors import KeyUnavailable, LoginRefused, TokenRefused
from .login import Login
from .settings import Settings
from .token import StoredToken
from .token_cipher import TokenCipher

logger = logging.getLogger(__name__)


class Users:
    """The users of one store, and what this program has learned about the accounts of its login."""

    def __init__(self, backend: Backend, cipher: TokenCipher, settings: Settings) -> None:
        self._backend, self._cipher, self._settings = backend, cipher, settings
        self._last_user: str | None = None
        self._user_of: dict[str, str] = {}  # an account always belongs to the same user

    def guess(self, *, last: bool) -> str | None:
        """Return the user for a caller who names none: the login knows it, or a token made by its account does.

        Args:
            last: if the login tells no account, take the user it logged in last. A login that tells its account may
                have changed it since, and a deliberate login is not bound by the past.
        """
        declared: Any = getattr(self._settings.login, "user_id", None)
        if declared and not (isinstance(declared, str) and USER_ID.fullmatch(declared)):
            raise LoginRefused("The login's user_id is not a user id such as AB1234. No request was made.")
        account = account_of(self._settings.login, None)
        return declared or self.user_of_account(account) or (self._last_user if last and not account else None)

    def remember(self, user_id: str, account: str | None) -> None:
        """Remember that this account has logged this user in."""
        if account:
            self._user_of[account] = user_id
        self._last_user = user_id

    def forget(self, user_id: str) -> None:
        """Forget which account logs this user in. A token that the store has still tells."""
        self._user_of = {account: user for account, user in self._user_of.items() if user != user_id}

    def user_of_account(self, account: str | None) -> str | None:
        """Return the user of this account, from a token that decrypts as the account's.

        Anyone who can write to the database can insert a row that names the account, and a program would then trade
        with somebody else's token. So such a row is skipped, and so is one from an earlier version, which binds no
        account.
        """
        if account is None or account in self._user_of:
            return self._user_of.get(account or "")
        for token in self._backend.find_by_account(account):
            try:
                if token.account == account and not token.ciphertext.startswith("v1."):
                    self._cipher.decrypt(token)
                    self._user_of[account] = token.user_id
                    return token.user_id
            except (TokenRefused, KeyUnavailable):
                logger.warning(
                    "A row of %s names this account but cannot be read as its own: it is skipped", token.user_id
                )
        return None

    def look_up(self, user_id: str) -> tuple[str, StoredToken | None]:
        """Return the spelling under which the store keeps this user, and the latest token.

        A new user gets upper case, as Upstox writes ids. Two spellings would make two rows for one user, and the token
        in one of them would be dead.
        """
        for spelling in spellings(user_id):
            if newest := self._backend.find_newest(spelling):
                return spelling, newest
        return user_id.upper(), None

    def as_stored(self, user_id: str) -> str:
        """Return the spelling under which the store keeps this user."""
        return self.look_up(user_id)[0]

    def find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        """Do the same as `Backend.find`; a user id that is not found as given is tried in upper case."""
        found = self._backend.find(user_id, alive_after, now, locked=locked)
        if found is None and user_id != user_id.upper():
            found = self._backend.find(user_id.upper(), alive_after, now, locked=locked)
        return found


def account_of(login: Login, user_id: str | None) -> str | None:
    """Return the login's name for the credentials of this user, if it has one."""
    of_user = getattr(login, "account_of", None)
    account: str | None = of_user(user_id) if of_user else getattr(login, "account", None)
    return account


def spellings(user_id: str) -> list[str]:
    """Return the spellings a store may hold of this id: an earlier version kept the spelling of the login's answer."""
    return list(dict.fromkeys((user_id, user_id.upper(), user_id.lower())))


def is_same_user(one: str, other: str) -> bool:
    """Return whether these are two spellings of one user id."""
    return one.upper() == other.upper()
