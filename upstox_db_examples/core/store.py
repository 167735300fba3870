"""The public interface: the methods that all five stores have.

A store holds a backend (backend.py), which does the work in one kind of database, and a life cycle (life_cycle.py),
which decides when to log in.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Self

from .answer import Minted, read_answer
from .backend import Backend
from .batch import PACE, BatchResult, Pace, store_batch
from .checks import check_user_id, is_unicode, require_limit, require_user_id
from .errors import DatabaseMissing, InvalidInput, KeyUnavailable, LoginError, StorageError, TokenRefused
from .life_cycle import LifeCycle, Wish
from .login import Login, log_out, owner_of
from .settings import Options, Settings, require_login
from .token import Secret, TokenResult, issued_at, jwt_expiry, subject
from .token_cipher import TokenCipher
from .users import Users, is_same_user
from .watch import Lookout, Watch

__all__ = ["Options", "TokenStorage"]

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 500  # in one transaction in cleanup and key rotation, so that nobody is locked out for long


class TokenStorage:
    """Keeps one working Upstox token per user. It is a context manager, and threads can share it.

    Attributes:
        backend: the operations on the database. Callers rarely need it; export, import and migrate use it.
        cipher: encrypts and decrypts this store's tokens.

    Example:
        >>> from upstox_db_examples import SQLiteUpstoxStorage
        >>> with SQLiteUpstoxStorage("upstox.db") as storage:
        ...     result = storage.get_or_create_token("AB1234")  # logs in, because there is no token yet
        ...     again = storage.get_or_create_token("AB1234")  # finds that token
        ...     newer = storage.renew_token("AB1234", again)  # after Upstox has answered 401
        >>> again["token"] == result["token"], newer["token"] == result["token"]
        (True, False)
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend = backend
        in_use = functools.partial(_keys_of_working_tokens, backend)
        self.cipher = TokenCipher(settings.keys, backend.store_kind, in_use)
        self._settings = settings
        self._policy, self._now = settings.policy, settings.context.now
        self._users = Users(backend, self.cipher, settings)
        self._life_cycle = LifeCycle(backend, self.cipher, self._users, settings)
        self._lookout = Lookout(backend)
        if not settings.create and not backend.has_tables():
            backend.close()
            raise DatabaseMissing(f"{backend.where} has no tables of this package.")
        self.init_database()

    @property
    def login(self) -> Login:
        """The login that is called when a login is due. Another one may take its place."""
        return self._settings.login

    @login.setter
    def login(self, login: Login) -> None:
        require_login(login)
        self._settings.login = login

    def init_database(self, runtime_role: str | None = None) -> None:
        """Make the tables, or upgrade those of an older version. This is safe to repeat and to run concurrently.

        Opening a store does this already.

        Args:
            runtime_role: a role to make, or to grant the least rights that storing and reading need. Run this as the
                owner of the database. SQLite has no roles.

        Raises:
            ConfigurationError: the database is not usable, or this role may not change it.
            InvalidInput: this kind of store has no roles.
        """
        self.backend.init_database(runtime_role)

    def store_token(self, user_identifier: str | None = None) -> TokenResult:
        """Log in, whatever is stored, and keep the new token. This kills the user's earlier token.

        A call is deliberate, so it overrides an earlier refusal that a program on this store has recorded.

        Args:
            user_identifier: the user to log in; None for the login's own account.

        Returns:
            `token`, `user_id`, `user_name`, `email`, `token_id`, `created_at`, `expires_at`, `usage_count`.

        Raises:
            LoginError: the login gave no token, or gave another user's; that one is stored under that user's id.
            StoreUnavailable: the database accepts no writes; no login was spent.
            TokenNotStored: the database failed after the login; the error carries the token.
        """
        return self._life_cycle.log_in(check_user_id(user_identifier), Wish(deliberate=True))

    def get_valid_token(self, user_id: str) -> TokenResult | None:
        """Return the user's working token, or None. This never logs in and needs no credentials.

        While a login is running you still get the old token, which works until that login's end. If a login ended and
        nobody knows how, the token may be dead, and this returns None until `get_or_create_token` has asked Upstox.

        Raises:
            KeyUnavailable, TokenRefused: there is a token, but it cannot be read or trusted.
        """
        return self._life_cycle.read(require_user_id(user_id))

    def watch(self, user_id: str) -> Watch:
        """Watch a user's token: iterate over the present one, at once, and then each new one, whoever stored it.

        The iteration has no end, until somebody calls the watch's `close`.

        None stands for no working token, as after `revoke_token` or at 03:30. This never logs in. See `Watch`.

        A new token is noticed within a tenth of a second where the database tells of it: in PostgreSQL (and the hybrid)
        and in a replica set of MongoDB. Otherwise the database is polled, and that takes less than a second: in SQLite,
        behind a pooler of PostgreSQL in transaction mode, in a MongoDB server without replica set, and for a user of
        MongoDB who lacks the right `changeStream`. All watches of a store share a thread, and one connection beside
        those of `pool_size`.

        Raises:
            InvalidInput: `user_id` is not a user id.
            StoreUnavailable: the store is closed, or no thread can be started.
        """
        user_id = require_user_id(user_id)
        return Watch(user_id, self._lookout.watch(user_id), self._life_cycle, self._settings, self)

    def get_or_create_token(self, user_id: str | None = None) -> TokenResult:
        """Return the working token, or log in for a new one. If many call at once, one logs in and all get its token.

        Args:
            user_id: the user; None for the login's own account.

        Raises:
            LoginRefused: Upstox refuses the credentials, or has already refused them to any program on this store.
            LoginError, StoreUnavailable, TokenNotStored: as for `store_token`.
            KeyUnavailable, TokenRefused: as for `get_valid_token`.
        """
        return self._life_cycle.read_or_log_in(check_user_id(user_id))

    def renew_token(self, user_id: str, refused_token: str | Secret | Mapping[str, Any]) -> TokenResult:
        """Return a token other than the refused one, for a caller that got a 401 (UDAPI100050) from Upstox.

        This logs in only if the stored token is still the refused one. Of a thousand callers one logs in, and all get
        the new token. A 401 has other causes too, such as a request from an unregistered IP, so a user is renewed at
        most once in `renew_pause` seconds.

        Args:
            user_id: the user.
            refused_token: the token that was refused, or the result that held it.

        Raises:
            LoginLimited: the stored token was renewed just now and is refused as well; `retry_after` says how long to
                wait. `store_token` logs in all the same.
            StorageError: as for `get_or_create_token`.
        """
        try:
            user_id, refused = require_user_id(user_id), _refused(refused_token)
        finally:
            del refused_token  # A traceback that prints local variables must not show it.
        return self._life_cycle.renew(user_id, refused)

    def save_token(self, response: object, *, verify: bool = False) -> TokenResult:
        """Keep a token that was made elsewhere: by a notifier webhook, an OAuth code, or a dashboard.

        Of two tokens for one user, the one that Upstox issued later (`iat`) stays, in whatever order they arrive. If
        the time of issue cannot be read, the one that arrives later stays. Saving a token again changes nothing.

        The token's signature cannot be checked here. Without `verify` the caller vouches for the token: a webhook
        without authentication accepts whatever anybody sends.

        Args:
            response: the SDK's `AccessTokenData`, or a mapping with `access_token`, `user_id` and any other known
                fields, such as the notifier's payload.
            verify: first ask Upstox's profile API whether the token works and whose it is.

        Returns:
            the result for the token that is stored in the end.

        Raises:
            InvalidInput: the token is dead, belongs to another user, is of another kind (an extended token lives for a
                year), was issued in the future, or is refused by Upstox. Nothing is stored.
            LoginInterrupted: Upstox could not be reached. Try again.
            LoginSuperseded: a later token of this user was stored here and has ended since.
        """
        try:
            minted = read_answer(response)
        except LoginError as error:
            raise InvalidInput(f"This is not a token response: {error}") from None
        finally:
            del response
        self._refuse_unusable(minted)
        if verify:
            owner = getattr(self.login, "owner_of", owner_of)(minted.token)
            if owner is None or not is_same_user(owner, minted.user_id):
                raise InvalidInput(f"Upstox does not accept this as a working token of {minted.user_id}.")
        return self._life_cycle.adopt(minted)

    def store_token_batch(
        self, user_ids: Iterable[str], *, replace: bool = False, progress: bool = True, pace: Pace = PACE
    ) -> list[BatchResult]:
        """Make sure that each of these accounts has a working token. Each one in turn has its own commit.

        A working token is kept and costs no login, so an interrupted batch can simply run again. (A store that counts
        reads counts this as one.) A failed account does not stop the others. Wrong credentials are tried once. After a
        limit or a broken connection an account is retried at most twice, never with a used one-time password.

        Args:
            user_ids: the users. A user named twice is logged in once.
            replace: log all of them in, whatever is stored. This kills their earlier tokens.
            progress: show a progress bar if tqdm is installed.
            pace: the pace of the logins. All batches of a process share Upstox's limits: 1 login a second, 10 a minute,
                60 in half an hour. So 100 accounts take at least 30 minutes.

        Returns:
            a dict for each of `user_ids`, in their order: `user_id`, `success`; then `token_id`, `expires_at` and
            `kept` (no login was due), or `error` (what to do) and `error_type` (the name of its class). The attribute
            `exception` is the error itself, with the token if it could not be stored.

        Raises:
            InvalidInput: `user_ids` is not a list of strings. There is no other error: a failed account is a result.
            StorageError: in place of Ctrl-C, if the database has refused new tokens. The error carries the first one,
                and its `others` are the errors with the others.
        """
        return store_batch(self._life_cycle, user_ids, replace=replace, progress=progress, pace=pace)

    def get_token_history(self, user_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """Return the records of the user's tokens, newest first, without the tokens themselves.

        Each has `token_id`, `created_at`, `expires_at`, `is_active` (a caller could get it now), `user_name`, `email`,
        `broker`, `usage_count`, `last_used_at`. Times are ISO text in UTC.
        """
        user_id, limit, now = require_user_id(user_id), require_limit(limit), self._now()
        read = self.backend.read_history
        return read(user_id, limit, now) or read(user_id.upper(), limit, now)

    def get_user_statistics(self, user_id: str) -> dict[str, Any]:
        """Count `total_tokens`, `active_tokens`, `total_usage`, `avg_usage_per_token`; `last_generation`, `last_usage`.

        An unknown user has zeros, and None for the two times.
        """
        return self.backend.read_statistics(self._users.as_stored(require_user_id(user_id)), self._now())

    def get_audit_trail(self, user_id: str, limit: int = 50) -> list[dict[str, Any]]:
        """Return the user's audit entries, newest first: what was done, by whom and when. This needs no key.

        Each entry has `action`, `performed_at`, `actor`, `metadata`, `user_id`, `token_id`, `token_created`. The
        actions are login, login_failed, created, adopted, used, deactivated, revoked, expired. "created" lists the
        names, never the values, of fields in Upstox's answer that were missing, null, of another type or unknown.
        """
        user_id, limit = require_user_id(user_id), require_limit(limit)
        return self.backend.read_audit_trail(user_id, limit) or self.backend.read_audit_trail(user_id.upper(), limit)

    def revoke_token(self, user_id: str) -> bool:
        """Forget the user's token: erase its ciphertext, so that nobody gets it again.

        Upstox is not told. The token works there until 03:30, the next login, or a logout.

        Returns:
            whether there was a token.
        """
        user_id = self._users.as_stored(require_user_id(user_id))
        revoked = self.backend.revoke(user_id, self._now())
        self._users.forget(user_id)
        logger.info("Revoked the token of %s" if revoked else "%s had no token to revoke", user_id)
        return revoked

    def log_out(self, user_id: str) -> bool:
        """End the user's token at Upstox and forget it here, for example after a leak.

        Returns:
            whether Upstox still knew the token. False if none is stored.

        Raises:
            LoginInterrupted: Upstox could not be told. The token is still stored, so you can try again.
        """
        user_id = self._users.as_stored(require_user_id(user_id))
        with self.backend.lock(user_id.upper()):
            # A token in doubt stays in doubt meanwhile: readers must not take this caller for a running login.
            newest = self.backend.find_in_doubt(user_id) or self.backend.find_newest(user_id)
            if newest is None or not newest.ciphertext:
                return False
            ended: bool = getattr(self.login, "log_out", log_out)(self.cipher.decrypt(newest))
            self.revoke_token(user_id)
        return ended

    def cleanup_expired_tokens(self) -> int:
        """Erase the ciphertext of dead tokens; their history and audit stay.

        Returns:
            how many there were.
        """
        removed = 0
        while batch := self.backend.expire(self._now(), ROWS_AT_ONCE):
            removed += batch
        logger.info("Erased %s dead tokens", removed)
        return removed

    def cleanup_old_audit_entries(self, days_to_keep: int = 90) -> int:
        """Delete audit entries older than this many days, in batches. The records and counts of tokens stay.

        Returns:
            how many there were.

        Raises:
            ConfigurationError: this role may only store and read tokens and cannot delete audit entries.
        """
        if type(days_to_keep) is not int or not 0 <= days_to_keep <= 36_500:
            raise InvalidInput("days_to_keep must be a whole number of days from 0 to 36500.")
        before, removed = self._now() - timedelta(days=days_to_keep), 0
        while batch := self.backend.delete_entries(before, ROWS_AT_ONCE):
            removed += batch
        logger.info("Deleted %s audit entries", removed)
        return removed

    def rotate_keys(self) -> int:
        """Re-encrypt every token that is not under the key ring's first key.

        Rotate in three steps, so that no program meets an unknown key: give every program the new key after the old
        one; then move it before the old one; then call this. Others may read and write meanwhile. If this is killed
        half-way, run it again.

        Returns:
            how many tokens were re-encrypted.

        Raises:
            KeyUnavailable, TokenRefused: some tokens cannot be read; the error names the users. All others are done.
        """
        rotated = 0
        refused: dict[str, StorageError] = {}
        # This program may have started before the newest key was made. All of this pass uses one ring: with one that
        # changed meanwhile, a batch could be re-encrypted under an old key, for ever.
        cipher, after = self.cipher.with_fresh_keys(), None
        newest = cipher.ring.key_ids[0]
        # The pass ends, because it goes through the user ids once. Tokens that cannot be read are passed, too.
        while batch := self.backend.find_under_other_keys(newest, ROWS_AT_ONCE, after):
            after, pairs = batch[-1].user_id, []
            for old in batch:
                try:
                    pairs.append((old, cipher.replace_ciphertext(old, cipher.decrypt(old))))
                except (KeyUnavailable, TokenRefused) as error:
                    refused[old.user_id] = error
            if pairs:
                rotated += self.backend.replace_ciphertexts(pairs)
        if refused:
            first, users = next(iter(refused.values())), ", ".join(sorted(refused))
            first.args = (f"Re-encrypted {rotated}, but not the tokens of {users}. The first error: {first}",)
            raise first
        logger.info("Re-encrypted %s tokens with key %s", rotated, newest)
        return rotated

    def keys_in_use(self) -> dict[str, int]:
        """Return how many stored tokens each key id encrypts.

        A key that is not listed can be thrown away, unless you keep a backup or an export that needs it.
        """
        return self.backend.count_keys()

    def get_storage_status(self) -> dict[str, Any]:
        """Return "healthy" or "error: …" with what to do for each database, and a `timestamp`. This never raises."""
        return {**self.backend.check_health(), "timestamp": self._now().isoformat()}

    def close(self) -> None:
        """Close what this store opened, and end its watches. A second call is harmless; a later call raises
        `StoreUnavailable` (`get_storage_status` reports it)."""
        self._lookout.close()
        self.backend.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.backend.where})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_unusable(self, minted: Minted) -> None:
        """Refuse anything but a working access token of that user, as far as the token itself tells."""
        now = self._now()
        if not is_unicode(minted.token.reveal()):
            raise InvalidInput(f"This token of {minted.user_id} holds half a character, so it cannot be a token.")
        dies, issued, whose = jwt_expiry(minted.token), issued_at(minted.token), subject(minted.token)
        if dies and dies <= now:
            raise InvalidInput(f"This token of {minted.user_id} expired at {dies.isoformat()}.")
        if whose and not is_same_user(whose, minted.user_id):
            raise InvalidInput(f"This token belongs to another user, not to {minted.user_id}.")
        if issued and issued > now + self._policy.margin:
            raise InvalidInput("This token was issued in the future. Check this machine's clock.")
        if dies and dies > self._policy.next_death(now):
            raise InvalidInput(
                "This token lives longer than an access token can, so it is another kind. Extended and analytics "
                "tokens can only read, and sandbox tokens cannot place real orders."
            )


def _keys_of_working_tokens(backend: Backend) -> list[str]:
    """Return ids of keys that working tokens are under, of the first ones found. A dead token does not need its key."""
    now, after = backend.context.now(), None
    while batch := backend.find_under_other_keys("", ROWS_AT_ONCE, after):
        after = batch[-1].user_id
        if keys := {token.ciphertext.partition(".")[2].partition(".")[0] for token in batch if token.expires_at > now}:
            return sorted(keys)
    return []


def _refused(token: str | Secret | Mapping[str, Any]) -> Secret:
    """Return the refused token as a Secret.

    Raises:
        InvalidInput: the argument is neither text nor a result.
    """
    if isinstance(token, Mapping):
        token = token.get("token") or token.get("access_token") or ""
    if isinstance(token, Secret):
        return token
    text, kind = (token.strip(), "unusable text") if isinstance(token, str) else ("", type(token).__name__)
    del token
    if not text or not is_unicode(text):
        del text
        raise InvalidInput(f"refused_token must be the token that was refused, as text or a result, not {kind}.")
    return Secret(text)
