"""Checks of arguments, made before anything is read or written."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from .errors import InvalidInput

LONGEST_TIME = 86_400  # seconds: no token lives longer than a day
LONGEST_ACTOR = 200
USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,49}")


def check_user_id(user_id: object) -> str | None:
    return None if user_id is None else require_user_id(user_id)


def require_user_id(user_id: object) -> str:
    if not isinstance(user_id, str) or not USER_ID.fullmatch(user_id):
        raise InvalidInput(
            "A user id must be 1 to 50 letters and digits. After the first character, . _ @ and - are allowed too."
        )
    return user_id


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode the text. It cannot encode half a surrogate pair, which JSON can express."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_limit(limit: object) -> int:
    if type(limit) is not int or not 1 <= limit < 2**31:
        raise InvalidInput("limit must be a whole number of at least 1.")
    return limit


def require_aware(moment: datetime, name: str) -> datetime:
    """Return the same moment in UTC.

    Raises:
        InvalidInput: the datetime has no time zone. A guess could be 5.5 hours off in India.
    """
    if isinstance(moment, datetime) and moment.tzinfo is UTC:
        return moment
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidInput(f"{name} must be a datetime with a time zone, such as datetime.now(UTC).")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput(f"{name} must be within the years 1 to 9999 in UTC.") from error


def require_positive(name: str, number: float) -> None:
    """Check that the number can be a time to wait, in seconds.

    Raises:
        InvalidInput: it is not positive, or longer than a day. A driver and the clock cannot count up to every time,
            and an infinite one would make somebody wait forever.
    """
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= LONGEST_TIME:
        raise InvalidInput(f"{name} must be a positive number of seconds, at most {LONGEST_TIME} (a day).")


def require_function(name: str, function: object, instead: str) -> None:
    """Check that this can be called when it is needed.

    Args:
        instead: what to write, for the message.

    Raises:
        InvalidInput: it cannot be called, or it is a class: a call would only make an instance.
    """
    if callable(function) and not isinstance(function, type):
        return
    kind = f"the class {function.__name__}" if isinstance(function, type) else f"of the type {type(function).__name__}"
    del function  # A traceback that prints local variables must not show it: it may be a key.
    raise InvalidInput(f"{name} cannot be {kind}. Write {instead}.")


def require_actor(actor: object) -> None:
    """Check that every database can keep this name.

    Raises:
        InvalidInput: it is no text, too long, or holds half a character or a NUL, which PostgreSQL does not take.
    """
    if not isinstance(actor, str) or len(actor) > LONGEST_ACTOR or "\0" in actor or not is_unicode(actor):
        raise InvalidInput(
            f"actor must be text of at most {LONGEST_ACTOR} characters, without NUL or half a character."
        )


def require_pool_size(number: int) -> None:
    """Check that the number can be the size of a pool.

    Raises:
        InvalidInput: it cannot.
    """
    if type(number) is not int or number < 1:
        raise InvalidInput("pool_size must be a whole number of at least 1.")
