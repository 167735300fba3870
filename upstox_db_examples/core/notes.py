"""Notes share facts about earlier logins between all programs on a store: a refusal, a limit, a renewal.

Six programs with one wrong PIN must cost one attempt, not five and a locked account. So a login that Upstox refused
leaves a note in the store, and each program checks for one before it logs in on its own.

The key ring encrypts the whole note. Someone who has only the database can neither forge a note nor learn from it which
credentials were tried: a plain hash of a PIN would be guessed in no time. The times come from the database's clock,
because the clocks of two machines differ. (Someone who can write to the database can still delete a note or put an
older one back.)
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .backend import Backend
from .cipher import Binding
from .errors import KeyUnavailable, LoginError, LoginLimited, LoginRefused, TokenRefused
from .login import Login
from .token import Secret
from .token_cipher import TokenCipher
from .users import account_of

LONGEST_LIMIT = 1800.0  # seconds; longer than Upstox's longest, so that a wrong number blocks nobody for a day
UNKNOWN_REFUSAL = 900.0  # seconds of pause after a refusal with an unknown code: it may go away by itself
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Applicant(NamedTuple):
    """The account that wants to log in.

    Attributes:
        who: the account, or the user if the login tells no account.
        credentials: a digest of all the credentials; None if the login tells none.
    """

    who: str
    credentials: str | None


def applicant_of(login: Login, user_id: str | None) -> Applicant:
    """Return who logs in if this login logs this user in."""
    account, digest_of = account_of(login, user_id), getattr(login, "credentials_digest", None)
    who = f"account {account}" if account else f"user {(user_id or '').upper()}"
    return Applicant(who, digest_of(user_id) if digest_of else None)


class Notes:
    """The notes of one store. Each is bound to the kind of store, so a note from another kind of store is ignored."""

    def __init__(self, backend: Backend, cipher: TokenCipher) -> None:
        self._backend, self._cipher = backend, cipher

    def look(self, applicant: Applicant, *, deliberate: bool) -> str | None:
        """Check that this login may be tried now.

        Args:
            deliberate: a person wants this login and may have fixed the credentials at Upstox, so an earlier refusal
                does not block it. A limit does.

        Returns:
            the name of the note about a refusal of this applicant, if there is one. Erase it after a success.

        Raises:
            LoginLimited: Upstox told a program on this store to wait, and that time is not over.
            LoginRefused: Upstox refused these credentials, and they have not changed since.
        """
        now, notes = self.read("limit", f"limit {applicant.who}", f"refusal {applicant.who}")
        for name in ("limit", f"limit {applicant.who}"):
            if (note := notes.get(name)) and (left := seconds_left(note, now)) > 0:
                raise LoginLimited(
                    f"Wait {left:.0f} s to log in: Upstox told a program on this store to wait ({note['code']}).",
                    note["code"],
                    left,
                    account_only=name != "limit",
                )
        name = f"refusal {applicant.who}"
        note = notes.get(name)
        if note is None or deliberate or note["credentials"] != applicant.credentials:
            return name if note else None
        if note["seconds"] is None or seconds_left(note, now) > 0:
            when = datetime.fromtimestamp(note["at"], UTC).isoformat(timespec="seconds")
            pause = "" if note["seconds"] is None else f" for {seconds_left(note, now):.0f} s"
            raise LoginRefused(
                f"Upstox refused these credentials at {when} ({note['code']}), so no program on this store will try "
                f"them on its own{pause}: {note['why']} Once that is fixed, log in once with 'upstox-db login' or "
                "store_token().",
                note["code"],
            )
        return name

    def failed(self, applicant: Applicant, error: BaseException, known: frozenset[str]) -> None:
        """Leave a note about a failed login if other programs must know.

        Args:
            known: the codes of refusals that only a person can fix.
        """
        if not isinstance(error, LoginError) or error.code is None:
            return  # No request was made, or Upstox's answer does not concern other programs.
        note = {"credentials": applicant.credentials, "code": error.code, "seconds": None, "why": ""}
        if isinstance(error, LoginLimited):
            name = f"limit {applicant.who}" if error.account_only else "limit"
            self._write(name, note | {"seconds": min(error.retry_after, LONGEST_LIMIT)})
        elif isinstance(error, LoginRefused):
            seconds = None if error.code in known else UNKNOWN_REFUSAL
            self._write(f"refusal {applicant.who}", note | {"seconds": seconds, "why": str(error)})

    def since_renewal(self, user_id: str) -> float:
        """Return how many seconds ago this user's token was renewed; infinity if it never was."""
        now, notes = self.read(f"renewal {user_id}")
        note = notes.get(f"renewal {user_id}")
        return max(0.0, now - note["at"]) if note else float("inf")

    def renewed(self, user_id: str) -> None:
        """Record that this user's token was renewed now."""
        self._write(f"renewal {user_id}", {})

    def read(self, *names: str) -> tuple[float, dict[str, dict[str, Any]]]:
        """Return the database's own clock, in seconds since 1970, and those of the named notes that can be read.

        A refusal's or limit's note has `at` (by that clock), `code`, `seconds` (how long it holds; None: until somebody
        fixes it), `why` and `credentials` (the digest).
        """
        now, sealed = self._backend.read_notes(names)
        notes = {}
        for name, text in sealed.items():
            try:
                notes[name] = json.loads(self._cipher.ring.decrypt(text, self._binding(name)).reveal())
            except (TokenRefused, KeyUnavailable):
                continue  # Its writer did not have one of our keys.
        return now, notes

    def _write(self, name: str, note: dict[str, Any]) -> None:
        now, _ = self._backend.read_notes([])
        text = json.dumps({**note, "at": now})
        self._backend.write_note(name, self._cipher.ring.encrypt(Secret(text), self._binding(name)))

    def _binding(self, name: str) -> Binding:
        return Binding(name, EPOCH, 0, f"login note of {self._backend.store_kind}")


def seconds_left(note: dict[str, Any], now: float) -> float:
    """Return the seconds left for this note: never more than at the start, even if the database's clock goes back."""
    seconds: float = note["seconds"] or 0.0
    return min(seconds, float(note["at"]) + seconds - now)
