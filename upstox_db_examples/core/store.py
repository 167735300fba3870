"""What callers use: the methods that all five stores have. The life of a token is in life_cycle.py."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Self

from .answer import Minted, read_answer
from .batch import PACE, BatchResult, Pace, store_batch
from .checks import check_user_id, is_unicode, require_limit, require_user_id
from .errors import InvalidInput, KeyUnavailable, LoginError, LoginSuperseded, StorageError, TokenRefused
from .life_cycle import LifeCycle, Options, Wish, same_user
from .login import log_out, owner_of
from .token import Secret, TokenResult, issued_at, jwt_expiry, subject

__all__ = ["Options", "TokenStorage"]

logger = logging.getLogger(__name__)

BATCH = 500  # rows a transaction in cleanup and key rotation, so that readers and writers are never locked out long


class TokenStorage(LifeCycle):
    """Keeps one living Upstox token a user. Safe to share between threads; a context manager."""

    def store_token(self, user_identifier: str | None = None) -> TokenResult:
        """Log in, whatever is stored, and keep the new token. The user's earlier token dies by that.

        This is the deliberate way past a refusal that a program on this store has met before.

        Args:
            user_identifier: the user to be logged in; None for the login's own account.

        Returns:
            `token`, `user_id`, `user_name`, `email`, `token_id`, `created_at`, `expires_at`, `usage_count`.

        Raises:
            LoginError: no token was obtained, or it was another user's, under whose name it is stored then.
            StoreUnavailable: the database takes no write; no login was spent.
            TokenNotStored: the database failed after the login; the error carries the token.
        """
        return self._log_in(check_user_id(user_identifier), Wish(deliberate=True))

    def get_valid_token(self, user_id: str) -> TokenResult | None:
        """The user's living token, or None. Never logs in and needs no credentials.

        None also while it is in doubt whether the token lives: a login has begun that may have replaced it at Upstox,
        and that came to no known end.

        Raises:
            KeyUnavailable, TokenRefused: there is one, and it cannot be trusted or read.
        """
        now = self._now()
        found = self._find_as_written(require_user_id(user_id), now + self._policy.margin, now)
        return self._hand_out(found) if found else None

    def get_or_create_token(self, user_id: str | None = None) -> TokenResult:
        """The living token, else a new one. Of many callers at once one logs in and the others read its token.

        Args:
            user_id: the user; None for the login's own account.

        Raises:
            as `store_token` and `get_valid_token`. LoginRefused also where Upstox has refused the same credentials
            before, to any program on this store.
        """
        user_id = check_user_id(user_id) or self._known_user(guess=True)
        return (user_id and self.get_valid_token(user_id)) or self._log_in(user_id, Wish())

    def renew_token(self, user_id: str, refused_token: str | Secret | Mapping[str, Any]) -> TokenResult:
        """For a caller to whom Upstox said 401 (UDAPI100050): a token other than the refused one.

        Logs in only if the stored token still is the refused one. Of a thousand callers one logs in, and all get the
        new token. A 401 has other causes too, such as a request from an unregistered IP, so a user is renewed once in
        `renew_pause` seconds at the most.

        Args:
            user_id: the user.
            refused_token: the token that was refused, or the result that held it.

        Raises:
            LoginLimited: the stored token was renewed just now, and is refused as well; `retry_after` says how long
                this will be so. `store_token` goes past it.
            otherwise as `get_or_create_token`.
        """
        try:
            user_id, refused = require_user_id(user_id), _refused(refused_token)
        finally:
            del refused_token  # A traceback that prints local variables must not show it.
        known, newest = self._look_up(user_id)
        still_stored = newest is not None and self._holds(newest, refused)
        return (None if still_stored else self.get_valid_token(known)) or self._log_in(known, Wish(refused=refused))

    def save_token(self, response: object, *, verify: bool = False) -> TokenResult:
        """Keep a token that another login has made: a notifier webhook, an OAuth code, a dashboard.

        Of two tokens of a user the one that Upstox issued later (`iat`) stays, in whatever order they arrive; where
        the time of issue cannot be read, the one that arrives later. Saving a token again changes nothing.

        The token's signature cannot be checked here. Without `verify` the caller vouches for it: a webhook without
        authentication accepts whatever anybody sends to it.

        Args:
            response: the SDK's `AccessTokenData`, or a mapping with `access_token`, `user_id` and whatever else is
                known, such as the notifier's payload.
            verify: ask Upstox's profile first whether the token lives, and whose it is.

        Returns:
            the result for the token that is stored in the end.

        Raises:
            InvalidInput: the token is dead, is another user's or another kind of token (an extended one lives for a
                year), was issued in the future, or Upstox refuses it. Nothing is stored.
            LoginInterrupted: Upstox could not be asked. Try again.
            LoginSuperseded: a later token of this user was stored here and has ended since.
        """
        try:
            minted = read_answer(response)
        except LoginError as error:
            raise InvalidInput(f"This is no token response: {error}") from None
        finally:
            del response
        now = self._now()
        self._refuse_another_kind(minted, now)
        if verify:
            owner = getattr(self._login, "owner_of", owner_of)(minted.token)
            if owner is None or not same_user(owner, minted.user_id):
                raise InvalidInput(f"Upstox does not take this as a living token of {minted.user_id}.")
        with self._lock(minted.user_id.upper()):
            try:
                return self._save(minted, None, now, "adopted")
            except LoginSuperseded:
                if living := self.get_valid_token(self._as_stored(minted.user_id)):
                    return living
                raise

    def store_token_batch(
        self, user_ids: Iterable[str], *, replace: bool = False, progress: bool = True, pace: Pace = PACE
    ) -> list[BatchResult]:
        """A living token for each of these accounts. One after another, each committed by itself.

        A living token is kept and costs no login, so a batch that was broken off can simply be run again. (Where reads
        are counted, finding it counts as one.) What is wrong with one account does not stop the others. Wrong
        credentials are tried once; after a limit or a broken connection an account is tried again, twice at the most,
        and never with a one-time password it has used.

        Args:
            user_ids: whose. One that is named twice is logged in once.
            replace: log all of them in, whatever is stored. Their earlier tokens die by that.
            progress: show a progress bar, where tqdm is installed.
            pace: how fast. All batches of a process share Upstox's limits: 1 login a second, 10 a minute, 60 in half
                an hour. So 100 accounts take at least 30 minutes.

        Returns:
            a dict for each of `user_ids`, in their order: `user_id`, `success`; then `token_id`, `expires_at` and
            `kept` (no login was due), or `error` (what to do) and `error_type` (the name of its class). The error
            itself is the attribute `exception`, with the token if it could not be stored.

        Raises:
            InvalidInput: `user_ids` is not a list of texts. No other error: a failed account is a result.
        """
        return store_batch(self, user_ids, replace=replace, progress=progress, pace=pace)

    def get_token_history(self, user_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """The user's tokens, newest first, without the tokens themselves.

        Each has `token_id`, `created_at`, `expires_at`, `is_active` (it could be handed out now), `user_name`,
        `email`, `broker`, `usage_count`, `last_used_at`; times are ISO text in UTC.
        """
        user_id, limit, now = require_user_id(user_id), require_limit(limit), self._now()
        return self._history(user_id, limit, now) or self._history(user_id.upper(), limit, now)

    def get_user_statistics(self, user_id: str) -> dict[str, Any]:
        """`total_tokens`, `active_tokens`, `total_usage`, `avg_usage_per_token`, `last_generation`, `last_usage`.

        An unknown user has zeros, and None for the two times.
        """
        return self._statistics(self._as_stored(require_user_id(user_id)), self._now())

    def get_audit_trail(self, user_id: str, limit: int = 50) -> list[dict[str, Any]]:
        """What was done to the user's tokens, by whom and when, newest first. Needs no key.

        Each entry has `action`, `performed_at`, `actor`, `metadata`, `user_id`, `token_id`, `token_created`. The
        actions: login, login_failed, created, adopted, used, deactivated, revoked, expired. "created" names the fields
        of Upstox's answer that were missing, null, of another type or unknown: names and no values.
        """
        user_id, limit = require_user_id(user_id), require_limit(limit)
        return self._audit(user_id, limit) or self._audit(user_id.upper(), limit)

    def revoke_token(self, user_id: str) -> bool:
        """Forget the user's token: its ciphertext is erased and it is never handed out again.

        Upstox is not told: there the token lives until 03:30, the next login, or a logout.

        Returns:
            whether there was one.
        """
        user_id = self._as_stored(require_user_id(user_id))
        revoked = self._revoke(user_id, self._now())
        logger.info("Revoked the token of %s" if revoked else "%s had no token to revoke", user_id)
        return revoked

    def log_out(self, user_id: str) -> bool:
        """End the user's token at Upstox and forget it here, as for a token that leaked.

        Returns:
            whether Upstox still knew it. False also where none is stored.

        Raises:
            LoginInterrupted: Upstox could not be told. The token is still stored, so that this can be repeated.
        """
        user_id = self._as_stored(require_user_id(user_id))
        with self._lock(user_id.upper()):
            newest = self._newest(user_id)
            if newest is None or not newest.ciphertext:
                return False
            ended: bool = getattr(self._login, "log_out", log_out)(self._decrypt(newest))
            self.revoke_token(user_id)
        return ended

    def cleanup_expired_tokens(self) -> int:
        """Erase the ciphertext of dead tokens; their history and audit stay.

        Returns:
            how many there were.
        """
        removed = 0
        while batch := self._expire(self._now(), BATCH):
            removed += batch
        logger.info("Erased %s dead tokens", removed)
        return removed

    def cleanup_old_audit_entries(self, days_to_keep: int = 90) -> int:
        """Delete audit entries older than this many days, in batches; tokens' records and counts stay.

        Returns:
            how many there were.

        Raises:
            ConfigurationError: a role that may only store and read tokens cannot delete what was audited.
        """
        if type(days_to_keep) is not int or not 0 <= days_to_keep <= 36_500:
            raise InvalidInput("days_to_keep must be a whole number of days from 0 up.")
        before, removed = self._now() - timedelta(days=days_to_keep), 0
        while batch := self._forget_entries(before, BATCH):
            removed += batch
        logger.info("Deleted %s audit entries", removed)
        return removed

    def rotate_keys(self) -> int:
        """Encrypt every token again that is not under the key ring's first key.

        In three steps, so that no program meets a key it does not know: give every program the new key behind the
        old one; then in front of it; then call this. Others may read and write meanwhile. Killed half-way, it can be
        run again.

        Returns:
            how many were encrypted again.

        Raises:
            KeyUnavailable, TokenRefused: some tokens cannot be read; it names the users. All others were done.
        """
        rotated = 0
        refused: dict[str, StorageError] = {}
        self._key_ring = None  # This program may run since before the newest key was made.
        # The ring is asked for again also when a token's key is not in it. A batch under the key that was the first
        # one before would then be encrypted again for ever.
        while batch := self._under_other_keys(newest := self._ring.key_ids[0], BATCH):
            pairs = []
            for old in batch:
                try:
                    pairs.append((old, self._encrypt(self._decrypt(old), old)))
                except (KeyUnavailable, TokenRefused) as error:
                    refused[old.user_id] = error
            if not pairs:
                break
            rotated += self._replace_ciphertexts(pairs)
        if refused:
            first, users = next(iter(refused.values())), ", ".join(sorted(refused))
            first.args = (f"Encrypted again: {rotated}, but not the tokens of {users}. The first: {first}",)
            raise first
        logger.info("Encrypted %s tokens again under key %s", rotated, newest)
        return rotated

    def keys_in_use(self) -> dict[str, int]:
        """How many stored tokens each key id encrypts.

        A key that is not named here can be thrown away, unless a backup or an export that you keep needs it.
        """
        return self._count_keys()

    def get_storage_status(self) -> dict[str, Any]:
        """Each database by name: "healthy", or "error: …" and what to do; and a `timestamp`. Never raises."""
        return {**self._health(), "timestamp": self._now().isoformat()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_another_kind(self, minted: Minted, now: datetime) -> None:
        """Refuse what is not a living access token of that user, as far as the token itself tells."""
        if not is_unicode(minted.token.reveal()):
            raise InvalidInput(f"What is given as a token of {minted.user_id} holds half a character: it is no token.")
        dies, issued, whose = jwt_expiry(minted.token), issued_at(minted.token), subject(minted.token)
        if dies and dies <= now:
            raise InvalidInput(f"This token of {minted.user_id} died at {dies.isoformat()}.")
        if whose and not same_user(whose, minted.user_id):
            raise InvalidInput(f"This token does not belong to {minted.user_id}, but to another user.")
        if issued and issued > now + self._policy.margin:
            raise InvalidInput("This token was issued in the future. Check this machine's clock.")
        if dies and dies > self._policy.next_death(now):
            raise InvalidInput(
                "This token lives longer than an access token can. It is of another kind: an extended or an analytics "
                "token only reads, a sandbox token trades nowhere."
            )

    def _replace_token(self, user_id: str) -> TokenResult:
        """For a batch: log in whatever is stored, but not past a refusal, as `store_token` does."""
        return self._log_in(check_user_id(user_id), Wish(replace=True))


def _refused(token: str | Secret | Mapping[str, Any]) -> Secret:
    """The refused token as a Secret.

    Raises:
        InvalidInput: it is neither text nor a result.
    """
    if isinstance(token, Mapping):
        token = token.get("token") or token.get("access_token") or ""
    if isinstance(token, Secret):
        return token
    text, kind = (token.strip(), "") if isinstance(token, str) else ("", type(token).__name__)
    del token
    if not text or not is_unicode(text):
        del text
        raise InvalidInput(f"refused_token is the text of the token that was refused, or a result. {kind}".strip())
    return Secret(text)
