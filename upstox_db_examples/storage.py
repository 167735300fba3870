"""The life cycle that all five stores share: find -> lock -> find again -> log in -> save.

A store supplies what only its database can do: see backend.py.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, Unpack

from .backend import ACCOUNT_LOCK, Backend
from .batch import PACE, BatchResult, Pace, store_batch
from .checks import USER_ID, check_user_id, require_aware, require_limit, require_positive, require_user_id
from .cipher import Binding, KeyRing, KeySource
from .errors import (
    InvalidInput,
    KeyUnavailable,
    LoginInterrupted,
    LoginRefused,
    LoginSuperseded,
    StorageError,
    TokenNotStored,
    TokenRefused,
)
from .login import Login, SdkLogin
from .token import ExpiryPolicy, Secret, StoredToken, TokenResult

if TYPE_CHECKING:
    from upstox_totp.models import AccessTokenData

logger = logging.getLogger(__name__)

BATCH = 500  # rows a transaction in cleanup and key rotation, so that readers and writers are never locked out long


class Options(TypedDict, total=False):
    """What every store takes, by keyword.

    Attributes:
        login: who logs in; `SdkLogin()` by default. Called only when a login is due.
        keys: a `KeyRing`, or a callable that gives one (a vault, a KMS); `KeyRing.default()` by default.
        clock: gives the present as an aware datetime; tests and notebooks set it.
        actor: who acts, in the audit trail; `user@host:pid` by default.
        policy: when tokens die.
        login_wait: how long to wait for another caller's login of the same user, in seconds; 60 by default.
    """

    login: Login
    keys: KeySource
    clock: Callable[[], datetime]
    actor: str
    policy: ExpiryPolicy
    login_wait: float


class TokenStorage(Backend):
    """Keeps one living Upstox token a user. Safe to share between threads; a context manager."""

    def __init__(self, **options: Unpack[Options]) -> None:
        if unknown := sorted(set(options) - Options.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__} does not know {', '.join(unknown)}.")
        self._login: Login = options.get("login") or SdkLogin()
        self._keys = options.get("keys") or KeyRing.default
        self._clock = options.get("clock") or functools.partial(datetime.now, UTC)
        self._named_actor = options.get("actor")
        self._policy = options.get("policy") or ExpiryPolicy()
        self._login_wait = options.get("login_wait", 60.0)
        require_positive("login_wait", self._login_wait)
        self._key_ring: KeyRing | None = None
        self._seen_user: str | None = None

    # What callers use

    def store_token(self, user_identifier: str | None = None) -> TokenResult:
        """Log in, whatever is stored, and keep the new token. The user's earlier token dies by that.

        Args:
            user_identifier: who is to be logged in; None for the login's own account.

        Returns:
            `token`, `user_id`, `user_name`, `email`, `token_id`, `created_at`, `expires_at`, `usage_count`.

        Raises:
            LoginError: no token was obtained, or it was another user's; nothing is stored.
            StoreUnavailable: the database takes no write; no login was spent.
            TokenNotStored: the database failed after the login; the error carries the token.
        """
        return self._log_in(check_user_id(user_identifier) or self._declared_user(), keep_living=False)

    def get_valid_token(self, user_id: str) -> TokenResult | None:
        """The user's living token, or None. Never logs in and needs no credentials.

        Raises:
            KeyUnavailable, TokenRefused: there is one, and it cannot be trusted or read.
        """
        now = self._now()
        found = self._find(require_user_id(user_id), now + self._policy.margin, now)
        return self._hand_out(found) if found else None

    def get_or_create_token(self, user_id: str | None = None) -> TokenResult:
        """The living token, else a new one. Of many callers at once one logs in and the others read its token.

        Args:
            user_id: whose; None for the login's own account.

        Raises:
            as `store_token` and `get_valid_token`.
        """
        user_id = check_user_id(user_id) or self._declared_user() or self._user_seen()
        return (user_id and self.get_valid_token(user_id)) or self._log_in(user_id, keep_living=True)

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
        return self._history(require_user_id(user_id), require_limit(limit), self._now())

    def get_user_statistics(self, user_id: str) -> dict[str, Any]:
        """`total_tokens`, `active_tokens`, `total_usage`, `avg_usage_per_token`, `last_generation`, `last_usage`.

        An unknown user has zeros, and None for the two times.
        """
        return self._statistics(require_user_id(user_id), self._now())

    def get_audit_trail(self, user_id: str, limit: int = 50) -> list[dict[str, Any]]:
        """What was done to the user's tokens, by whom and when, newest first. Needs no key.

        Each entry has `action`, `performed_at`, `actor`, `metadata`, `user_id`, `token_id`, `token_created`. The
        actions: login, login_failed, created, used, deactivated, revoked, expired.
        """
        return self._audit(require_user_id(user_id), require_limit(limit))

    def revoke_token(self, user_id: str) -> bool:
        """Forget the user's token: its ciphertext is erased and it is never handed out again.

        Upstox is not told: there the token lives until 03:30, the next login, or a logout.

        Returns:
            whether there was one.
        """
        revoked = self._revoke(require_user_id(user_id), self._now())
        logger.info("Revoked the token of %s" if revoked else "%s had no token to revoke", user_id)
        return revoked

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
        newest, rotated = self._ring.key_ids[0], 0
        refused: dict[str, StorageError] = {}
        while batch := self._under_other_keys(newest, BATCH):
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

    # The life cycle

    def _log_in(self, user_id: str | None, *, keep_living: bool) -> TokenResult:
        with self._lock(user_id or f"{ACCOUNT_LOCK}{getattr(self._login, 'account', None) or 'default'}"):
            if user_id is None and (known := self._declared_user() or (self._user_seen() if keep_living else None)):
                return self._log_in(known, keep_living=keep_living)
            now = self._now()
            if user_id and keep_living and (found := self._find(user_id, self._policy.worth_keeping(now), now)):
                return self._hand_out(found)
            _ = self._ring  # A missing key has to show before a login is spent ...
            generation = self._generation(user_id) if user_id else None
            self._record(user_id, "login", now)  # ... and so has a database that takes no write.
            minted = self._mint(user_id, now)
            with _not_lost(minted):
                if generation is not None:
                    return self._save(minted, generation + 1, now)
                # Nobody was named, so this was not under the user's lock: he may have been logged in meanwhile.
                with self._lock(minted.user_id):
                    newest = self._history(minted.user_id, 1, now)
                    if newest and newest[0]["created_at"] > now.isoformat():
                        raise LoginSuperseded(f"A newer login of {minted.user_id} is stored. Read its token.")
                    return self._save(minted, self._generation(minted.user_id) + 1, now)

    def _mint(self, user_id: str | None, now: datetime) -> _Minted:
        logger.info("Logging %s in", user_id or "the default account")
        try:
            minted = _wrap(self._login(user_id))
            if user_id and minted.user_id != user_id:
                raise LoginRefused(
                    f"The login was asked for {user_id} and logged {minted.user_id} in. Nothing was stored; check "
                    "which account these credentials belong to."
                )
            if self._policy.expires_at(minted.token, now) <= self._now():
                raise LoginInterrupted(
                    "The login gave a token that is dead already. Check this machine's clock, and try again."
                )
        except Exception as error:
            logger.info("The login of %s failed: %s", user_id or "the default account", type(error).__name__)
            try:
                self._record(user_id, "login_failed", self._now(), {"error": type(error).__name__})
            except StorageError as unrecorded:  # The login's error matters more than its audit entry.
                logger.warning("This is not in the audit trail: %s", unrecorded)
            raise
        return minted

    def _save(self, minted: _Minted, generation: int, now: datetime) -> TokenResult:
        token = StoredToken(
            user_id=minted.user_id,
            ciphertext="",
            key_id="",
            generation=generation,
            created_at=now,
            # By the clock from before the login: one that ran past 03:30 may have given a token of either day.
            expires_at=self._policy.expires_at(minted.token, now),
            account=getattr(self._login, "account", None),
            **minted.profile,
        )
        token = self._encrypt(minted.token, token)
        token.token_id = self._insert(token)
        self._seen_user = minted.user_id
        logger.info("Stored token %s of %s", token.token_id, token.user_id)
        return _result(minted.token, token)

    def _hand_out(self, found: StoredToken) -> TokenResult:
        return _result(self._decrypt(found), found)

    def _declared_user(self) -> str | None:
        """Whom the login logs in where nobody is named: it says so, or its account has logged in here before."""
        declared: str | None = getattr(self._login, "user_id", None)
        account: str | None = getattr(self._login, "account", None)
        return declared or (self._user_of_account(account) if account else None)

    def _user_seen(self) -> str | None:
        """Whom a login that tells no account logged in last; one that tells its account may have changed it since."""
        return None if getattr(self._login, "account", None) else self._seen_user

    def _encrypt(self, secret: Secret, token: StoredToken) -> StoredToken:
        binding = Binding(token.user_id, token.expires_at, token.generation, self._kind)
        ciphertext = self._ring.encrypt(secret, binding)
        return replace(token, ciphertext=ciphertext, key_id=self._ring.key_ids[0])

    def _decrypt(self, token: StoredToken, kind: str | None = None) -> Secret:
        """The token; `kind` is that of the store it comes from, where that is another one."""
        binding = Binding(token.user_id, token.expires_at, token.generation, kind or self._kind)
        try:
            return self._ring.decrypt(token.ciphertext, binding)
        except KeyUnavailable as error:
            # A program that runs for long learns here of a key that was added meanwhile.
            logger.info("Asking for the keys again: %s is not among them", error.key_id)
            self._key_ring = None
            return self._ring.decrypt(token.ciphertext, binding)

    @property
    def _ring(self) -> KeyRing:
        # Made when first needed: history, audit and cleanup work without any key.
        if (ring := self._key_ring) is None:
            ring = self._key_ring = self._keys() if callable(self._keys) else self._keys
        return ring

    def _now(self) -> datetime:
        """The present in UTC, in whole seconds, as all stores can keep it."""
        return require_aware(self._clock(), "What the clock gives").replace(microsecond=0)

    @property
    def _actor(self) -> str:
        return self._named_actor or f"{_user_and_host()}:{os.getpid()}"


class _Minted(NamedTuple):
    """What a login gave: the token wrapped, the rest as fields of `StoredToken`."""

    user_id: str
    token: Secret
    profile: dict[str, Any]


def _wrap(data: AccessTokenData) -> _Minted:
    from upstox_totp.models import AccessTokenData

    if not isinstance(data, AccessTokenData):
        kind = type(data).__name__
        del data  # A traceback that prints local variables must not show it.
        raise LoginRefused(f"The login returned {kind}, not the SDK's AccessTokenData (its response's .data).")
    if not data.access_token or not USER_ID.fullmatch(data.user_id):
        del data
        raise LoginInterrupted("The login returned no token or no usable user id. Try again.")
    return _Minted(
        data.user_id,
        Secret(data.access_token),
        {
            "user_name": data.user_name,
            "email": data.email,
            "broker": data.broker,
            "user_type": data.user_type,
            "products": data.products,
            "exchanges": data.exchanges,
            "metadata": {"is_active_user": data.is_active, "generation_method": "upstox_totp_sdk"},
        },
    )


@contextlib.contextmanager
def _not_lost(minted: _Minted) -> Iterator[None]:
    """Whatever fails in here, such as a name that this database cannot hold: the token lives, and must not be lost."""
    try:
        yield
    except LoginSuperseded:
        raise
    except Exception as error:
        reason = error if isinstance(error, StorageError) else StorageError(f"{type(error).__name__}.")
        raise TokenNotStored(minted.token, minted.user_id, reason) from error


def _result(secret: Secret, token: StoredToken) -> TokenResult:
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


@functools.cache
def _user_and_host() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may run under a user id that has no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
