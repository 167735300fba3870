"""What all programs on a store have to know of earlier logins: a refusal, a limit, a renewal.

Six programs with one wrong PIN must cost one attempt and not five and a locked account. So a login that Upstox has
refused leaves a note in the store, and each program looks there before it logs in by itself.

A note is encrypted as a whole under the key ring. Somebody who has only the database can neither write one that is
believed nor learn from one which credentials were tried: a plain hash of a PIN would be guessed in a moment. The times
are the database's own, because the clocks of two machines differ. (Somebody who can write the database can still delete
a note, or put an older one back.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from .cipher import Binding, KeyRing
from .errors import KeyUnavailable, LoginError, LoginLimited, LoginRefused, TokenRefused
from .token import Secret

LONGEST_LIMIT = 1800.0  # seconds; longer than Upstox's longest, so that a wrong number holds nobody up for a day
UNKNOWN_REFUSAL = 900.0  # seconds of pause after a refusal by a code that nobody knows: it may pass by itself
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Notepad(Protocol):
    """Where notes are kept: a part of backend.py."""

    def _notes(self, names: list[str]) -> tuple[float, dict[str, str]]: ...
    def _write_note(self, name: str, text: str) -> None: ...
    def _erase_note(self, name: str) -> None: ...


class Applicant(NamedTuple):
    """Who wants to log in.

    Attributes:
        who: the account, or the user where the login tells no account.
        credentials: a digest of all the credentials; None where the login does not tell.
    """

    who: str
    credentials: str | None


class Notes:
    """The notes of one store.

    Args:
        pad: where they are kept.
        ring: gives the key ring.
        kind: of the store, so that a note from another kind of store is not believed.
    """

    def __init__(self, pad: Notepad, ring: Callable[[], KeyRing], kind: str) -> None:
        self._pad, self._ring, self._kind = pad, ring, kind

    def look(self, applicant: Applicant, *, deliberate: bool) -> str | None:
        """Whether this login may be tried now.

        Args:
            deliberate: a person wants this login, and has perhaps mended the credentials at Upstox: a refusal does
                not stand in its way. A limit does.

        Returns:
            the name of the note about a refusal of this applicant, if there is one: to be erased after a success.

        Raises:
            LoginLimited: Upstox has told a program on this store to wait, and the time is not over.
            LoginRefused: Upstox has refused these credentials, and they are still the same.
        """
        now, notes = self._read("limit", f"limit {applicant.who}", f"refusal {applicant.who}")
        for name in ("limit", f"limit {applicant.who}"):
            if (note := notes.get(name)) and (left := _left(note, now)) > 0:
                raise LoginLimited(
                    f"No login for {left:.0f} s: Upstox has told a program on this store to wait ({note['code']}).",
                    note["code"],
                    left,
                    account_only=name != "limit",
                )
        name = f"refusal {applicant.who}"
        note = notes.get(name)
        if note is None or deliberate or note["credentials"] != applicant.credentials:
            return name if note else None
        if note["seconds"] is None or _left(note, now) > 0:
            when = datetime.fromtimestamp(note["at"], UTC).isoformat(timespec="seconds")
            pause = "" if note["seconds"] is None else f" for {_left(note, now):.0f} s"
            raise LoginRefused(
                f"Upstox refused these credentials at {when} ({note['code']}), so no program on this store tries them "
                f"again by itself{pause}: {note['why']} When that is mended, log in once with 'upstox-db login' or "
                "store_token().",
                note["code"],
            )
        return name

    def failed(self, applicant: Applicant, error: BaseException, known: frozenset[str]) -> None:
        """A login has failed: leave a note if others have to know.

        Args:
            known: the codes of refusals that only a person can mend.
        """
        if not isinstance(error, LoginError) or error.code is None:
            return  # No request was made, or Upstox said nothing that holds for others.
        note = {"credentials": applicant.credentials, "code": error.code, "seconds": None, "why": ""}
        if isinstance(error, LoginLimited):
            name = f"limit {applicant.who}" if error.account_only else "limit"
            self._write(name, note | {"seconds": min(error.retry_after, LONGEST_LIMIT)})
        elif isinstance(error, LoginRefused):
            seconds = None if error.code in known else UNKNOWN_REFUSAL
            self._write(f"refusal {applicant.who}", note | {"seconds": seconds, "why": str(error)})

    def since_renewal(self, user_id: str) -> float:
        """How many seconds ago this user's token was renewed; infinite if it never was."""
        now, notes = self._read(f"renewal {user_id}")
        note = notes.get(f"renewal {user_id}")
        return max(0.0, now - note["at"]) if note else float("inf")

    def renewed(self, user_id: str) -> None:
        """This user's token was renewed now."""
        self._write(f"renewal {user_id}", {})

    def _read(self, *names: str) -> tuple[float, dict[str, dict[str, Any]]]:
        now, sealed = self._pad._notes(list(names))
        notes = {}
        for name, text in sealed.items():
            try:
                notes[name] = json.loads(self._ring().decrypt(text, self._binding(name)).reveal())
            except (TokenRefused, KeyUnavailable):
                continue  # Nobody who has a key of ours wrote it.
        return now, notes

    def _write(self, name: str, note: dict[str, Any]) -> None:
        now, _ = self._pad._notes([])
        text = json.dumps({**note, "at": now})
        self._pad._write_note(name, self._ring().encrypt(Secret(text), self._binding(name)))

    def _binding(self, name: str) -> Binding:
        return Binding(name, EPOCH, 0, f"login note of {self._kind}")


def _left(note: dict[str, Any], now: float) -> float:
    """Seconds until this note's time is over; never more than it began with, also if the database's clock goes back."""
    seconds: float = note["seconds"] or 0.0
    return min(seconds, float(note["at"]) + seconds - now)
