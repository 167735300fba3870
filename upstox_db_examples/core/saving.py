"""Store a new token, unless the store has one that Upstox issued later."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from .answer import Minted
from .backend import Backend
from .cipher import Binding
from .errors import KeyUnavailable, LoginError, LoginSuperseded, StoreUnavailable, TokenRefused
from .settings import Settings
from .token import Secret, StoredToken, TokenResult, issued_at, subject
from .token_cipher import TokenCipher
from .users import Users, account_of, is_same_user

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # to store a token while other writers store tokens of the same user


class Saving:
    """Stores new tokens in order: by Upstox's own time of issue and by generation, never by this machine's clock."""

    def __init__(self, backend: Backend, cipher: TokenCipher, users: Users, settings: Settings) -> None:
        self._backend, self._cipher, self._users = backend, cipher, users
        self._settings, self._policy = settings, settings.policy
        self._context = settings.context

    def save(self, minted: Minted, before: int | None, now: datetime, action: str) -> TokenResult:
        """Store this token, unless the store has one that was issued later.

        Args:
            before: the user's latest generation when the login began under the user's lock; None if unknown.
            action: "created" or "adopted", for the audit trail.

        Raises:
            LoginSuperseded: a token that was issued later is stored. The error carries this one.
            StoreUnavailable: the database did not take the token.
        """
        if before is None:
            minted = minted._replace(user_id=self._users.as_stored(minted.user_id))
        latest, looked = before, before is not None  # The lock usually keeps other writers out.
        for _ in range(ATTEMPTS):
            if not looked:
                newest = self._backend.find_newest(minted.user_id)
                if newest is not None and newest.generation != before:
                    if self._cipher.is_of(newest, minted.token):
                        return result_of(minted.token, newest)
                    if not self._is_later(minted, newest, before, action):
                        raise _superseded_error(minted)
                latest = newest.generation if newest else 0
            looked = False
            token = self._encrypt(minted, (latest or 0) + 1, now, action)
            try:
                token = self._backend.insert(token, action, minted.odd_fields)
            except LoginSuperseded:
                continue  # Another writer was faster. Compare the two tokens again.
            logger.info("Stored token %s of %s", token.token_id, token.user_id)
            return result_of(minted.token, token)
        raise StoreUnavailable(f"Other programs keep storing tokens of {minted.user_id}. Try again.")

    def account_that_made(self, minted: Minted) -> str | None:
        """Return the account to bind to this token, or None if the token names a different user than the answer.

        Such an answer would bind the account to a user that it cannot log in.
        """
        whose = subject(minted.token)
        if whose is not None and not is_same_user(whose, minted.user_id):
            return None
        return account_of(self._settings.login, minted.user_id)

    def _encrypt(self, minted: Minted, generation: int, now: datetime, action: str) -> StoredToken:
        expires_at = self._policy.expires_at(minted.token, now)
        account = self.account_that_made(minted) if action == "created" else None
        binding = Binding(minted.user_id, expires_at, generation, self._backend.store_kind, account)
        return StoredToken(
            minted.user_id,
            *self._cipher.encrypt(minted.token, binding),
            generation,
            created_at=now,
            expires_at=expires_at,
            account=account,
            issued_at=issued_at(minted.token),
            **minted.profile,
        )

    def _is_later(self, minted: Minted, newest: StoredToken, before: int | None, action: str) -> bool:
        """Return whether Upstox issued this token after the newest stored one. This machine's clock does not matter."""
        mine, other = issued_at(minted.token), newest.issued_at
        if newest.ciphertext:  # Nobody can forge a ciphertext, and rows of earlier versions have no other time.
            try:
                other = issued_at(self._cipher.decrypt(newest))
            except (KeyUnavailable, TokenRefused) as error:
                logger.info("The stored token of %s cannot be compared with the new one: %s", minted.user_id, error)
        elif other and other > self._context.now() + timedelta(days=1):
            other = None  # Only a forger writes such a time, and it would keep every later token out.
        if mine is None or other is None:
            return before is None  # A login that lost its lock is the older one; all others are newer.
        if mine == other and newest.in_doubt:
            return True  # A login began after that token was stored.
        owner_of = getattr(self._settings.login, "owner_of", None)
        if mine != other or owner_of is None or action == "adopted":
            return mine > other
        try:  # For two logins within one second, only Upstox knows which came later.
            return owner_of(minted.token) is not None
        except LoginError:
            return False


def _superseded_error(minted: Minted) -> LoginSuperseded:
    error = LoginSuperseded(
        f"The store has a token of {minted.user_id} that was issued later. Read it with get_valid_token()."
    )
    error.token, error.user_id = minted.token, minted.user_id
    return error


def result_of(secret: Secret, token: StoredToken) -> TokenResult:
    """Return the result that a caller gets for this token."""
    return TokenResult(
        secret,
        {
            "user_id": token.user_id,
            "user_name": token.user_name,
            "email": token.email,
            "token_id": token.token_id,
            "created_at": token.created_at,
            "expires_at": token.expires_at,
            "usage_count": token.usage_count,
            **({"source": token.source} if token.source else {}),
        },
    )
