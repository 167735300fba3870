"""The interface between the life cycle (life_cycle.py) and a database: each kind of database implements it.

A backend never sees a token, only ciphertext, so nothing that the driver logs or the server writes can show one. It
takes and returns aware datetimes in whole seconds. It writes a token change and the audit entry for it (the action in
quotes below) in one transaction. It turns every driver error into a `StoreUnavailable` or a `ConfigurationError`, with
the driver's exception as the cause. In a forked child it uses nothing that the parent opened.

The words of this file:

- Generation: 1 for a user's first token, and one more for each later one. Of two writers with the same generation, the
  second one fails.
- Lock: one holder at a time among all programs on the database, and free as soon as its holder dies. A login holds the
  lock of its user. A login without a user id holds the lock of its account.
- Mark: a login kills the user's earlier token at Upstox, so the token is marked before the login begins. While that
  login holds its lock, the token is still handed out, because it works until the very end of the login. If the lock is
  free and the mark is still there, nobody knows how the login ended: the token is in doubt, and is not handed out until
  Upstox says that it works. A login that ends in a known way removes its marks. A mark names one login and not only its
  lock: the next holder of that lock is not the login that left the mark.
- Login without a user id: nobody knows which token it will replace, so it marks all of them, and leaves a note with its
  mark. As long as it runs, every token that others store gets its mark, too.

One thread calls `begin_login`, `insert` and `end_login` of one login.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, ClassVar

from .context import Context
from .listener import Listener, Polling, TokenState
from .token import AuditEntry, StoredToken

USERS_AT_ONCE = 1000  # in one answer of the database


# The name of the note that a login without a user id leaves while it runs begins like this. The note is its mark.
RUNNING = "running "


class HarmlessLogins(threading.local):
    """The logins without a user id that cannot replace the token of this thread's login, by their marks.

    These are the thread's own login, and those that were over before it began.
    """

    marks: frozenset[str] = frozenset()


class Backend(ABC):
    """The operations on one kind of database. Each database has its own subclass.

    Args:
        context: the clock, the name in the audit trail, and how long to wait for a lock.

    Attributes:
        where: where the data is, without any password, for messages.
    """

    store_kind: ClassVar[str]
    """Each kind of store has its own, and a ciphertext is bound to it, so a ciphertext from another kind is refused.
    Stored ciphertexts depend on this text: never change it."""

    def __init__(self, context: Context, where: str) -> None:
        self.context, self.where = context, where

    @abstractmethod
    def has_tables(self) -> bool:
        """Return whether the tables exist, in this version or an earlier one."""

    @abstractmethod
    def init_database(self, runtime_role: str | None = None) -> None:
        """Make the tables, or upgrade those of an older version. Safe to repeat and to run concurrently.

        Args:
            runtime_role: a role to grant the least rights that storing and reading need.

        Raises:
            ConfigurationError: this role may not change the tables, or another program made them.
        """

    @abstractmethod
    def close(self) -> None:
        """Close what this store opened. A second call is harmless; later database calls raise `StoreUnavailable`."""

    # Tokens

    @abstractmethod
    def find(self, user_id: str, alive_after: datetime, now: datetime, *, locked: bool = False) -> StoredToken | None:
        """Return the user's active token if it expires later than `alive_after`. A store that counts uses adds one
        ("used").

        A token that a login has marked (`begin_login`) is returned only while that login holds its lock; after that
        nobody knows whether the token still works. A use is counted only when a token is returned.

        Args:
            locked: the caller holds the user's lock, so the login that left a mark is over. A marked token is never
                returned.
        """

    @abstractmethod
    def find_in_doubt(self, user_id: str) -> StoredToken | None:
        """Return the user's active token if it is marked. No use is counted. The caller holds the user's lock.

        If a mark cannot tell two holders of that lock apart, this turns it into doubt for good.
        """

    @abstractmethod
    def find_newest(self, user_id: str) -> StoredToken | None:
        """Return the user's token with the highest generation, with the ciphertext "" if it has ended. Not a use.

        `in_doubt` says whether it is active and marked.
        """

    @abstractmethod
    def insert(
        self, token: StoredToken, action: str = "created", metadata: dict[str, Any] | None = None
    ) -> StoredToken:
        """Store this token as the active one (`action`, with this metadata). Set its `token_id`, and its `in_doubt` if
        it got a mark, and return it.

        The earlier token is deactivated and erased ("deactivated", with the reason new_token_generated). Both happen at
        `created_at`.

        The token gets the mark of a login without a user id that is running, or that was running when this thread's
        login began and whose end is not known. (Before an "adopted" token no login began: only those that are running
        count.)

        This does not depend on the lock: a caller that has lost it still writes, over another connection if needed.

        Raises:
            LoginSuperseded: the user already has a token of this generation, or a later one is active. Any other
                violated constraint raises `StoreUnavailable`.
        """

    @abstractmethod
    def find_by_account(self, account: str) -> list[StoredToken]:
        """Return the active tokens whose rows name this account, latest first, at most 100. The caller must decrypt
        the ciphertext before it trusts such a row."""

    # Watching: these two have defaults that work with every database. See watch.py.

    def listen(self) -> Listener:
        """Start to listen for changes of tokens: each `insert`, `revoke`, `clear_doubt` and `merge` of any program.

        Raises:
            StorageError: the database cannot tell of changes, or not now. Then it is polled.
        """
        return Polling()

    def read_states(self, user_ids: Collection[str]) -> dict[str, TokenState]:
        """Return the state of the newest token of each of these users who has one. Not a use."""
        newest = {user_id: self.find_newest(user_id) for user_id in user_ids}
        return {
            user_id: TokenState(token.generation, bool(token.ciphertext), token.in_doubt)
            for user_id, token in newest.items()
            if token is not None
        }

    # Logins

    @abstractmethod
    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock with this name: one holder at a time across all processes that share this store. The lock is
        released when the holder dies.

        A thread holds at most two locks, with different names. A name is a user id in upper case or one of the
        constants above, `ACCOUNT_LOCK` with an account behind it. It holds no space.

        Raises:
            StoreUnavailable: the wait took longer than `login_wait` seconds (`lock_timeout`).
        """

    @abstractmethod
    def begin_login(self, user_id: str | None, lock: str, now: datetime, metadata: dict[str, Any]) -> None:
        """Record that a login begins ("login", without a token). The caller holds the lock with this name.

        The same transaction marks the user's active token. If that token already has a mark, it is in doubt from now
        on, because one mark cannot stand for two logins. Without a user id, this marks every active token that has no
        mark yet, and leaves the note.

        This fails if the database has no room for the new token, as far as the database can tell beforehand.
        (PostgreSQL cannot reserve room. There a login may be spent on a full disk, and its token is in the error.)
        """

    @abstractmethod
    def end_login(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        """Remove the marks of the login under this lock, because it made no token for these users.

        With `in_doubt` it may have made one, so the tokens stay in doubt. Otherwise the mark of a login without a user
        id that is still running takes the place of the removed one.

        Args:
            user_id: only this user's token; None for every token that this login has marked.
        """

    @abstractmethod
    def clear_doubt(self, token: StoredToken) -> None:
        """Remove the mark from this token if it is still active, because Upstox said that it works.

        The mark of a running login stays, because that login may still replace the token.
        """

    @abstractmethod
    def record(self, user_id: str | None, action: str, now: datetime, metadata: dict[str, Any] | None = None) -> None:
        """Write an audit entry that belongs to no token. It is durable on return."""

    @abstractmethod
    def logins_since(self, moment: datetime, process: str) -> list[datetime]:
        """Return the times of "login" entries later than `moment` whose metadata name another `process`, latest first,
        at most 100."""

    # Notes: short texts that all programs must know about, such as a refusal. notes.py encrypts its own.

    @abstractmethod
    def read_notes(self, names: Sequence[str]) -> tuple[float, dict[str, str]]:
        """Return the database's own clock, in seconds since 1970, and those of the named notes that exist."""

    @abstractmethod
    def write_note(self, name: str, text: str) -> None:
        """Store this text under this name and replace any earlier one."""

    @abstractmethod
    def erase_note(self, name: str) -> None:
        """Erase the note with this name, if there is one."""

    # History and upkeep

    @abstractmethod
    def revoke(self, user_id: str, now: datetime) -> bool:
        """Erase the user's active token ("revoked") and return whether there was one."""

    @abstractmethod
    def expire(self, now: datetime, limit: int) -> int:
        """Erase at most `limit` tokens that expire at `now` or before ("expired") and return how many. 0 means that
        none are left."""

    @abstractmethod
    def delete_entries(self, before: datetime, limit: int) -> int:
        """Delete at most `limit` audit entries older than `before` and return how many. 0 means that none are left."""

    @abstractmethod
    def read_history(self, user_id: str, limit: int, now: datetime) -> list[dict[str, Any]]:
        """Return the result of `get_token_history`."""

    @abstractmethod
    def read_statistics(self, user_id: str, now: datetime) -> dict[str, Any]:
        """Return the result of `get_user_statistics`."""

    @abstractmethod
    def read_audit_trail(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        """Return the result of `get_audit_trail`."""

    @abstractmethod
    def find_under_other_keys(self, key_id: str, limit: int, after: str | None = None) -> list[StoredToken]:
        """Return at most `limit` active tokens, expired ones included, that are not encrypted under this key.

        They come in the order of their user ids: the one that the database has for text, always the same.

        Args:
            after: return only tokens of users that follow this one.
        """

    @abstractmethod
    def replace_ciphertexts(self, pairs: Iterable[tuple[StoredToken, StoredToken]]) -> int:
        """Replace each ciphertext if the row still has the old one, and return how many were replaced. Not audited."""

    @abstractmethod
    def count_keys(self) -> dict[str, int]:
        """Count the active tokens, expired ones included, under each key."""

    @abstractmethod
    def check_health(self) -> dict[str, Any]:
        """Return the result of `get_storage_status`, except for the time. This never raises."""

    # Transfer: what export, import and migrate need.

    @abstractmethod
    def read_users(self, after: str, limit: int) -> list[str]:
        """Return at most `limit` of the users who have tokens or audit entries and whose ids follow `after`.

        They come in the order of their ids, as in `find_under_other_keys`. An empty list means that none are left.
        """

    def each_user(self) -> Iterator[str | None]:
        """Yield every user who has tokens or audit entries; None stands for entries that belong to nobody.

        Only a few are in memory at a time. A user who arrives meanwhile may be among them or not.
        """
        last = ""
        while users := self.read_users(last, USERS_AT_ONCE):
            yield from users
            last = users[-1]
        if self.read_entries(None, None, 1):
            yield None

    def list_users(self) -> list[str | None]:
        """Return the users of `each_user`, all at once."""
        return list(self.each_user())

    @abstractmethod
    def read_tokens(self, user_id: str | None) -> list[StoredToken]:
        """Return all of a user's tokens, oldest first, with every field except `token_id` and `source`, which mean
        nothing in another store. A token that has ended has an empty ciphertext. Nobody (None) has no tokens."""

    @abstractmethod
    def read_entries(self, user_id: str | None, after: AuditEntry | None, limit: int) -> list[AuditEntry]:
        """Return at most `limit` of the user's audit entries that follow `after`. All of them may not fit into memory.

        The oldest come first. Entries from the same second come in the order in which they were written.
        """

    @abstractmethod
    def merge(self, user_id: str | None, tokens: list[StoredToken], entries: list[AuditEntry]) -> None:
        """Write these tokens (oldest first) and entries without locking readers out.

        A token that already exists may have been used or revoked since the caller read it. So its use count only
        grows, it can end but never come back, and its ciphertext stays unchanged. An entry whose generation is missing
        belongs to no token. An active token gets the mark of a login without a user id that is running now.
        """
