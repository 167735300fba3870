"""The life cycle that all five stores share: find -> lock -> find again -> log in -> save.

Each store supplies the database operations: see backend.py.

A login at Upstox kills the user's earlier token. From then on two things must hold, whatever happens: the new token is
in the store or in the raised error, and nobody gets the earlier one. So the stored token is marked before the login,
nobody trusts a marked token once its login is over, and a failed save is retried once.
"""

from __future__ import annotations

import functools
import getpass
import hmac
import logging
import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypedDict, Unpack

from .answer import Minted, read_answer
from .backend import ACCOUNT_LOCK, Backend
from .checks import require_aware, require_positive
from .cipher import READABLE, VERSION, Binding, KeyRing, KeySource
from .errors import (
    KeyUnavailable,
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    LoginSuperseded,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
    TokenRefused,
)
from .interrupts import PutOff
from .login import FIX_CODES, Login, SdkLogin
from .notes import Applicant, Notes
from .token import ExpiryPolicy, Secret, StoredToken, TokenResult, issued_at, subject

logger = logging.getLogger(__name__)

PROCESS = uuid.uuid4().hex  # goes into each login's audit entry; a forked child shares it and the pace


class Options(TypedDict, total=False):
    """The keyword arguments that every store takes.

    Attributes:
        login: the login; `SdkLogin()` by default. It is called only when a login is due.
        keys: a `KeyRing`, or a callable that returns one (from a vault or a KMS); `KeyRing.default()` by default.
        clock: returns the current time as an aware datetime; tests and notebooks set it.
        actor: the name in the audit trail; `user@host:pid` by default.
        policy: decides when tokens expire.
        login_wait: how long to wait for another caller's login of the same user, in seconds; 60 by default.
        renew_pause: how long `renew_token` waits before it logs the same user in again, in seconds; 600 by default.
    """

    login: Login
    keys: KeySource
    clock: Callable[[], datetime]
    actor: str
    policy: ExpiryPolicy
    login_wait: float
    renew_pause: float


class Wish(NamedTuple):
    """The kind of login that a caller wants.

    Attributes:
        deliberate: a person asked for the login, whatever is stored and whatever Upstox refused before.
        replace: log in even if a working token is stored.
        refused: the token that Upstox has refused; a login is due only while that token is stored.
    """

    deliberate: bool = False
    replace: bool = False
    refused: Secret | None = None


