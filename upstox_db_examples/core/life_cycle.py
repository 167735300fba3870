"""The life cycle that all five stores share: find -> lock -> find again -> log in -> save.

Each store supplies the database operations: see backend.py.

A login at Upstox kills the user's earlier token. From then on two things must hold, whatever happens: the new token is
in the store or in the raised error, and nobody gets the earlier one. So the stored token is marked before the login,
nobody trusts a marked token once its login is over, and a failed save is retried once.
"""

from __future__ import annotations

import logging
import uuid
from datetime import datetime, timedelta
from typing import NamedTuple

from .answer import Minted, read_answer
from .backend import Backend
from .errors import (
    LoginError,
    LoginInterrupted,
    LoginLimited,
    LoginRefused,
    LoginSuperseded,
    StorageError,
    TokenNotStored,
)
from .interrupts import PutOff
from .locks import ACCOUNT_LOCK
from .notes import Applicant, Notes, applicant_of
from .refusals import FIX_CODES
from .saving import Saving, result_of
from .settings import Settings
from .token import Secret, StoredToken, TokenResult
from .token_cipher import TokenCipher
from .users import Users, account_of, is_same_user, spellings

logger = logging.getLogger(__name__)

PROCESS = uuid.uuid4().hex  # goes into each login's audit entry; a forked child shares it and the pace


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


