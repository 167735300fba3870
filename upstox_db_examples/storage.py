"""The life cycle that all five stores share: find -> lock -> find again -> log in -> save.

A store supplies what only its database can do: the methods with a leading underscore at the end of `TokenStorage`.
It never sees a token, only ciphertext, so that nothing the driver logs or the server writes can show one.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import logging
import math
import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypedDict, Unpack

from .batch import PACE, BatchResult, Pace, store_batch
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
from .token import AuditEntry, ExpiryPolicy, Secret, StoredToken, TokenResult

if TYPE_CHECKING:
    from upstox_totp.models import AccessTokenData

logger = logging.getLogger(__name__)

USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,49}")
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


class TokenStorage(ABC):
    """Keeps one living Upstox token a user. Safe to share between threads; a context manager."""

    _kind: ClassVar[str]
    """What a ciphertext is and where it lies: one that is copied from another kind of store is refused."""

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
        return self._log_in(_check_user_id(user_identifier) or self._declared_user(), keep_living=False)

    def get_valid_token(self, user_id: str) -> TokenResult | None:
        """The user's living token, or None. Never logs in and needs no credentials.

        Raises:
            KeyUnavailable, TokenRefused: there is one, and it cannot be trusted or read.
        """
        now = self._now()
        found = self._find(_require_user_id(user_id), now + self._policy.margin, now)
        return self._hand_out(found) if found else None

    def get_or_create_token(self, user_id: str | None = None) -> TokenResult:
        """The living token, else a new one. Of many callers at once one logs in and the others read its token.

        Args:
            user_id: whose; None for the login's own account.

        Raises:
            as `store_token` and `get_valid_token`.
        """
        user_id = _check_user_id(user_id) or self._declared_user() or self._user_seen()
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
        return self._history(_require_user_id(user_id), _require_limit(limit), self._now())

    def get_user_statistics(self, user_id: str) -> dict[str, Any]:
        """`total_tokens`, `active_tokens`, `total_usage`, `avg_usage_per_token`, `last_generation`, `last_usage`.

        An unknown user has zeros, and None for the two times.
        """
        return self._statistics(_require_user_id(user_id), self._now())

    def get_audit_trail(self, user_id: str, limit: int = 50) -> list[dict[str, Any]]:
        """What was done to the user's tokens, by whom and when, newest first. Needs no key.

        Each entry has `action`, `performed_at`, `actor`, `metadata`, `user_id`, `token_id`, `token_created`. The
        actions: login, login_failed, created, used, deactivated, revoked, expired.
        """
        return self._audit(_require_user_id(user_id), _require_limit(limit))

    def revoke_token(self, user_id: str) -> bool:
        """Forget the user's token: its ciphertext is erased and it is never handed out again.

        Upstox is not told: there the token lives until 03:30, the next login, or a logout.

        Returns:
            whether there was one.
        """
        revoked = self._revoke(_require_user_id(user_id), self._now())
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

    @abstractmethod
    def close(self) -> None:
        """Close what this store opened. It can be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The life cycle

    def _log_in(self, user_id: str | None, *, keep_living: bool) -> TokenResult:
        with self._lock(user_id or f"account-{getattr(self._login, 'account', None) or 'default'}"):
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
            logger.warning("The login of %s failed: %s", user_id or "the default account", type(error).__name__)
            with contextlib.suppress(StorageError):  # The login's error matters more than its audit entry.
                self._record(user_id, "login_failed", self._now(), {"error": type(error).__name__})
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
        except KeyUnavailable:
            # A program that runs for long learns here of a key that was added meanwhile.
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

    # What each database does in its own way. Times are aware; a StorageError says what went wrong. A change of a token
    # and its audit entry, whose action is in quotes here, are one transaction.

    @abstractmethod
    def _find(self, user_id: str, alive_after: datetime, now: datetime) -> StoredToken | None:
        """The user's active token if it dies after `alive_after`; where this store counts uses, one more ("used")."""

    @abstractmethod
    def _insert(self, token: StoredToken) -> int | str:
        """The earlier token inactive and erased ("deactivated"), this one active ("created"); its id.

        Raises:
            LoginSuperseded: the user already has a token of this generation.
        """

    @abstractmethod
    def _lock(self, name: str) -> AbstractContextManager[None]:
        """One holder at a time, in all processes that share this store; freed when its holder dies."""

    @abstractmethod
    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        """An audit entry that belongs to no token, durably written."""

    @abstractmethod
    def _generation(self, user_id: str) -> int:
        """The user's latest generation, 0 if there is none."""

    @abstractmethod
    def _user_of_account(self, account: str) -> str | None:
        """Whom these credentials logged in last."""

    @abstractmethod
    def _revoke(self, user_id: str, now: datetime) -> bool:
        """The user's active token erased ("revoked"); whether there was one."""

    @abstractmethod
    def _expire(self, now: datetime, limit: int) -> int:
        """At most `limit` dead tokens erased ("expired"); how many, and 0 only when there are none left."""

    @abstractmethod
    def _forget_entries(self, before: datetime, limit: int) -> int:
        """At most `limit` audit entries from before this moment deleted; how many, and 0 only when none are left."""

    @abstractmethod
    def _history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        """What `get_token_history` gives."""

    @abstractmethod
    def _statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        """What `get_user_statistics` gives."""

    @abstractmethod
    def _audit(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        """What `get_audit_trail` gives."""

    @abstractmethod
    def _under_other_keys(self, key_id: str, limit: int) -> list[StoredToken]:
        """At most `limit` active tokens, dead ones too, that a key other than this encrypts."""

    @abstractmethod
    def _replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        """Each only where the old ciphertext still stands; how many were replaced. Not audited."""

    @abstractmethod
    def _count_keys(self) -> dict[str, int]:
        """How many active tokens, dead ones too, each key encrypts."""

    @abstractmethod
    def _health(self) -> dict[str, Any]:
        """What `get_storage_status` gives, but for the time."""

    # What transfer.py needs.

    @abstractmethod
    def _users(self) -> list[str | None]:
        """All who have tokens or audit entries; None for entries that belong to nobody."""

    @abstractmethod
    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        """All tokens of a user, oldest first, with all that is known of them. One that has ended has no ciphertext."""

    @abstractmethod
    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        """The user's audit entries that follow `after`, oldest first: there may be more than memory can hold."""

    @abstractmethod
    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        """These tokens and entries, without locking readers out.

        A token that is there already may have been used or revoked since it was looked at. So its uses only grow, it
        can end and not come back, and its ciphertext stays as it is.
        """


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


def _check_user_id(user_id: object) -> str | None:
    return None if user_id is None else _require_user_id(user_id)


def _require_user_id(user_id: object) -> str:
    if not isinstance(user_id, str) or not USER_ID.fullmatch(user_id):
        raise InvalidInput(
            "A user id is text of 1 to 50 characters: letters and digits, and after the first one also . _ @ and -."
        )
    return user_id


def _require_limit(limit: object) -> int:
    if type(limit) is not int or not 1 <= limit < 2**31:
        raise InvalidInput("limit must be a whole number from 1 up.")
    return limit


def require_aware(moment: datetime, name: str) -> datetime:
    """The same moment in UTC.

    Raises:
        InvalidInput: it has no time zone. Guessing one would be 5.5 hours off in India.
    """
    if isinstance(moment, datetime) and moment.tzinfo is UTC:
        return moment
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidInput(f"{name} must be a datetime with a time zone, such as datetime.now(UTC).")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput(f"{name} lies outside the years 1 to 9999 in UTC.") from error


def require_positive(name: str, number: float) -> None:
    """
    Raises:
        InvalidInput: it is none, such as a time without end, for which somebody would wait.
    """
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise InvalidInput(f"{name} must be a positive number.")


def require_pool_size(number: int) -> None:
    """
    Raises:
        InvalidInput: it is no size of a pool.
    """
    if type(number) is not int or number < 1:
        raise InvalidInput("pool_size must be a whole number from 1 up.")


@functools.cache
def _user_and_host() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may run under a user id that has no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
