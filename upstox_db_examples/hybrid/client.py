"""A client of Redis from what the caller gives, and the rights that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import RedisError
from redis.retry import Retry

from ..core.addresses import read_url
from ..core.token import Secret

Client = redis.Redis | RedisCluster
Config = Mapping[str, Any] | str | Client
NO_CONFIGURATION = (
    "redis_config must be keyword arguments of redis.Redis, a URL such as redis://:password@host:6379/0, or a redis-py "
    "client."
)


def runtime_acl(prefix: str = "upstox", *, cluster: bool = False) -> list[str]:
    """Return the rules for a Redis user with the least rights that the store needs, on the store's own keys.

    Run `redis.execute_command("ACL", "SETUSER", "upstox_app", *runtime_acl(), "on", ">password")`, or put the same in
    an ACL file.
    """
    commands = (
        "ping get set del incr pttl pexpire time xadd xlen xrange xdel evalsha script|load wait info hello select"
    )
    if cluster:
        commands += " cluster|slots cluster|shards cluster|nodes command readonly"
    return ["reset", f"~{{{prefix}}}:*", "-@all", *(f"+{command}" for command in commands.split())]


def client_of(config: Config, timeout: float) -> tuple[Client | None, bool]:
    """Make a client from keyword arguments of `redis.Redis` or from a URL, or return the given client of redis-py.

    Args:
        timeout: seconds for each answer. A given client has its own.

    Returns:
        the client, or None if the configuration is invalid; and whether it was made here. (This does not raise, because
        the traceback would show the configuration and its password.)
    """
    if isinstance(config, redis.Redis | RedisCluster):
        return config, False
    # Without these, we take seconds to notice a dead server, longer for a stalled one, and may count a use twice.
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "max_connections": 10_000,  # If threads outnumber this, it looks like an outage.
    }
    if isinstance(config, str):
        url = Secret(config)
        del config  # A traceback that prints local variables must not show its password.
        url = read_url(url, ("redis", "rediss", "unix"), "The address of Redis", "redis://:password@host:6379/0")
        try:
            return redis.Redis.from_url(url.reveal(), **options), True
        except (ValueError, TypeError, RedisError):
            return None, False
    try:
        return redis.Redis(**{**options, **config}), True
    except (ValueError, TypeError, RedisError):
        return None, False