class LifeCycle:
    """The steps between a caller who wants a token and a database that may have one."""

    def __init__(self, backend: Backend, cipher: TokenCipher, users: Users, settings: Settings) -> None:
        self._backend, self._cipher, self._users = backend, cipher, users
        self._settings, self._policy, self._renew_pause = settings, settings.policy, settings.renew_pause
        self._now = settings.context.now
        self._saving = Saving(backend, cipher, users, settings)
        self._notes = Notes(backend, cipher)

    def read(self, user_id: str) -> TokenResult | None:
        """Return the user's working token, or None."""
        found = self.find(user_id)
        return self.hand_out(found) if found else None

    def find(self, user_id: str) -> StoredToken | None:
        """Return the user's working token, still encrypted, or None. This is a use; see `Backend.find`."""
        now = self._now()
        return self._users.find(user_id, now + self._policy.margin, now)

    def hand_out(self, found: StoredToken) -> TokenResult:
        """Decrypt this token for a caller."""
        return result_of(self._cipher.decrypt(found), found)

    def read_or_log_in(self, user_id: str | None) -> TokenResult:
        """Return the working token, or log in for a new one."""
        user_id = user_id or self._users.guess(last=True)
        return (user_id and self.read(user_id)) or self.log_in(user_id, Wish())

    def renew(self, user_id: str, refused: Secret) -> TokenResult:
        """Return a token other than the refused one."""
        known, newest = self._users.look_up(user_id)
        still_stored = newest is not None and self._cipher.is_of(newest, refused)
        return (None if still_stored else self.read(known)) or self.log_in(known, Wish(refused=refused))

    def adopt(self, minted: Minted) -> TokenResult:
        """Store a token that was made elsewhere, or return the one that Upstox issued later."""
        with self._backend.lock(minted.user_id.upper()):
            try:
                return self._saving.save(minted, None, self._now(), "adopted")
            except LoginSuperseded:
                if living := self.read(self._users.as_stored(minted.user_id)):
                    return living
                raise

    def seconds_since_other_logins(self, seconds: float) -> list[float]:
        """Return how many seconds ago other programs on this store began logins; see `Pace`."""
        now = self._now()
        begun = self._backend.logins_since(now - timedelta(seconds=seconds), PROCESS)
        return [(now - each).total_seconds() for each in begun]

    def refuse_a_guess(self, user_id: str, *, several: bool) -> None:
        """Refuse several users for one account's credentials. Each wrong guess would cost a login."""
        if not getattr(self._settings.login, "account", None):
            return
        known = self._users.guess(last=False)
        if known is None and several:
            raise LoginRefused(
                "The store's login does not say whose account it has. Set UPSTOX_USER_ID, or use Accounts."
            )
        if known is not None and not is_same_user(known, user_id):
            raise LoginRefused(f"The store's login can log in {known}, not {user_id}. Use Accounts for more users.")

    def log_in(self, user_id: str | None, wish: Wish) -> TokenResult:
        user_id = user_id or self._users.guess(last=not wish.deliberate)
        if user_id is None:
            account = account_of(self._settings.login, None)
            lock = f"{ACCOUNT_LOCK}{account or 'default'}"
            with self._backend.lock(lock):
                # Another caller may have logged in with this account since.
                user_id = self._users.guess(last=not wish.deliberate)
                if user_id is None:
                    return self._log_in_under_lock(None, lock, wish)
        # The lock name is in upper case, because two spellings of one user must share a lock.
        with self._backend.lock(user_id.upper()):
            return self._log_in_under_lock(user_id, user_id.upper(), wish)

    def _log_in_under_lock(self, asked: str | None, lock: str, wish: Wish) -> TokenResult:
        user_id, newest = self._users.look_up(asked) if asked else (None, None)
        if user_id and not wish.deliberate and not wish.replace and (living := self._living(user_id, newest, wish)):
            return living
        now = self._now()
        applicant = applicant_of(self._settings.login, user_id)
        try:
            refusal = self._refuse_before_a_request(user_id, wish, applicant)
            if wish.refused and newest and newest.ciphertext and newest.expires_at > now:
                self._refuse_to_renew_again(newest.user_id)
        except LoginError as error:
            error.login_began = False
            raise
        before = (newest.generation if newest else 0) if user_id else None
        with PutOff() as put_off:
            try:
                self._backend.begin_login(user_id, lock, now, {"process": PROCESS})
            except BaseException as error:
                if not isinstance(error, StorageError):  # Ctrl-C came before the login, so no mark may stay.
                    self._end_quietly(lock)
                raise
            logger.info("Logging %s in", user_id or "the default account")
            try:
                minted = read_answer(self._settings.login(asked))
                self._refuse_a_dead_one(minted, now)
            except BaseException as error:
                self._record_failure(error, user_id, lock, applicant, put_off)
                raise
            return self._keep(minted, user_id, before, lock, now, wish, refusal)

    def _living(self, user_id: str, newest: StoredToken | None, wish: Wish) -> TokenResult | None:
        """Return the user's token if no login is due. The caller holds the user's lock."""
        if wish.refused and newest and self._cipher.is_of(newest, wish.refused):
            return None
        now = self._now()
        alive_after = self._policy.worth_keeping(now)
        found = self._users.find(user_id, alive_after, now, locked=True)
        if found is None and self._clear_doubt_if_alive(user_id, alive_after):
            found = self._users.find(user_id, alive_after, now, locked=True)
        return self.hand_out(found) if found else None

    def _clear_doubt_if_alive(self, user_id: str, alive_after: datetime) -> bool:
        """Ask Upstox whether the token in doubt still works. If it does, a login would kill it for nothing."""
        token, owner_of = self._backend.find_in_doubt(user_id), getattr(self._settings.login, "owner_of", None)
        if token is None or owner_of is None or token.expires_at <= alive_after:
            return False
        try:
            owner = owner_of(self._cipher.decrypt(token))
        except LoginError as error:
            logger.info("Upstox could not confirm whether the token of %s still works: %s", user_id, error)
            return False
        if owner is None or not is_same_user(owner, user_id):
            return False
        self._backend.clear_doubt(token)
        logger.info("The token of %s still works, although a login ended without a known result", user_id)
        return True

    def _refuse_before_a_request(self, user_id: str | None, wish: Wish, applicant: Applicant) -> str | None:
        """Raise every refusal that needs no request to Upstox. A missing key shows up here as well.

        Returns:
            the name of the note about an earlier refusal that this login overrides.
        """
        if check := getattr(self._settings.login, "check", None):
            check(user_id)
        known = self._users.user_of_account(account_of(self._settings.login, user_id))
        if user_id and known and not is_same_user(known, user_id):
            raise LoginRefused(f"These credentials belong to {known}, not {user_id}. Use Accounts for more users.")
        self._cipher.ring_for_login(deliberate=wish.deliberate)
        return self._notes.look(applicant, deliberate=wish.deliberate)

    def _refuse_to_renew_again(self, user_id: str) -> None:
        left = self._renew_pause - self._notes.since_renewal(user_id)
        if left > 0:
            raise LoginLimited(
                f"The token of {user_id} was renewed less than {self._renew_pause:.0f} s ago and was refused again, so "
                "another login would not help. Find out why Upstox answers 401: an unregistered IP address "
                "is one cause. 'upstox-db login' and store_token() log in anyway.",
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

    def _record_failure(
        self, error: BaseException, user_id: str | None, lock: str, applicant: Applicant, put_off: PutOff
    ) -> None:
        """Record that a login gave no token, or that its outcome is unknown."""
        may_exist: bool = getattr(error, "token_may_exist", error is not put_off.raised_before_a_token)
        if isinstance(error, StorageError):
            may_exist = isinstance(error, LoginError) and error.token_may_exist
        logger.info("The login of %s failed: %s", user_id or "the default account", type(error).__name__)
        details = {"error": type(error).__name__} | ({"token_may_exist": True} if may_exist else {})
        try:
            self._backend.end_login(lock, in_doubt=may_exist)
            self._backend.record(user_id, "login_failed", self._now(), details)
            self._notes.failed(applicant, error, frozenset(FIX_CODES))
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
        as_asked = user_id is not None and is_same_user(user_id, minted.user_id)
        if user_id and as_asked:
            minted = minted._replace(user_id=user_id)
        interrupt: BaseException | None = None
        for last in (False, True):
            try:
                result = self._saving.save(minted, before if as_asked else None, now, "created")
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
        self._users.remember(minted.user_id, self._saving.account_that_made(minted))
        if not as_asked:  # Other users' tokens were marked, because nobody knew whose would be replaced.
            self._end_quietly(lock)
        try:
            if refusal:
                self._backend.erase_note(refusal)
            if wish.refused:
                self._notes.renewed(minted.user_id)
        except StorageError as error:
            logger.warning("The token of %s is stored, but the notes on its login are not: %s", minted.user_id, error)

    def _end_quietly(self, lock: str, doubted: str | None = None) -> None:
        """Remove this login's marks, except that of the `doubted` user, whose token stays in doubt."""
        try:
            for spelling in spellings(doubted) if doubted else ():
                self._backend.end_login(lock, in_doubt=True, user_id=spelling)
            self._backend.end_login(lock, in_doubt=False)
        except StorageError as error:  # The marks stay and the lock is released: in doubt too.
            logger.warning("Tokens stay in doubt until Upstox confirms them or the next login: %s", error)