class LifeCycle(Backend):
    """The steps between a caller who wants a token and a database that may have one."""

    def __init__(self, **options: Unpack[Options]) -> None:
        if unknown := sorted(set(options) - Options.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__} does not take {', '.join(unknown)}.")
        self._login: Login = options.get("login") or SdkLogin()
        self._keys = options.get("keys") or KeyRing.default
        self._clock = options.get("clock") or functools.partial(datetime.now, UTC)
        self._named_actor = options.get("actor")
        self._policy = options.get("policy") or ExpiryPolicy()
        self._login_wait = options.get("login_wait", 60.0)
        require_positive("login_wait", self._login_wait)
        self._renew_pause = options.get("renew_pause", 600.0)
        require_positive("renew_pause", self._renew_pause)
        self._key_ring: KeyRing | None = None
        self._seen_user: str | None = None
        self._user_of: dict[str, str] = {}  # an account always belongs to the same user

    def _log_in(self, user_id: str | None, wish: Wish) -> TokenResult:
        user_id = user_id or self._known_user(guess=not wish.deliberate)
        if user_id is None:
            account = _account_of(self._login, None)
            lock = f"{ACCOUNT_LOCK}{account or 'default'}"
            with self._lock(lock):
                # Another caller may have logged in with this account since.
                user_id = self._known_user(guess=not wish.deliberate)
                if user_id is None:
                    return self._log_in_locked(None, lock, wish)
        # The lock name is in upper case, because two spellings of one user must share a lock.
        with self._lock(user_id.upper()):
            return self._log_in_locked(user_id, user_id.upper(), wish)

    def _log_in_locked(self, asked: str | None, lock: str, wish: Wish) -> TokenResult:
        user_id, newest = self._look_up(asked) if asked else (None, None)
        if user_id and not wish.deliberate and not wish.replace and (living := self._living(user_id, newest, wish)):
            return living
        now = self._now()
        applicant = self._applicant(user_id)
        refusal = self._refuse_before_a_request(user_id, wish, applicant)
        if wish.refused and newest and newest.ciphertext and newest.expires_at > now:
            self._refuse_to_renew_again(newest.user_id)
        before = (newest.generation if newest else 0) if user_id else None
        with PutOff() as put_off:
            try:
                self._begin_login(user_id, lock, now, {"process": PROCESS})
            except BaseException as error:
                if not isinstance(error, StorageError):  # Ctrl-C came before the login, so no mark may stay.
                    self._end_quietly(lock)
                raise
            logger.info("Logging %s in", user_id or "the default account")
            try:
                minted = read_answer(self._login(asked))
                self._refuse_a_dead_one(minted, now)
            except BaseException as error:
                self._failed(error, user_id, lock, applicant, put_off)
                raise
            return self._keep(minted, user_id, before, lock, now, wish, refusal)

    def _living(self, user_id: str, newest: StoredToken | None, wish: Wish) -> TokenResult | None:
        """Return the user's token if no login is due. The caller holds the user's lock."""
        if wish.refused and newest and self._holds(newest, wish.refused):
            return None
        now = self._now()
        alive_after = self._policy.worth_keeping(now)
        found = self._find_as_written(user_id, alive_after, now, locked=True)
        if found is None and self._doubt_is_cleared(user_id, alive_after):
            found = self._find_as_written(user_id, alive_after, now, locked=True)
        return self._hand_out(found) if found else None

    def _doubt_is_cleared(self, user_id: str, alive_after: datetime) -> bool:
        """Ask Upstox whether the token in doubt still works. If it does, a login would kill it for nothing."""
        token, owner_of = self._in_doubt(user_id), getattr(self._login, "owner_of", None)
        if token is None or owner_of is None or token.expires_at <= alive_after:
            return False
        try:
            owner = owner_of(self._decrypt(token))
        except LoginError as error:
            logger.info("Upstox could not confirm whether the token of %s still works: %s", user_id, error)
            return False
        if owner is None or not same_user(owner, user_id):
            return False
        self._clear_doubt(token)
        logger.info("The token of %s still works, although a login ended without a known result", user_id)
        return True

    def _refuse_before_a_request(self, user_id: str | None, wish: Wish, applicant: Applicant) -> str | None:
        """Raise every refusal that needs no request to Upstox. A missing key shows up here as well.

        Returns:
            the name of the note about an earlier refusal that this login overrides.
        """
        if check := getattr(self._login, "check", None):
            check(user_id)
        known = self._user_of_account(_account_of(self._login, user_id))
        if user_id and known and not same_user(known, user_id):
            raise LoginRefused(f"These credentials belong to {known}, not {user_id}. Use Accounts for more users.")
        _ = self._ring
        return self._login_notes.look(applicant, deliberate=wish.deliberate)

    def _refuse_to_renew_again(self, user_id: str) -> None:
        left = self._renew_pause - self._login_notes.since_renewal(user_id)
        if left > 0:
            raise LoginLimited(
                f"The token of {user_id} was renewed less than {self._renew_pause:.0f} s ago and was refused again, so "
                "another login would not help. Find out why Upstox answers 401: an unregistered IP address "
                "is one cause. store_token() logs in anyway.",
                retry_after=left,
                account_only=True,
            )

    def _refuse_a_dead_one(self, minted: Minted, now: datetime) -> None:
        if self._policy.expires_at(minted.token, now) <= self._now():
            error = LoginInterrupted(
                "By this machine's clock, the new token has already expired. Check that clock first. The "
                "token is in this error: error.token.reveal()."
            )
            error.token, error.user_id = minted.token, minted.user_id
            raise error

    def _failed(
        self, error: BaseException, user_id: str | None, lock: str, applicant: Applicant, put_off: PutOff
    ) -> None:
        """Record that a login gave no token, or that its outcome is unknown."""
        may_exist: bool = getattr(error, "token_may_exist", error is not put_off.raised_before_a_token)
        if isinstance(error, StorageError):
            may_exist = isinstance(error, LoginError) and error.token_may_exist
        logger.info("The login of %s failed: %s", user_id or "the default account", type(error).__name__)
        details = {"error": type(error).__name__} | ({"token_may_exist": True} if may_exist else {})
        try:
            self._end_login(lock, in_doubt=may_exist)
            self._record(user_id, "login_failed", self._now(), details)
            self._login_notes.failed(applicant, error, frozenset(FIX_CODES))
        except StorageError as unrecorded:  # The login's own error matters more.
            logger.warning("This failure could not be recorded in the store: %s", unrecorded)

    def _keep(
        self,
        minted: Minted,
        user_id: str | None,
        before: int | None,
        lock: str,
        now: datetime,
        wish: Wish,
        refusal: str | None,
    ) -> TokenResult:
        """Store the new token, whatever happens: nobody else has it, and the earlier one is dead."""
        as_asked = user_id is not None and same_user(user_id, minted.user_id)
        if user_id and as_asked:
            minted = minted._replace(user_id=user_id)
        interrupt: BaseException | None = None
        for last in (False, True):
            try:
                result = self._save(minted, before if as_asked else None, now, "created")
                break
            except LoginSuperseded:
                if not as_asked:
                    self._end_quietly(lock)
                raise
            except BaseException as error:
                # Try once more: perhaps only the lock's connection failed, or Ctrl-C interrupted the first attempt.
                if last:
                    if not as_asked:  # Otherwise the mark says enough: the login ends now.
                        self._end_quietly(lock, doubted=minted.user_id)
                    reason = error if isinstance(error, StorageError) else StorageError(f"{type(error).__name__}.")
                    raise TokenNotStored(minted.token, minted.user_id, reason) from (interrupt or error)
                if not isinstance(error, Exception):
                    interrupt = error
        minted = minted._replace(user_id=result["user_id"])
        self._tidy_up(minted, as_asked, lock, wish, refusal)
        if interrupt is not None:
            raise interrupt
        if user_id and not as_asked:
            raise LoginRefused(
                f"The login was for {user_id} but logged {minted.user_id} in, so the token is stored under "
                "that name. Check which account these credentials belong to."
            )
        return result

    def _tidy_up(self, minted: Minted, as_asked: bool, lock: str, wish: Wish, refusal: str | None) -> None:
        """Do what remains once the token is stored. A failure here must not hide the token."""
        if account := self._account_that_made(minted):
            self._user_of[account] = minted.user_id
        self._seen_user = minted.user_id
        if not as_asked:  # Other users' tokens were marked, because nobody knew whose would be replaced.
            self._end_quietly(lock)
        try:
            if refusal:
                self._erase_note(refusal)
            if wish.refused:
                self._login_notes.renewed(minted.user_id)
        except StorageError as error:
            logger.warning("The token of %s is stored, but the notes on its login are not: %s", minted.user_id, error)

    def _account_that_made(self, minted: Minted) -> str | None:
        """Return the account to bind to this token, or None if the token names a different user than the answer.

        Such an answer would bind the account to a user that it cannot log in.
        """
        whose = subject(minted.token)
        return None if whose and not same_user(whose, minted.user_id) else _account_of(self._login, minted.user_id)

    def _end_quietly(self, lock: str, doubted: str | None = None) -> None:
        """Remove this login's marks, except that of the `doubted` user, whose token stays in doubt."""
        try:
            for spelling in spellings(doubted) if doubted else ():
                self._end_login(lock, in_doubt=True, user_id=spelling)
            self._end_login(lock, in_doubt=False)
        except StorageError as error:  # The marks stay and the lock is released: in doubt too.
            logger.warning("Tokens stay in doubt until Upstox confirms them or the next login: %s", error)

    def _save(self, minted: Minted, before: int | None, now: datetime, action: str) -> TokenResult:
        """Store this token, unless the store has one that was issued later.

        Args:
            before: the user's latest generation when the login began under the user's lock; None if unknown.
        """
        issued = issued_at(minted.token)
        if before is None:
            minted = minted._replace(user_id=self._as_stored(minted.user_id))
        latest, looked = before, before is not None  # The lock usually keeps other writers out.
        for _ in range(5):
            if not looked:
                newest = self._newest(minted.user_id)
                if newest is not None and newest.generation != before:
                    if self._holds(newest, minted.token):
                        return result_of(minted.token, newest)
                    if not self._is_later(minted, newest, before, action):
                        raise _superseded(minted)
                latest = newest.generation if newest else 0
            looked = False
            token = self._encrypt(
                minted.token,
                StoredToken(
                    user_id=minted.user_id,
                    ciphertext="",
                    key_id="",
                    generation=(latest or 0) + 1,
                    created_at=now,
                    expires_at=self._policy.expires_at(minted.token, now),
                    account=self._account_that_made(minted) if action == "created" else None,
                    issued_at=issued,
                    **minted.profile,
                ),
            )
            try:
                token.token_id = self._insert(token, action, minted.odd_fields)
            except LoginSuperseded:
                continue  # Another writer was faster. Compare the two tokens again.
            logger.info("Stored token %s of %s", token.token_id, token.user_id)
            return result_of(minted.token, token)
        raise StoreUnavailable(f"Other programs keep storing tokens of {minted.user_id}. Try again.")

    def _is_later(self, minted: Minted, newest: StoredToken, before: int | None, action: str) -> bool:
        """Return whether Upstox issued this token after the newest stored one. This machine's clock does not matter."""
        mine, other = issued_at(minted.token), newest.issued_at
        if newest.ciphertext:  # Nobody can forge a ciphertext, and rows of earlier versions have no other time.
            try:
                other = issued_at(self._decrypt(newest))
            except (KeyUnavailable, TokenRefused) as error:
                logger.info("The stored token of %s cannot be compared with the new one: %s", minted.user_id, error)
        elif other and other > self._now() + timedelta(days=1):
            other = None  # Only a forger writes such a time, and it would keep every later token out.
        if mine is None or other is None:
            return before is None  # A login that lost its lock is the older one; all others are newer.
        if mine == other and newest.in_doubt:
            return True  # A login began after that token was stored.
        owner_of = getattr(self._login, "owner_of", None)
        if mine != other or owner_of is None or action == "adopted":
            return mine > other
        try:  # For two logins within one second, only Upstox knows which came later.
            return owner_of(minted.token) is not None
        except LoginError:
            return False

    # Users and accounts

    def _known_user(self, *, guess: bool) -> str | None:
        """Return the user for a caller who names none: the login knows it, or a token made by its account does.

        Args:
            guess: if the login tells no account, take the user it logged in last. A login that tells its account may
                have changed it since, and a deliberate login is not bound by the past.
        """
        declared: str | None = getattr(self._login, "user_id", None)
        account = _account_of(self._login, None)
        return declared or self._user_of_account(account) or (self._seen_user if guess and not account else None)

    def _user_of_account(self, account: str | None) -> str | None:
        """Return the user of this account, from a token that decrypts as the account's.

        Anyone who can write to the database can insert a row that names the account, and a program would then trade
        with somebody else's token. So such a row is skipped, and so is one from an earlier version, which binds no
        account.
        """
        if account is None or account in self._user_of:
            return self._user_of.get(account or "")
        for token in self._tokens_of_account(account):
            try:
                if token.account == account and not token.ciphertext.startswith("v1."):
                    self._decrypt(token)
                    self._user_of[account] = token.user_id
                    return token.user_id
            except (TokenRefused, KeyUnavailable):
                logger.warning("A row of %s names this account but is not its own, so it is skipped", token.user_id)
        return None

    def _look_up(self, user_id: str) -> tuple[str, StoredToken | None]:
        """Return the spelling under which the store keeps this user, and the latest token.

        A new user gets upper case, as Upstox writes ids. Two spellings would make two rows for one user, and the token
        in one of them would be dead.
        """
        for spelling in spellings(user_id):
            if newest := self._newest(spelling):
                return spelling, newest
        return user_id.upper(), None

    def _as_stored(self, user_id: str) -> str:
        return self._look_up(user_id)[0]

    def _find_as_written(
        self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False
    ) -> StoredToken | None:
        found = self._find(user_id, alive_after, now, locked=locked)
        if found is None and user_id != user_id.upper():
            found = self._find(user_id.upper(), alive_after, now, locked=locked)
        return found

    @property
    def _login_notes(self) -> Notes:
        # Each call makes new Notes. A kept one would refer back to the store, and an unused store would then stay open
        # until the garbage collector runs.
        return Notes(self, lambda: self._ring, self._kind)

    def _applicant(self, user_id: str | None) -> Applicant:
        account = _account_of(self._login, user_id)
        return Applicant(
            f"account {account}" if account else f"user {(user_id or '').upper()}",
            tells(user_id) if (tells := getattr(self._login, "credentials_digest", None)) else None,
        )

    def _holds(self, stored: StoredToken, token: Secret) -> bool:
        """Return whether this is the stored token. The comparison takes constant time."""
        if not stored.ciphertext:
            return False
        try:
            kept = self._decrypt(stored).reveal().encode()
        except (KeyUnavailable, TokenRefused):
            return False
        return hmac.compare_digest(kept, token.reveal().encode())

    def _hand_out(self, found: StoredToken) -> TokenResult:
        return result_of(self._decrypt(found), found)

    def _other_logins(self, seconds: float) -> list[float]:
        """Return how many seconds ago other programs on this store began logins; see `Pace`."""
        now = self._now()
        return [
            (now - begun).total_seconds() for begun in self._logins_since(now - timedelta(seconds=seconds), PROCESS)
        ]

    def _encrypt(self, secret: Secret, token: StoredToken) -> StoredToken:
        """Return the token with the secret encrypted. A token with an older ciphertext version keeps that version."""
        earlier = token.ciphertext.partition(".")[0]
        version = earlier if earlier in READABLE else VERSION
        binding = Binding(token.user_id, token.expires_at, token.generation, self._kind, token.account)
        ciphertext = self._ring.encrypt(secret, binding, version)
        return replace(token, ciphertext=ciphertext, key_id=self._ring.key_ids[0])

    def _decrypt(self, token: StoredToken, kind: str | None = None) -> Secret:
        """Decrypt the token. `kind` is the kind of the store it comes from, if that is another store."""
        binding = Binding(token.user_id, token.expires_at, token.generation, kind or self._kind, token.account)
        try:
            return self._ring.decrypt(token.ciphertext, binding)
        except KeyUnavailable as error:
            # A long-running program picks up a newly added key here.
            logger.info("Key %s is not in the key ring. Loading the keys again", error.key_id)
            self._key_ring = None
            return self._ring.decrypt(token.ciphertext, binding)

    @property
    def _ring(self) -> KeyRing:
        # The key ring is loaded on first use, because history, audit and cleanup need no key.
        if (ring := self._key_ring) is None:
            ring = self._key_ring = self._keys() if callable(self._keys) else self._keys
        return ring

    def _now(self) -> datetime:
        """Return the current time in UTC and in whole seconds, which every store can keep."""
        return require_aware(self._clock(), "The result of clock").replace(microsecond=0)

    @property
    def _actor(self) -> str:
        return self._named_actor or f"{_user_and_host()}:{os.getpid()}"


def _superseded(minted: Minted) -> LoginSuperseded:
    error = LoginSuperseded(
        f"The store has a token of {minted.user_id} that was issued later. Read it with get_valid_token()."
    )
    error.token, error.user_id = minted.token, minted.user_id
    return error


def _account_of(login: Login, user_id: str | None) -> str | None:
    """Return the login's name for the credentials of this user, if it has one."""
    tells = getattr(login, "account_of", None)
    account: str | None = tells(user_id) if tells else getattr(login, "account", None)
    return account


def spellings(user_id: str) -> list[str]:
    """Return the spellings a store may hold of this id: an earlier version kept the spelling of the login's answer."""
    return list(dict.fromkeys((user_id, user_id.upper(), user_id.lower())))


def same_user(one: str, other: str) -> bool:
    return one.upper() == other.upper()


def result_of(secret: Secret, token: StoredToken) -> TokenResult:
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
    except (OSError, KeyError):  # A container may run as a user id without a name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
