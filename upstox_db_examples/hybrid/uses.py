"""A use of a token that Redis has counted and that waits there, in a stream, until it is folded into PostgreSQL."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..core.checks import USER_ID

USE_ID = re.compile("[0-9a-f]{32}")


class Use(NamedTuple):
    """A use that was counted in Redis. `entry` is its id in the stream, and `use_id` is globally unique."""

    entry: str
    token: int
    user: str
    actor: str
    at: datetime
    use_id: str


def read_use(entry: str, fields: dict[str, str]) -> Use | None:
    """Read a use from an entry of the stream, or return None if this package did not write the entry.

    This is strict: PostgreSQL refuses a text with a NUL, and an index key that is too long. One entry that it always
    refuses would stop the fold for good.
    """
    try:
        use = Use(
            entry,
            int(fields["token"]),
            fields["user"],
            fields["actor"],
            datetime.fromtimestamp(int(fields["at"]), UTC),
            fields["use"],
        )
    except (KeyError, ValueError, OverflowError, OSError):
        return None
    whole = USER_ID.fullmatch(use.user) and USE_ID.fullmatch(use.use_id) and "\0" not in use.actor
    return use if whole and 0 < use.token < 2**63 else None


def text_of(value: Any) -> str:
    """Return the text that Redis sent, whether or not its client decodes it. What is not UTF-8 is replaced."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
