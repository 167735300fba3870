"""What all commands of `upstox-db` share: the global options, the store, exit codes, and how results are shown."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .cli_output import print_error, print_result, report
from .core.environment import read_variable
from .core.errors import (
    ConfigurationError,
    DatabaseMissing,
    InvalidInput,
    LoginInterrupted,
    LoginLimited,
    LoginSuperseded,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
)
from .core.token import IST

if TYPE_CHECKING:  # A command imports only what it needs, because a script may call it before each request.
    from pathlib import Path

    from .core.login import Accounts, SdkLogin, TotpLogin
    from .core.store import TokenStorage
    from .core.token import TokenResult

DONE, TRY_AGAIN, USAGE, FIX_FIRST = 0, 1, 2, 3


class NoLivingToken(StorageError):
    """The store has no working token of this user, and a login was not allowed. Try again after the next login."""


PASSING = (StoreUnavailable, LoginInterrupted, LoginLimited, LoginSuperseded, TokenNotStored, NoLivingToken)


def exit_code(error: Exception) -> int:
    """Return 1 if the same call may work later, and 3 if somebody has to fix something first."""
    return TRY_AGAIN if isinstance(error, PASSING) else FIX_FIRST


class OpenStore:
    """Opens the store of this call, and prints in the way that the global options ask for.

    Attributes:
        address: the store's address, which may hold a password.
        accounts, one_call: which login to use.
        as_json, utc, verbose: how to print.
    """

    address = "upstox.db"
    accounts: str | None = None
    one_call = as_json = utc = verbose = False

    @functools.cached_property
    def login(self) -> Accounts | SdkLogin | TotpLogin:
        """The login that the store uses.

        Raises:
            ConfigurationError, LoginRefused: the file of accounts cannot be used.
        """
        from .core.login import Accounts, SdkLogin, TotpLogin

        return Accounts.from_file(self.accounts) if self.accounts else TotpLogin() if self.one_call else SdkLogin()

    def __call__(self, *, new: bool = False) -> TokenStorage:
        """Open the store; it is closed when the command ends. With `new`, make what is missing.

        Raises:
            DatabaseMissing: there is no such file, or the server has no tables.
        """
        from .patterns import open_store

        try:
            opened = open_store(self.address, create=new, login=self.login)
        except DatabaseMissing as error:
            error.args = (
                f"{error} Check --store and UPSTOX_DB_STORE. To make a new store, run upstox-db init, token, "
                "login or restore.",
            )
            raise
        return click.get_current_context().with_resource(opened)

    def result(self, text: str, data: object) -> None:
        """Print what the command was called for, as text or as JSON. See `print_result`."""
        print_result(json.dumps(data) if self.as_json else text)

    def report(self, text: str, data: object) -> None:
        """Print what the command has done, as text or as JSON. See `cli_output.report`."""
        report(json.dumps(data) if self.as_json else text)

    def time(self, moment: datetime | str | None) -> str:
        """Return a time as people read it: in India time, or in UTC with --utc."""
        if moment is None:
            return ""
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        zone, name = (UTC, "UTC") if self.utc else (IST, "IST")
        return f"{moment.astimezone(zone):%Y-%m-%d %H:%M:%S} {name}"

    def describe(self, result: TokenResult) -> str:
        """Return whose token this is and how long it lives, but not the token."""
        left = datetime.fromisoformat(result["expires_at"]) - datetime.now(UTC)
        until = f"{self.time(result['expires_at'])} ({duration(left.total_seconds())})"
        return f"{result['user_id']}: {result.masked_token}, until {until}"


def masked(result: TokenResult) -> dict[str, Any]:
    """Return the fields of the result for JSON, with the token masked."""
    return {**{name: result[name] for name in result if name != "token"}, "token": str(result.masked_token)}


def duration(seconds: float) -> str:
    """Return a length of time as people read it, such as "6 h 54 min"."""
    minutes = int(max(0.0, seconds)) // 60
    if minutes < 1:
        return f"{max(0.0, seconds):.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def many(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Lay these rows out below their column names."""
    lines = [list(columns), *([row[name] for name in columns] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def list_users(opened: TokenStorage) -> list[str]:
    """Return every user of the store, in order."""
    return sorted(user for user in opened.backend.list_users() if user)


def stored_spelling(opened: TokenStorage, user: str) -> str | None:
    """Return the user id as the store spells it. Upstox writes ids in upper case, and people type them in lower case.

    Returns:
        None if the store has never seen this user.
    """
    from .core.checks import require_user_id
    from .core.users import spellings

    users = list_users(opened)
    return next((each for each in spellings(require_user_id(user)) if each in users), None)


def known_user(opened: TokenStorage, user: str) -> str:
    """Return the user id as the store spells it.

    Raises:
        InvalidInput: the store has never seen this user.
    """
    if known := stored_spelling(opened, user):
        return known
    raise InvalidInput(f"This store does not know {user}. {name_users(list_users(opened))}")


def user_or_only_one(store: OpenStore, opened: TokenStorage, user: str | None) -> str:
    """Return this user as the store spells it. If none is named, take the only one, or the one of UPSTOX_USER_ID.

    Raises:
        UsageError: none is named, and the store has several.
        InvalidInput: the store does not know this user, or has none.
    """
    if user:
        return known_user(opened, user)
    users = list_users(opened)
    own = store.login.user_id if len(users) > 1 else None
    if len(users) == 1 or own in users:
        return own or users[0]
    if users:
        raise click.UsageError(f"Name a user. {name_users(users)}")
    raise InvalidInput(name_users(users))


def name_users(users: list[str]) -> str:
    """Say which users the store has."""
    more = f", and {len(users) - 10} more: see upstox-db users" if len(users) > 10 else ""
    return f"Its users: {', '.join(users[:10])}{more}." if users else "This store has no users yet."


def exists(path: Path) -> bool:
    """Return whether something is there.

    Raises:
        ConfigurationError: the path is too long, or its folder cannot be read.
    """
    try:
        return path.exists()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error


class FromEnvironment(click.Parameter):
    """A parameter whose environment variable is cleaned, as all others are."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:  # noqa: ARG002  # click's signature
        return (read_variable(str(self.envvar), any_character=True) or None) if self.envvar else None


class OptionOrVariable(FromEnvironment, click.Option):
    """An option."""


class ArgumentOrVariable(FromEnvironment, click.Argument):
    """An argument."""


def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep the value of a global option. After the command, only what the caller wrote there counts."""
    store = ctx.ensure_object(OpenStore)
    if ctx.parent is None or ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE:
        setattr(store, str(param.name), value)
    if ctx.parent is not None and param.name == "verbose" and value:
        log(ctx, verbose=True)


def global_option(*names: str, **options: Any) -> click.Option:
    """An option that may be written before or after the command."""
    return OptionOrVariable(names, expose_value=False, callback=keep, **options)


GLOBAL: list[click.Parameter] = [
    global_option(
        "address",
        "--store",
        metavar="STORE",
        envvar="UPSTOX_DB_STORE",
        show_envvar=True,
        default="upstox.db",
        show_default=True,
        help="Where tokens are kept.",
    ),
    global_option(
        "--accounts",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help="A TOML file (mode 0600) with a table of credentials for each user id. The default is UPSTOX_*, for one "
        "user.",
    ),
    global_option(
        "--one-call",
        is_flag=True,
        envvar="UPSTOX_DB_ONE_CALL",
        show_envvar=True,
        help="Use Upstox's one-call login. It needs only UPSTOX_CLIENT_ID, UPSTOX_PIN_CODE and UPSTOX_TOTP_SECRET.",
    ),
    global_option("as_json", "--json", is_flag=True, help="Print JSON, for programs. Its times are always in UTC."),
    global_option("--utc", is_flag=True, help="Print times in UTC and not in India time."),
    global_option("--verbose", "-v", is_flag=True, help="Log each step to stderr, with the time."),
]


class Subcommand(click.Command):
    """A command that also takes the global options."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return its own parameters and the global options."""
        return [*super().get_params(ctx), *GLOBAL]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Explain its own options, and only name the global ones."""
        options = (each for each in super().get_params(ctx) if isinstance(each, click.Option))
        own = [record for each in options if (record := each.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(own)
        with formatter.section("Global options"):
            names = ", ".join(each.opts[0] for each in GLOBAL)
            formatter.write_text(f"{names}: see upstox-db --help. They may come before or after the command.")


def command(name: str, *examples: str) -> Callable[[Callable[..., Any]], Subcommand]:
    """A subcommand whose help ends with examples. cli.py says which module has it."""
    epilog = "\n".join(["\b", "Examples", *(f"  {example}" for example in examples)])
    return click.command(name, cls=Subcommand, epilog=epilog)


class OnStandardError(logging.Handler):
    """Prints log lines on standard error, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print_error(self.format(record))


def log(ctx: click.Context, *, verbose: bool) -> None:
    """Print warnings, which report what no error says, such as a new key: cron mails them. If verbose, print more."""
    logger = logging.getLogger(__package__)
    for each in [each for each in logger.handlers if isinstance(each, OnStandardError)]:
        logger.removeHandler(each)
    handler = OnStandardError()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    ctx.find_root().call_on_close(lambda: logger.removeHandler(handler))
