"""The options that every store takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypedDict

from .checks import require_positive
from .cipher import KeySource
from .context import Context
from .login import Login, SdkLogin
from .token import ExpiryPolicy


class Options(TypedDict, total=False):
    """The keyword arguments that every store takes.

    Attributes:
        login: the login; `SdkLogin()` by default. It is called only when a login is due.
        keys: a `KeyRing`, or a callable that returns one (from a vault or a KMS); `KeyRing.default()` by default, which
            makes no new key for a store that has tokens already.
        clock: returns the current time as an aware datetime; tests and notebooks set it.
        actor: the name in the audit trail; `user@host:pid` by default.
        policy: decides when tokens expire.
        login_wait: how long to wait for another caller's login of the same user, in seconds; 60 by default.
        renew_pause: how long `renew_token` waits before it logs the same user in again, in seconds; 600 by default.
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
        InvalidInput: a time is not positive.
    """

    def __init__(self, store: str, options: Options) -> None:
        if unknown := sorted(set(options) - Options.__annotations__.keys()):
            raise TypeError(f"{store} does not take {', '.join(unknown)}.")
        self.login: Login = options.get("login") or SdkLogin()
        self.keys: KeySource | None = options.get("keys")
        self.policy = options.get("policy") or ExpiryPolicy()
        self.renew_pause = options.get("renew_pause", 600.0)
        self.create = options.get("create", True)
        login_wait = options.get("login_wait", 60.0)
        require_positive("login_wait", login_wait)
        require_positive("renew_pause", self.renew_pause)
        self.context = Context(options.get("clock"), options.get("actor"), login_wait)
