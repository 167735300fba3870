"""Text that comes from outside: environment variables and paths. What is harmless is cleaned, the rest is refused.

An env file that is read by Docker, systemd or a shell on another system leaves quotes, a carriage return or a byte
order mark around a value. Nobody wants those, and a user id or a file name with them costs a login or makes a second
file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ConfigurationError, InvalidInput

# Besides white space: the byte order mark, and what web pages leave around copied text.
_INVISIBLE = r"[\s\ufeff\u200b-\u200f\u2060]"
_AROUND = re.compile(rf"\A{_INVISIBLE}+|{_INVISIBLE}+\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def strip_invisible(text: str) -> str:
    """Remove white space and invisible characters from both ends."""
    return _AROUND.sub("", text)


def clean(text: str) -> str:
    """Remove white space, invisible characters and one pair of quotes from both ends."""
    text = strip_invisible(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = strip_invisible(text[1:-1])
    return text


def has_control_characters(text: str) -> bool:
    """Return whether the text holds a control character, or a byte that was not UTF-8."""
    return _CONTROL.search(text) is not None


def read_variable(name: str, *, any_character: bool = False) -> str:
    """Return the cleaned value of an environment variable, or "" if it is not set.

    Args:
        any_character: allow line breaks and other control characters inside. The caller has its own check.

    Raises:
        ConfigurationError: the value holds a control character. The error does not show the value.
    """
    text = clean(os.environ.get(name, ""))
    if not any_character and has_control_characters(text):
        del text
        raise ConfigurationError(f"{name} holds a line break or another character that cannot be right. Set it again.")
    return text


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return the path, with `~` replaced by the home folder. Every path that a caller gives goes through here.

    Raises:
        ConfigurationError: there is no home folder.
        InvalidInput: this is not a path.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInput("A path must be text, or a pathlib.Path, that is not empty and holds no NUL.")
    expanded = os.path.expanduser(text)  # noqa: PTH111  # Path.expanduser raises RuntimeError for a file named ~x.
    # With an empty HOME, ~/keys would become /keys.
    if text.partition("/")[0] == "~" and (os.environ.get("HOME") == "" or not Path(expanded).is_absolute()):
        raise ConfigurationError(
            f"There is no home folder to use for the ~ in {text}. Set HOME, or give a full path. The key file's "
            "path is UPSTOX_DB_KEY_FILE."
        )
    return Path(expanded)
