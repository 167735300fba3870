"""What the store needs of a Redis, checked: its configuration, and that it throws nothing away."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import redis
from redis.cluster import RedisCluster
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from ..core.errors import ConfigurationError
from .client import NO_CONFIGURATION, Client


class Policy(NamedTuple):
    """What Redis does when its memory is full: its maxmemory-policy, and whether it may throw keys away."""

    name: str
    evicts: bool


def read_policy(client: Client) -> Policy:
    """Read Redis's maxmemory-policy. If Redis does not tell it, it is "unknown".

    We ask INFO: the least rights have no CONFIG, and hosted servers often forbid it. A policy that evicts only keys
    with an expiry is no better for us: all tombstones have one, and volatile-ttl throws them away first.
    """
    primaries: Any = {} if isinstance(client, redis.Redis) else {"target_nodes": RedisCluster.PRIMARIES}
    try:
        answer: Any = client.info("memory", **primaries)
    except ResponseError:  # This user may not ask, or a proxy does not know the command.
        return Policy("unknown", False)
    nodes = list(answer.values()) if answer and all(isinstance(each, Mapping) for each in answer.values()) else [answer]
    policies = [
        Policy(name, name != "noeviction" and int(node.get("maxmemory") or 0) > 0)
        for node in nodes
        if (name := node.get("maxmemory_policy"))
    ]
    return max(policies, key=lambda policy: policy.evicts, default=Policy("unknown", False))


def names_a_database(config: object) -> bool:
    """Return whether this is a URL with a name where the number of the database belongs. redis-py would take 0."""
    try:
        scheme, _, path, _, _ = urlsplit(config) if isinstance(config, str) else ("", "", "", "", "")
    except ValueError:
        return False
    number = unquote(path).replace("/", "")
    return scheme in ("redis", "rediss") and bool(number) and not number.isdecimal()


def refuse_a_wrong_configuration(client: Client) -> None:
    """Check the configuration, only at the start. If the password changes later, PostgreSQL takes over.

    Raises:
        ConfigurationError: Redis refuses it.
    """
    try:
        client.ping()
        return
    except (ValueError, TypeError):  # redis-py checks some options, such as the port, only when it connects.
        raise ConfigurationError(NO_CONFIGURATION) from None
    except (AuthenticationError, NoPermissionError):
        wrong = "the user or the password"
    except ResponseError as error:
        if "DB index" not in str(error):
            raise
        wrong = "the number of its database (db), which this server does not have"
    except RedisConnectionError as error:
        if not isinstance(error.__context__, ssl.SSLError):
            raise
        expired = "certificate has expired" in str(error.__context__)
        wrong = "the server's certificate, which has expired" if expired else "TLS (the certificate or its authority)"
    # We raise out here, so that our error has no cause: redis-py's frames hold the password.
    raise ConfigurationError(f"The connection to Redis failed because of {wrong}. Check redis_config.")
