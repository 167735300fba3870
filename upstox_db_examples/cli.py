"""`upstox-db`: the stores from the shell, for scripts, cron and people."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import click

import upstox_db_examples as package

from .cli_output import prepare_streams, print_error
from .core.environment import read_variable
from .core.errors import (
    DatabaseMissing,
    LoginInterrupted,
    LoginLimited,
    LoginSuperseded,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
)
from .core.login import Accounts, SdkLogin, TotpLogin
from .core.store import TokenStorage
from .core.token import TokenResult
from .patterns import PATTERNS

DONE, TRY_AGAIN, USAGE, FIX_FIRST = 0, 1, 2, 3
PASSING = (StoreUnavailable, LoginInterrupted, LoginLimited, LoginSuperseded, TokenNotStored)

STORES = "\b\n" + "".join(f"  {each.address:<42} {each.what}\n" for each in PATTERNS.values())


class Command(click.Group):
    """Turn our own errors into one line and an exit code that tells whether to try again."""

    def invoke(self, ctx: click.Context) -> Any:
        prepare_streams()
        try:
            return super().invoke(ctx)
        except StorageError as error:
            print_error(f"{type(error).__name__}: {error}")
            ctx.exit(TRY_AGAIN if isinstance(error, PASSING) else FIX_FIRST)
        except ModuleNotFoundError as error:
            print_error(str(error))
            ctx.exit(FIX_FIRST)

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the commands in the order in which they are needed, not alphabetically."""
        return list(self.commands)


class FromEnvironment(click.Parameter):
    """A parameter whose environment variable is cleaned, as all others are."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:  # noqa: ARG002  # click's signature
        return read_variable(str(self.envvar), any_character=True) or None


class OptionOrVariable(FromEnvironment, click.Option):
    """An option."""


class ArgumentOrVariable(FromEnvironment, click.Argument):
    """An argument."""


@click.group(
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"""STORE is one of

{STORES}
Put an address with a password into UPSTOX_DB_STORE: all users of a machine can read command lines.

\b
Examples
  TOKEN=$(upstox-db token) || exit
  upstox-db --store upstox.db status
  45 8 * * 1-5  . $HOME/upstox.env; upstox-db login --keep      (in a crontab)

The exit code is 0 for success, 1 if you can try again (a store or Upstox did not answer), 2 for a wrong command, and 3
if you have to fix something first, such as credentials or a name.""",
)
@click.option(
    "--store",
    cls=OptionOrVariable,
    metavar="STORE",
    envvar="UPSTOX_DB_STORE",
    show_envvar=True,
    default="upstox.db",
    show_default=True,
    help="Where tokens are kept.",
)
@click.option(
    "--accounts",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="A TOML file (mode 0600) with a table of credentials for each user id. The default is UPSTOX_*, for one user.",
)
@click.option(
    "--one-call",
    cls=OptionOrVariable,
    is_flag=True,
    envvar="UPSTOX_DB_ONE_CALL",
    show_envvar=True,
    help="Use Upstox's one-call login. It needs only UPSTOX_CLIENT_ID, UPSTOX_PIN_CODE and UPSTOX_TOTP_SECRET.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log each step to stderr, with the time.")
@click.version_option(package_name="upstox-db-examples")
@click.pass_context
def main(ctx: click.Context, store: str, accounts: str | None, one_call: bool, verbose: bool) -> None:
    """Keep Upstox access tokens in a database: log in, read, look after them."""
    # Warnings report what no error says, such as a new key. They are printed, so that cron mails them.
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s")
    logging.getLogger(package.__name__).setLevel(logging.INFO if verbose else logging.WARNING)
    login = Accounts.from_file(accounts) if accounts else TotpLogin() if one_call else SdkLogin()
    ctx.obj = OpenStore(ctx, store, login)


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """A subcommand whose help ends with examples."""
    return main.command(name, epilog="\n".join(["\b", "Examples", *(f"  {example}" for example in examples)]))


class OpenStore:
    """Opens the store of this command.

    Attributes:
        login: the login that the store uses.
    """

    def __init__(self, ctx: click.Context, where: str, login: Accounts | SdkLogin | TotpLogin) -> None:
        self._ctx, self._where, self.login = ctx, where, login

    def __call__(self, *, new: bool = False) -> TokenStorage:
        """Open the store. With `new`, make what is missing.

        Raises:
            DatabaseMissing: there is no such file, or the server has no tables.
        """
        try:
            return self._ctx.with_resource(package.open_store(self._where, create=new, login=self.login))
        except DatabaseMissing as error:
            error.args = (
                f"{error} Check --store and UPSTOX_DB_STORE. To make a new store, run upstox-db init, token, "
                "login or restore.",
            )
            raise


def describe(result: TokenResult) -> str:
    return f"{result['user_id']}: {result.masked_token}, until {result['expires_at']}"


# Each module adds its commands to `main`, in the order in which they are needed.
from . import cli_logins, cli_watch, cli_upkeep  # noqa: E402, F401, I001
from .cli_copy import copy  # noqa: E402, F401
