"""Messages whose statements the server plans once for each connection, and not at each use.

Planning takes a third of a read's time. These are SQL's own PREPARE and EXECUTE, because psycopg2 offers nothing else.
Behind a pooler the next transaction may run in a session that does not know them, so there they are sent as they are.
"""

from __future__ import annotations

import functools
import hashlib
import re

from psycopg2.extensions import connection

# What the statements' parameters are. A name means the same in all of them.
_TYPES = {
    **dict.fromkeys(("user_id", "actor", "action", "how", "ciphertext", "key_id", "account"), "text"),
    **dict.fromkeys(("user_name", "email", "broker", "user_type"), "text"),
    **dict.fromkeys(("metadata", "details", "reason", "products", "exchanges"), "jsonb"),
    **dict.fromkeys(("now", "alive_after", "created_at", "expires_at", "issued_at"), "timestamptz"),
    **dict.fromkeys(("names", "harmless"), "text[]"),
    "generation": "integer",
    "key": "bigint",
}
_PARAMETER = re.compile(r"%\((\w+)\)s")


class PreparingConnection(connection):
    """A connection that remembers which statements its session knows by name."""

    def __init__(self, dsn: str, async_: bool = False) -> None:
        super().__init__(dsn, async_)  # type: ignore[call-arg]  # The stubs lack the second parameter.
        self.known: set[str] = set()


class Message:
    """Statements that go to the server together, as one transaction.

    Args:
        sql: the statements, separated by semicolons.

    Attributes:
        plain: the statements as they are.
        names: the names that a session knows once it has executed this.
    """

    def __init__(self, sql: str) -> None:
        statements = [each.strip() for each in sql.split(";")]
        self.plain = sql
        self._prepare = {_name_of(each): _prepare(each) for each in statements}
        self._execute = ";".join(_execute(each) for each in statements)
        self.names = frozenset(self._prepare)

    def for_session(self, known: set[str]) -> str:
        """Return the message for a session that knows these names. It prepares the missing ones."""
        missing = [prepare for name, prepare in self._prepare.items() if name not in known]
        return ";".join([*missing, self._execute])


@functools.cache
def message(sql: str) -> Message:
    """Return the message for these statements. There are as many as the store has constants of this kind."""
    return Message(sql)


def _name_of(sql: str) -> str:
    # By its text, so that two versions of a statement never share a name.
    return f"upstox_{hashlib.sha256(sql.encode()).hexdigest()[:16]}"


def _parameters(sql: str) -> list[str]:
    return list(dict.fromkeys(_PARAMETER.findall(sql)))


def _prepare(sql: str) -> str:
    names = _parameters(sql)
    types = f"({', '.join(_TYPES[each] for each in names)})" if names else ""
    return f"PREPARE {_name_of(sql)} {types} AS {_PARAMETER.sub(lambda found: f'${names.index(found[1]) + 1}', sql)}"


def _execute(sql: str) -> str:
    values = ", ".join(f"%({each})s" for each in _parameters(sql))
    return f"EXECUTE {_name_of(sql)} {f'({values})' if values else ''}"
