"""The marks and the notes of logins that are running; see core/backend.py for what they mean."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pymongo import UpdateOne
from pymongo.database import Database

from ..core.backend import RUNNING, HarmlessLogins
from ..core.errors import StoreUnavailable
from .connection import Document
from .documents import ATTEMPTS, not_revoked
from .lease import SOON, TAKEN_OVER, Leases

RUNNING_NOTES = {"_id": {"$gte": RUNNING, "$lt": RUNNING[:-1] + "!"}}


class Logins:
    """The beginnings and ends of logins in one database."""

    def __init__(self, database: Callable[[], AbstractContextManager[Database[Document]]], leases: Leases) -> None:
        self._database, self._leases, self._harmless = database, leases, HarmlessLogins()

    def begin(self, user_id: str | None, lock: str, entry: Document) -> None:
        """Record that a login begins, with this audit entry, and mark the tokens that it may replace.

        All of it, and the caller's lease, is durable on return.

        Raises:
            StoreUnavailable: another caller has taken over the lease.
        """
        mark = {"lock": lock, "owner": self._leases.owner_of(lock)}
        # An existing mark is from a login with an unknown outcome. (If a user is named, it may be from a login that is
        # running under another lock.) One mark cannot stand for both logins, even under one lock: the earlier one may
        # wake up and end well.
        marked: Document = {"$cond": [{"$eq": [{"$type": "$login"}, "missing"]}, {"$literal": mark}, {"$literal": {}}]}
        which = {"login": {"$exists": False}} if user_id is None else {"_id": user_id}
        with self._database() as db:
            # For a named user only the mark is waited for: it brings along what was written before it. Without a user,
            # there may be nothing to mark.
            first = db if user_id is None else db.with_options(write_concern=SOON)
            # A caller that was stopped and lost its lease meanwhile would kill the token that another login has made.
            self._leases.prove_held(first.write_concern)
            # Write the entry first, then the mark. They cannot be one transaction, because a single server has none. If
            # this is interrupted in between, the entry reports a login that never began, and nothing is lost. The other
            # way round, a living token would be in doubt for no reason. Both are durable before the login begins.
            first.token_audit.insert_one(entry)
            if user_id is None:
                db.login_notes.replace_one({"_id": RUNNING + lock}, {"sealed": _note_of(mark)}, upsert=True)
            mark_each(db, {**which, **not_revoked()}, [{"$set": {"login": marked}}])
            # A server that died or lost its election before the mark took with it what was not waited for. But what is
            # still there now was written before the mark, so it is as durable. (To compare the servers' terms would
            # save this message, but only undocumented fields tell them, and a single server has none.)
            is_held, is_recorded, running = self._look_again(db, entry)
            if not is_held:
                self.end(lock, in_doubt=False)
                raise StoreUnavailable(TAKEN_OVER)
            if not is_recorded:
                db.token_audit.insert_one(entry)
            self._harmless.marks = self._over(db, running) | {_note_of(mark)}

    def end(self, lock: str, *, in_doubt: bool, user_id: str | None = None) -> None:
        """Remove the marks of this thread's login under this lock; see `Backend.end_login`."""
        own = {"lock": lock, "owner": self._leases.owner_of(lock)}
        mine = {"login.lock": lock, "login.owner": own["owner"]}
        which = mine if user_id is None else {"_id": user_id, **mine}
        with self._database() as db:
            # The note goes first. Whoever still finds it after giving its mark to a token can leave the mark to us.
            if user_id is None and not in_doubt:  # A note that stays counts as one of a login that was killed.
                # The note of a caller that has taken over the lease has the same name.
                db.login_notes.delete_one({"_id": RUNNING + lock, "sealed": _note_of(own)})
            # A mark without an owner stays, whoever holds the lock.
            mark = {} if in_doubt else mark_of_running(list_running(db), self._harmless.marks)
            mark_each(db, which, _change_to(mark))
            if mark:
                self.update_mark(db, {}, mark, self._harmless.marks)

    def harmless(self, db: Database[Document], action: str) -> frozenset[str]:
        """Return the notes of the logins that cannot replace a token that is stored by this action."""
        return self._harmless.marks if action == "created" else self._over(db, list_running(db))

    def update_mark(
        self,
        db: Database[Document],
        which: Document,
        mark: Document | None,
        harmless: frozenset[str],
        notes: list[str] | None = None,
    ) -> Document | None:
        """Give these tokens another mark if they have this one and its login has ended meanwhile.

        Args:
            notes: of the running logins, if the caller has read them since it gave this mark.

        Returns:
            the mark of the tokens.
        """
        for _ in range(ATTEMPTS):
            notes = list_running(db) if notes is None else notes
            running = [mark_of(note) for note in notes if note not in harmless]
            if mark in running or (mark is None and not running):
                break
            earlier, mark, notes = mark, running[0] if running else None, None
            mark_each(db, {**which, "login": {"$exists": False} if earlier is None else earlier}, _change_to(mark))
        return mark

    def _over(self, db: Database[Document], notes: list[str]) -> frozenset[str]:
        return frozenset(note for note in notes if not self._leases.lives(db, **mark_of(note)))

    def _look_again(self, db: Database[Document], entry: Document) -> tuple[bool, bool, list[str]]:
        """Return whether this thread holds its leases, whether the entry is there, and the notes of running logins."""
        held = self._leases.held()
        mine: Document = {"_id": {"$in": list(held)}, "owner": {"$in": list(held.values())}}
        entries = [{"$match": {"_id": entry["_id"]}}, {"$project": {"_id": 1}}]
        found = list(
            db.leases.aggregate(
                [
                    {"$match": mine},
                    {"$unionWith": {"coll": "token_audit", "pipeline": entries}},
                    {"$unionWith": {"coll": "login_notes", "pipeline": [{"$match": RUNNING_NOTES}]}},
                ]
            )
        )
        ids = {each["_id"] for each in found}
        return held.keys() <= ids, entry["_id"] in ids, [each["sealed"] for each in found if "sealed" in each]


def mark_each(db: Database[Document], which: Document, change: Any) -> None:
    """Change the marks of these tokens.

    This changes each token separately, because the driver does not retry `update_many` after a lost connection. A login
    takes so long that a firewall may have cut the connection.
    """
    if isinstance(which.get("_id"), str):
        db.active_tokens.update_one(which, change)
        return
    users = [active["_id"] for active in db.active_tokens.find(which, {"_id": 1})]
    if changes := [UpdateOne({**which, "_id": user_id}, change) for user_id in users]:
        db.active_tokens.bulk_write(changes, ordered=False)


def list_running(db: Database[Document]) -> list[str]:
    """Return the notes of the logins without a user id that have not ended."""
    return [note["sealed"] for note in db.login_notes.find(RUNNING_NOTES)]


def mark_of(note: str) -> Document:
    """Return the mark that this note stands for."""
    lock, _, owner = note.rpartition(" ")
    return {"lock": lock, "owner": owner}


def mark_of_running(notes: list[str], harmless: frozenset[str]) -> Document | None:
    """Return the mark of a login without a user id that may replace this token. Its end brings the next one's."""
    return next((mark_of(note) for note in notes if note not in harmless), None)


def _note_of(mark: Document) -> str:
    return f"{mark['lock']} {mark['owner']}"


def _change_to(mark: Document | None) -> Document:
    return {"$unset": {"login": 1}} if mark is None else {"$set": {"login": mark}}
