"""The options that every store takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypedDict

from .checks import require_actor, require_function, require_positive
from .cipher import KeyRing, KeySource
from .context import Context
from .errors import InvalidInput
from .login import Login, SdkLogin
from .token import ExpiryPolicy


class Options(TypedDict, total=False):
    """The keyword arguments that every store takes.

    Attributes:
        login: the login; `SdkLogin()` by default. It is called only when a login is due.
        keys: a `KeyRing`, or a callable that returns one (from a vault or a KMS); `KeyRing.default()` by default, which
            makes no new key while the store has working tokens.
        clock: returns the current time as an aware datetime; tests and notebooks set it.
        actor: the name in the audit trail, at most 200 characters; `user@host:pid` by default.
        policy: decides when tokens expire.
        login_wait: how long to wait for another caller's login of the same user, in seconds, at most a day; 60 by
            default.
        renew_pause: how long `renew_token` waits before it logs the same user in again, in seconds, at most a day; 600
            by default.
        create: make the tables (SQLite: the file too) if they are missing; True by default. With False, opening such a
            store raises `DatabaseMissing`, so that a mistyped name does not open an empty store.

    Example:
        >>> options: Options = {"actor": "morning job", "login_wait": 10.0}
        >>> with SQLiteUpstoxStorage("upstox.db", **options) as mine:
        ...     result = mine.get_or_create_token("AB1234")
        ...     mine.get_audit_trail("AB1234")[0]["actor"]
        'morning job'
    """

    login: Login
    keys: KeySource
    clock: Callable[[], datetime]
    actor: str
    policy: ExpiryPolicy
    login_wait: float
    renew_pause: float
    create: bool


class Settings:
    """The options of one store, checked, with the defaults filled in.

    Attributes:
        context: what the store's backend is told.
        login, keys, policy, renew_pause, create: see `Options`.

    Raises:
        TypeError: there is no such option.
        InvalidInput: an option is unusable. The database was not touched.
    """

    def __init__(self, store: str, options: Options) -> None:
        if unknown := sorted(set(options) - Options.__annotations__.keys()):
            raise TypeError(f"{store} does not take {', '.join(unknown)}.")
        self.keys = _take_keys(options)
        login, clock, actor = options.get("login"), options.get("clock"), options.get("actor")
        policy = options.get("policy")
        if login is not None:
            require_login(login)
        if clock is not None:
            require_function("clock", clock, "a function that returns the current time as an aware datetime")
        if actor is not None:
            require_actor(actor)
        if not isinstance(policy, ExpiryPolicy | None):
            raise InvalidInput("policy must be an ExpiryPolicy, such as ExpiryPolicy(margin=timedelta(minutes=2)).")
        self.login: Login = SdkLogin() if login is None else login
        self.policy = policy or ExpiryPolicy()
        self.renew_pause = options.get("renew_pause", 600.0)
        self.create = options.get("create", True)
        login_wait = options.get("login_wait", 60.0)
        require_positive("login_wait", login_wait)
        require_positive("renew_pause", self.renew_pause)
        self.context = Context(clock, actor, login_wait)


def require_login(login: object) -> None:
    """Check that this can be a store's login.

    Raises:
        InvalidInput: it cannot be called, or it is a class, such as `SdkLogin` without parentheses.
    """
    name = login.__name__ if isinstance(login, type) else "SdkLogin"
    require_function("login", login, f"login={name}()")


def _take_keys(options: Options) -> KeySource | None:
    """Take the keys out of the options, where a traceback that prints local variables would show raw ones.

    Returns:
        None for the default.

    Raises:
        InvalidInput: these are no keys. If the first use showed that, it would cost a login: the new token could not
            be stored.
    """
    keys = options.pop("keys", None)
    if not isinstance(keys, KeyRing | None):
        try:
            require_function("keys", keys, "keys=KeyRing(key), or a function that returns a KeyRing")
        except InvalidInput:
            del keys
            raise
    return keys
