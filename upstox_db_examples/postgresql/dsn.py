"""A PostgreSQL connection string: read and cleaned, so that nothing of a password is shown."""

from __future__ import annotations

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from ..core.addresses import is_host, read_text, read_url
from ..core.errors import ConfigurationError
from ..core.token import Secret

_WHAT, _EXAMPLE = "The address of PostgreSQL", "postgresql://user:password@host/database"
_SCHEMES = ("postgresql", "postgres")


def read_dsn(dsn: Secret) -> tuple[Secret, str, list[Secret]]:
    """Return the cleaned connection string, where it leads (without any password), and one string for each host.

    Asynchronous libpq would spend all the time on the first host.

    Raises:
        ConfigurationError: libpq cannot read it, or its hosts, ports or database cannot be right.
    """
    dsn = read_text(dsn, _WHAT)
    if dsn.reveal().startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)):
        dsn = read_url(dsn, _SCHEMES, _WHAT, _EXAMPLE)
    try:
        # The encoding, because PGCLIENTENCODING or a role may name one that has no Hindi letters.
        parts: dict[str, str] = parse_dsn(dsn.reveal()) | {"client_encoding": "UTF8"}
        lists = {name: parts[name].split(",") for name in ("host", "hostaddr", "port") if parts.get(name)}
        number = max((len(values) for values in lists.values()), default=1)
        if _can_be_right(lists, number) and "://" not in parts.get("dbname", ""):
            where = f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
            each = (
                {name: values[n if len(values) > 1 else 0] for name, values in lists.items()} for n in range(number)
            )
            return dsn, where, [Secret(make_dsn(**(parts | host))) for host in each]
        del parts, lists
    except psycopg2.Error:
        pass  # This error may hold the password. We raise ours below, so that it has no cause.
    raise ConfigurationError(
        f"PostgreSQL cannot read the connection string. Use one such as {_EXAMPLE}, with as many ports as hosts."
    )


def _can_be_right(lists: dict[str, list[str]], number: int) -> bool:
    # libpq takes one port for all hosts. Otherwise there must be a value for each.
    return (
        all(len(values) == number or (name == "port" and len(values) == 1) for name, values in lists.items())
        and all(is_host(value) for name in ("host", "hostaddr") for value in lists.get(name, ()))
        and all(is_host("", value) for value in lists.get("port", ()))
    )
