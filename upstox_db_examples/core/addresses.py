"""Read connection strings: clean what is unambiguous, and refuse the rest without showing any of it.

The drivers disagree about a password with a raw `@`, `/`, `[` or `%`. Each of them takes a part of some such passwords
for a host, a port or a database, and then a message or a log shows it. So a password is escaped here where its end is
clear, and otherwise the address is refused before a driver sees it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .environment import clean, has_control_characters
from .errors import ConfigurationError
from .token import Secret

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(%[\w.%~-]+)?\]|[\w.%~-]*)(:[0-9]{0,5})?")
# What a URL must not hold unescaped before its @. A % stays if it begins an escape.
_RAW = re.compile(r"[^\w!$&'()*+,;=.~%:-]|%(?![0-9A-Fa-f]{2})", re.ASCII)
_CONNECTION_WORD = re.compile(
    r"(?:^|\s)(host|hostaddr|port|dbname|user|password|passfile|service|sslmode)\s*=", re.IGNORECASE
)
_PASSWORD = re.compile(r"[^/@\s]*:[^@\s]*@")
_SCHEME_WITHOUT_SLASHES = re.compile(r"(sqlite|pooled|postgres(ql)?|mongodb(\+srv)?|rediss?|unix|file):", re.IGNORECASE)


def read_text(address: object, what: str) -> Secret:
    """Return the cleaned text of an address of any kind.

    Raises:
        ConfigurationError: it is not text, is empty, or holds a control character.
    """
    given = address.reveal() if isinstance(address, Secret) else address
    text = Secret(clean(given) if isinstance(given, str) else "")
    del address, given  # A traceback that prints local variables must not show it.
    if not text.reveal() or has_control_characters(text.reveal()):
        raise ConfigurationError(f"{what} must be text without line breaks and other control characters.")
    return text


def read_url(address: object, schemes: Collection[str], what: str, example: str) -> Secret:
    """Return the URL, with what its user and password hold unescaped escaped.

    Args:
        schemes: those that it can have.
        what: what it is for, such as "The address of MongoDB", and an example, for the message.

    Raises:
        ConfigurationError: it is not such a URL, or nobody can tell where its password ends.
    """
    text = read_text(address, what)
    del address
    if (url := _escape(text, schemes)) is not None:
        return url
    raise ConfigurationError(
        f"{what} cannot be read. Write it like {example} and escape special characters in the user and the password "
        "with urllib.parse.quote(text, safe=''): @ is %40, / is %2F, % is %25."
    )


def _escape(text: Secret, schemes: Collection[str]) -> Secret | None:
    scheme, separator, rest = text.reveal().partition("://")
    if not separator or scheme not in schemes or re.search(r"\s", rest):
        return None
    front, slash, tail = rest.partition("/")
    if "@" in tail:  # Either this is part of a password with a raw /, or nobody can tell that it is not.
        return None
    user, at, hosts = front.rpartition("@")
    hosts, query = re.fullmatch(r"([^?#]*)(.*)", hosts, re.DOTALL).groups()  # type: ignore[union-attr]
    if not all(_is_host(host) for host in hosts.split(",")):
        return None
    name, colon, password = user.partition(":")
    escaped = [_RAW.sub(_quote, part).replace(":", "%3A") for part in (name, password)]
    return Secret(f"{scheme}://{colon.join(escaped)}{at}{hosts}{query}{slash}{tail}")


def _quote(raw: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in raw[0].encode())


def _is_host(text: str) -> bool:
    """Return whether this is the name or the address of a host, maybe with a port: nothing that could be a password."""
    found = _HOST.fullmatch(text)
    return found is not None and (not (found[3] or ":")[1:] or 0 < int(found[3][1:]) < 65_536)


def is_host(name: str, port: str = "") -> bool:
    """Return whether these can be a host, or a socket's folder, and a port."""
    named = name.startswith(("/", "@/")) or _is_host(f"[{name}]" if ":" in name else name)
    return named and _is_host(f":{port}")


def looks_like_no_file(text: str) -> bool:
    """Return whether this is a connection string, or the name of a file with something around it that is not meant.

    SQLite would make a file of that name, and a password may be part of it.
    """
    return (
        "://" in text
        or "?" in text
        or text != clean(text)
        or has_control_characters(text)
        or any(each.match(text) for each in (_PASSWORD, _SCHEME_WITHOUT_SLASHES))
        or _CONNECTION_WORD.search(text) is not None
    )
