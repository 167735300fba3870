"""What a store owes to the life cycle in storage.py: what only its database can do.

A store never sees a token, only ciphertext, so that nothing the driver logs or the server writes can show one. It gets
and gives aware datetimes in whole seconds. A change of a token and its audit entry, whose action is in quotes here, are
one transaction. Whatever the driver raises comes out as a `StoreUnavailable` or a `ConfigurationError`, with the
driver's exception as its cause. In a forked child a store uses nothing that its parent has opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
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


class Backend(ABC):
    """One database, and one subclass for each."""

    _kind: ClassVar[str]
    """What a ciphertext is and where it lies, different for each store: one from another kind of store is refused."""

    @abstractmethod
    def close(self) -> None:
        """Close what this store opened. It can be called twice; to ask the database then raises `StoreUnavailable`."""

    @abstractmethod
    def _find(self, user_id: str, alive_after: datetime, now: datetime) -> StoredToken | None:
        """The user's active token if it expires later than `alive_after`; where this store counts uses, one more
        ("used")."""

    @abstractmethod
    def _insert(self, token: StoredToken) -> int | str:
        """The earlier token inactive and erased ("deactivated", with the reason new_token_generated), this one active
        ("created"), both at its `created_at`; its id.

        Raises:
            LoginSuperseded: the user already has a token of this generation.
        """

    @abstractmethod
    def _lock(self, name: str) -> AbstractContextManager[None]:
        """One holder at a time, in all processes that share this store; freed when its holder dies.

        A thread holds two at the most, of different names: user ids, and those above.

        Raises:
            StoreUnavailable: not had within `login_wait` seconds (`lock_not_had`).
        """

    @abstractmethod
    def _record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        """An audit entry that belongs to no token, durably written.

        A login follows on a "login", so that one has to fail where there would be no room for the token.
        """

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
