"""What a transfer remembers of the tokens that it has written, until it compares the two stores."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from ..core.token import StoredToken


class Brought:
    """The tokens that worked when they were brought over, in the order of the source, which is the same each time.

    Each takes eight bytes, its hash: a set of a million took 200 MB. Two hashes may be equal by chance, once in 10^19
    times. Then a token that ended meanwhile goes unnoticed. Rejected: a temporary file, which would also hold the user
    ids, and could fail.
    """

    def __init__(self) -> None:
        self._hashes, self._place = array("q"), 0

    def add(self, tokens: Iterable[StoredToken]) -> None:
        """Remember these tokens of the next user."""
        self._hashes.extend(map(_hash, _sorted(tokens)))

    def take(self, tokens: Iterable[StoredToken]) -> set[int]:
        """Return the generations of those that were brought over. Ask for all users, in the order of `add`."""
        taken = set()
        for token in _sorted(tokens):
            if self.left and self._hashes[self._place] == _hash(token):
                self._place += 1
                taken.add(token.generation)
        return taken

    @property
    def left(self) -> int:
        """How many have not been taken."""
        return len(self._hashes) - self._place


def _sorted(tokens: Iterable[StoredToken]) -> list[StoredToken]:
    return sorted(tokens, key=lambda token: token.generation)


def _hash(token: StoredToken) -> int:
    return hash((token.user_id, token.generation))
