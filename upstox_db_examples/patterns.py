"""The stores in one table: a store's address leads to its class. A new store is one more line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple, Unpack
from urllib.parse import urlsplit, urlunsplit

from .core.addresses import looks_like_no_file, read_text, read_url
from .core.errors import InvalidInput
from .core.settings import Options
from .core.store import TokenStorage
from .core.token import Secret

# The package to install if a module has another name. PyPI's own `bson` is a different package, and it breaks pymongo.
INSTALLED_AS = {"bson": "pymongo", "psycopg2": "psycopg2-binary"}


class Pattern(NamedTuple):
    """One kind of store. Its folder and its extra have the same name.

    Attributes:
        store: the name of its class.
        schemes: the schemes of its addresses. The hybrid has two addresses in one text, and so two schemes.
        arguments: turns an address into the arguments of the class.
        example: arguments for the reader of a copy.
        address, what: for the help of the command.
    """

    store: str
    schemes: tuple[str, ...]
    arguments: Callable[[str], tuple[str, ...]]
    example: str
    address: str
    what: str


def _file(address: str) -> tuple[str, ...]:
    _, separator, path = address.partition("://")
    if separator and not path.startswith("/"):
        del path, address
        raise InvalidInput("The address of a file has three slashes: sqlite:///upstox.db, or four with a full path.")
    return (path[1:] if separator else address,)


def _whole(address: str) -> tuple[str, ...]:
    return (address,)


def _url_and_name(address: str) -> tuple[str, ...]:
    secret = Secret(address)
    del address  # A traceback that prints local variables must not show its password.
    url = read_url(secret, ("mongodb", "mongodb+srv"), "The address of MongoDB", "mongodb://user:password@host/#name")
    parts = urlsplit(url.reveal())
    return urlunsplit(parts._replace(fragment="")), parts.fragment or "upstox_db"


def _two(address: str) -> tuple[str, ...]:
    return tuple(address.split(maxsplit=1))


PATTERNS = {
    "sqlite": Pattern(
        "SQLiteUpstoxStorage", ("", "sqlite"), _file, '"upstox.db"', "upstox.db, sqlite:///path", "SQLite"
    ),
    "pooled": Pattern(
        "PooledUpstoxStorage",
        ("pooled",),
        _file,
        '"upstox.db", pool_size=5',
        "pooled:///path",
        "SQLite through a bounded pool",
    ),
    "postgresql": Pattern(
        "PostgreSQLUpstoxStorage",
        ("postgresql", "postgres"),
        _whole,
        '"postgresql://user:password@host/name"',
        "postgresql://user:password@host/name",
        "PostgreSQL",
    ),
    "mongodb": Pattern(
        "MongoUpstoxStorage",
        ("mongodb", "mongodb+srv"),
        _url_and_name,
        '"mongodb://user:password@host/", "upstox_db"',
        "mongodb://user:password@host/?...#name",
        "MongoDB; the database name comes last",
    ),
    "hybrid": Pattern(
        "HybridUpstoxStorage",
        tuple(f"{redis} {postgres}" for redis in ("redis", "rediss") for postgres in ("postgresql", "postgres")),
        _two,
        '"redis://:password@host/0", "postgresql://user:password@host/name"',
        '"redis://... postgresql://..."',
        "the hybrid: both, in one argument",
    ),
}


def open_store(address: str, **options: Unpack[Options]) -> TokenStorage:
    """Open the store at this address.

    Args:
        address: a path or `sqlite:///path`; `pooled:///path`; `postgresql://…`; `mongodb://…/#database`; or
            `redis://… postgresql://…`, the hybrid's two addresses in one text.
        options: see `Options`.

    Raises:
        InvalidInput: there is no store for this address.
        ModuleNotFoundError: the store's driver is not installed.
        StorageError: as for the store's class.

    Example:
        >>> with open_store("sqlite:///upstox.db", actor="morning job") as storage:
        ...     print(type(storage).__name__, storage.get_valid_token("AB1234"))
        SQLiteUpstoxStorage None
    """
    text = Secret(address)
    del address  # A traceback that prints local variables must not show its password.
    text = read_text(text, "The address of a store")
    words = text.reveal().split(maxsplit=1) if "://" in text.reveal() else []
    scheme = " ".join(word.partition("://")[0] for word in words if "://" in word)
    del words
    for folder, pattern in PATTERNS.items():
        if scheme in pattern.schemes:
            if not scheme and looks_like_no_file(text.reveal()):
                break
            try:
                return import_store(folder)(*pattern.arguments(text.reveal()), **options)
            finally:
                options.pop("keys", None)  # Nor must it show raw keys.
    del scheme
    known = ", ".join(f"{scheme}://" for pattern in PATTERNS.values() for scheme in pattern.schemes if scheme)
    raise InvalidInput(f"This is neither the path of a file nor the address of a store. There are: {known}.")


def import_store(folder: str) -> Callable[..., TokenStorage]:
    """Import the class of this pattern.

    Raises:
        ModuleNotFoundError: its driver is not installed; the message names the extra.
    """
    store = PATTERNS[folder].store
    try:
        found: Callable[..., TokenStorage] = getattr(importlib.import_module(f"{__package__}.{folder}"), store)
        return found
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        package = INSTALLED_AS.get(module, module)
        message = f"{store} needs {package}. In a clone of this project, run: pip install '.[{folder}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
