"""What a store owes to the life cycle in life_cycle.py: what only its database can do.

A store never sees a token, only ciphertext, so that nothing the driver logs or the server writes can show one. It gets
and gives aware datetimes in whole seconds. A change of a token and its audit entry, whose action is in quotes here, are
one transaction. Whatever the driver raises comes out as a `StoreUnavailable` or a `ConfigurationError`, with the
driver's exception as its cause. In a forked child a store uses nothing that its parent has opened.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any, ClassVar

from .errors import StoreUnavailable
from .token import AuditEntry, StoredToken

# Locks beside those of users, none of whom can have an id that begins with a hyphen.
SCHEMA_LOCK, NOBODY_LOCK, ENTRIES_LOCK, ACCOUNT_LOCK = "-schema", "-nobody", "-entries", "-account-"


def lock_not_had(name: str, wait: float) -> StoreUnavailable:
    """Somebody else held the lock of this name for all the `wait` seconds."""
    if name == SCHEMA_LOCK:
        holder = "another program to make the tables"
    elif name in (NOBODY_LOCK, ENTRIES_LOCK):
        holder = "another transfer"
    else:
        holder = f"another login of {'this account' if name.startswith(ACCOUNT_LOCK) else name}"
    return StoreUnavailable(f"Waited {wait:g} s for {holder}. Try again, or raise login_wait.")


class LocalLocks:
    """One thread of a process at a time, for each name: a crowd of threads would wait at the database all at once.

    By process, because a forked child may inherit a lock that a thread of its parent holds.
    """

    def __init__(self) -> None:
        self._locks: dict[tuple[int, str], threading.Lock] = {}

    @contextmanager
    def hold(self, name: str, wait: float) -> Iterator[None]:
        """Hold the lock of this name.

        Raises:
            StoreUnavailable: another thread held it for all the `wait` seconds.
        """
        lock = self._locks.setdefault((os.getpid(), name), threading.Lock())
        if not lock.acquire(timeout=wait):
            raise lock_not_had(name, wait)
        try:
            yield
        finally:
            lock.release()


class Backend(ABC):
    """One database, and one subclass for each."""

    _kind: ClassVar[str]
    """What a ciphertext is and where it lies, different for each store: one from another kind of store is refused."""

    @abstractmethod
    def close(self) -> None:
        """Close what this store opened. It can be called twice; to ask the database then raises `StoreUnavailable`."""

    # Tokens

    @abstractmethod
    def _find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        """The user's active token if it expires later than `alive_after`; where this store counts uses, one more
        ("used").

        A token that a login has marked (`_begin_login`) is found only while that login holds its lock; after that
        nobody knows whether it still lives. What is not found is not counted.

        Args:
            locked: the caller holds the user's lock, so a marked token is never found: its login is over.
        """

    @abstractmethod
    def _in_doubt(self, user_id: str) -> StoredToken | None:
        """The user's active token if it is marked. Not counted. The caller holds the user's lock."""

    @abstractmethod
    def _newest(self, user_id: str) -> StoredToken | None:
        """The user's token of the highest generation, without a ciphertext ("") if it has ended. Not counted."""

    @abstractmethod
    def _insert(self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None) -> int | str:
        """The earlier token inactive and erased ("deactivated", with the reason new_token_generated), this one active
        (`action`, with this metadata), both at its `created_at`; its id.

        It does not depend on the lock: a caller who has lost it writes all the same, by another connection if need be.
        The generation keeps two writers apart.

        Raises:
            LoginSuperseded: the user already has a token of this generation, or a later one is active. Only that: any
                other constraint is a `StoreUnavailable`.
        """

    @abstractmethod
    def _tokens_of_account(self, account: str) -> list[StoredToken]:
        """Active tokens whose rows name this account, the latest first, at most 100. Who wrote such a row is not known
        until its ciphertext is read."""

    # Logins

    @abstractmethod
    def _lock(self, name: str) -> AbstractContextManager[None]:
        """One holder at a time, in all processes that share this store; freed when its holder dies.

        A thread holds two at the most, of different names: user ids, and those above.

        Raises:
            StoreUnavailable: not had within `login_wait` seconds (`lock_not_had`).
        """

    @abstractmethod
    def _begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        """A login begins ("login", without a token), by a caller who holds the lock of this name.

        In the same transaction the user's active token is marked: from now on the login may replace it at Upstox. If
        no user is named, every active token is marked that has no mark yet. A mark that an earlier holder of the same
        lock has left stays for good: nothing but `_clear_doubt` or a new token takes it away.

        It has to fail where there would be no room for the new token.
        """

    @abstractmethod
    def _end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        """The login under this lock made no token for these users: take its marks away. `in_doubt`: it may have made
        one, and its marks stay for good.

        Args:
            user_id: only this user's token; None for all that this login has marked.
        """

    @abstractmethod
    def _clear_doubt(self, token: StoredToken) -> None:
        """Upstox has said that this token lives: take its mark away, if it still is the active one."""

    @abstractmethod
    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        """An audit entry that belongs to no token, durably written."""

    @abstractmethod
    def _logins_since(self, moment: datetime, process: str) -> list[datetime]:
        """When "login" entries later than `moment` were made whose metadata name another `process`; at most 100, the
        latest first."""

    # Notes: short encrypted texts, such as a refusal that all programs have to know of. See notes.py.

    @abstractmethod
    def _notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        """The database's own clock, in seconds since 1970, and those of these notes that there are."""

    @abstractmethod
    def _write_note(self, name: str, text: str) -> None:
        """Keep this text under this name, in place of an earlier one."""

    @abstractmethod
    def _erase_note(self, name: str) -> None:
        """Erase the note of this name, if there is one."""

    # History and upkeep

    @abstractmethod
    def _revoke(self, user_id: str, now: datetime) -> bool:
        """The user's active token erased ("revoked"); whether there was one."""

    @abstractmethod
    def _expire(self, now: datetime, limit: int) -> int:
        """At most `limit` tokens erased that expire at `now` or before ("expired"); how many, and 0 only when there
        are none left."""

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
        """What `get_storage_status` gives, but for the time. It never raises."""

    # What transfer.py needs.

    @abstractmethod
    def _users(self) -> list[str | None]:
        """All who have tokens or audit entries; None for entries that belong to nobody."""

    @abstractmethod
    def _tokens_of(self, user_id: str | None) -> list[StoredToken]:
        """All tokens of a user, oldest first, with all that is known of them, but for `token_id` and `source`, which
        mean nothing elsewhere. One that has ended has an empty ciphertext. Nobody (None) has none."""

    @abstractmethod
    def _entries_of(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        """The user's audit entries that follow `after`, at most `limit`: there may be more than memory can hold.

        The oldest first, and of one second in the order in which they were written.
        """

    @abstractmethod
    def _put_in(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        """These tokens, oldest first, and entries, without locking readers out.

        A token that is there already may have been used or revoked since it was looked at. So its uses only grow, it
        can end and not come back, and its ciphertext stays as it is. An entry of a generation that is not there belongs
        to no token.
        """
