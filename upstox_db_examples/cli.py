"""`upstox-db`: the stores from the shell, for scripts, cron and people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import click

import upstox_db_examples as package

from .errors import (
    ConfigurationError,
    InvalidInput,
    LoginInterrupted,
    LoginLimited,
    LoginSuperseded,
    StorageError,
    StoreUnavailable,
    TokenNotStored,
)
from .login import Accounts
from .storage import TokenStorage
from .token import TokenResult

DONE, TRY_AGAIN, USAGE, FIX_FIRST = 0, 1, 2, 3
PASSING = (StoreUnavailable, LoginInterrupted, LoginLimited, LoginSuperseded, TokenNotStored)

STORES = """\b
  upstox.db, sqlite:///path                  SQLite
  postgresql://user:password@host/name       PostgreSQL
  mongodb://user:password@host/?...#name     MongoDB; the database's name is last
  "redis://... postgresql://..."             the hybrid: its two, in one text
"""


class Command(click.Group):
    """Errors of ours end the command with one line and a code that tells whether to try again."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StorageError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            ctx.exit(TRY_AGAIN if isinstance(error, PASSING) else FIX_FIRST)
        except ModuleNotFoundError as error:
            click.echo(str(error), err=True)
            ctx.exit(FIX_FIRST)

    def list_commands(self, _: click.Context) -> list[str]:
        """In the order in which they are needed, not by the alphabet."""
        return list(self.commands)


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

It ends with 0 when it is done; with 1 if it may be tried again, as when a store or Upstox does not answer; with 2 for
a wrong command; with 3 if something has to be put right first, such as credentials or a name.""",
)
@click.option(
    "--store",
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
    help="The credentials of several users: TOML, a table for each user's id, mode 0600. Else those in UPSTOX_*.",
)
@click.option("--verbose", "-v", is_flag=True, help="Say on stderr what is done, with the time.")
@click.version_option(package_name="upstox-db-examples")
@click.pass_context
def main(ctx: click.Context, store: str, accounts: str | None, verbose: bool) -> None:
    """Keep Upstox access tokens in a database: log in, read, look after them."""
    # A warning is what no error says, such as that a new key was made; so cron mails it.
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s")
    logging.getLogger(package.__name__).setLevel(logging.INFO if verbose else logging.WARNING)
    options = {"login": Accounts.from_file(accounts)} if accounts else {}
    ctx.obj = lambda new=False: ctx.with_resource(opened(store, new=new, **options))


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """A subcommand whose help ends with examples."""
    return main.command(name, epilog="\n".join(["\b", "Examples", *(f"  {example}" for example in examples)]))


def limit(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--limit", metavar="N", default=default, show_default=True, help="How many at the most.")


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@command("token", "TOKEN=$(upstox-db token) || exit", "upstox-db token AB1234 --masked")
@click.argument("user", required=False)
@click.option("--masked", is_flag=True, help="Print whose it is and when it dies, and not the token.")
@click.pass_obj
def token(store: Any, user: str | None, masked: bool) -> None:
    """Print the living token; log in if there is none.

    Nothing else is printed, so that a script can take it. USER is an Upstox user id such as AB1234; without it, the
    account of the credentials.
    """
    try:
        result = store(new=True).get_or_create_token(user)
        click.echo(shown(result) if masked else result["token"])
    except TokenNotStored as error:
        if masked:
            raise
        click.echo(error.token.reveal())  # It lives, and nobody else has it.
        click.echo(f"Not stored, so the next call logs in again: {error.__cause__}", err=True)


@command("login", "upstox-db login --keep", "upstox-db --accounts accounts.toml login AB1234")
@click.argument("user", required=False)
@click.option("--keep", is_flag=True, help="Do not log in if there is a living token.")
@click.pass_obj
def login(store: Any, user: str | None, keep: bool) -> None:
    """Log in and keep the new token.

    The one before dies by that. USER is an Upstox user id such as AB1234; without it, the account of the credentials.
    """
    open_store = store(new=True)
    click.echo(shown(open_store.get_or_create_token(user) if keep else open_store.store_token(user)))


@command("status", "upstox-db status", "upstox-db status --json")
@as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Say of each database whether it answers.

    It ends with 1 if one does not.
    """
    found = ctx.obj().get_storage_status()
    click.echo(json.dumps(found) if as_json else "\n".join(f"{name}: {value}" for name, value in found.items()))
    if any(str(value).startswith("error") for value in found.values()):
        ctx.exit(TRY_AGAIN)


@command("history", "upstox-db history AB1234", "upstox-db history AB1234 --limit 100 --json")
@click.argument("user")
@limit(10)
@as_json
@click.pass_obj
def history(store: Any, user: str, limit: int, as_json: bool) -> None:
    """List a user's tokens, the newest first.

    When each was made and when it dies, whether it is active, how often it was used; never the token itself. USER is
    an Upstox user id such as AB1234.
    """
    table(store().get_token_history(user, limit), ("created_at", "expires_at", "is_active", "usage_count"), as_json)


@command("audit", "upstox-db audit AB1234", "upstox-db audit AB1234 --limit 1000 --json")
@click.argument("user")
@limit(50)
@as_json
@click.pass_obj
def audit(store: Any, user: str, limit: int, as_json: bool) -> None:
    """List what was done to a user's tokens.

    When, what and by whom, the newest first. USER is an Upstox user id such as AB1234.
    """
    table(store().get_audit_trail(user, limit), ("performed_at", "action", "actor", "token_id"), as_json)


@command("cleanup", "upstox-db cleanup", "upstox-db cleanup --audit-days 365")
@click.option(
    "--audit-days", metavar="N", type=click.IntRange(0, 36_500), help="Delete audit entries older than N days, too."
)
@click.pass_obj
def cleanup(store: Any, audit_days: int | None) -> None:
    """Erase the ciphertexts of dead tokens.

    Their history stays, and so does the audit trail without --audit-days.
    """
    open_store = store()
    click.echo(f"Erased: {many(open_store.cleanup_expired_tokens(), 'dead token')}.")
    if audit_days is not None:
        click.echo(f"Deleted: {entries(open_store.cleanup_old_audit_entries(audit_days))}.")


@command("rotate-keys", "upstox-db rotate-keys")
@click.pass_obj
def rotate_keys(store: Any) -> None:
    """Encrypt again what is not under the first key.

    The keys are those of UPSTOX_DB_KEYS, or of the key file. Give every program a new key behind the old ones, then in
    front of them, then run this. A key that is no longer in use can go when no backup needs it.
    """
    open_store = store()
    again = many(open_store.rotate_keys(), "token")
    click.echo(f"Encrypted again: {again}. In use: {', '.join(open_store.keys_in_use())}")


@command("backup", "upstox-db backup upstox.export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def backup(store: Any, file: str) -> None:
    """Write all that is kept into an encrypted FILE.

    It needs the store's key to be read, so keep that somewhere else. An earlier backup of that name is replaced when
    the new one is whole, and never by one without tokens.
    """
    open_store = store()
    if Path(file).exists() and not any(map(open_store._tokens_of, open_store._users())):
        raise InvalidInput(
            f"{file} is there already, and this store has no token to put in its place. Check --store and "
            "UPSTOX_DB_STORE, or name another file."
        )
    click.echo(counted(package.export_tokens(open_store, file, progress=sys.stderr.isatty())))


@command("restore", "upstox-db --store restored.db restore upstox.export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def restore(store: Any, file: str) -> None:
    """Bring the FILE of a backup into the store.

    What is there already stays. It needs the key that the backup was made with, and can be run again.
    """
    click.echo(counted(package.import_tokens(store(new=True), file, progress=sys.stderr.isatty())))


@command(
    "migrate",
    "upstox-db --store upstox.db migrate moved.db",
    "UPSTOX_DB_TARGET=postgresql://user:password@host/name upstox-db migrate",
)
@click.argument("target", envvar="UPSTOX_DB_TARGET")
@click.pass_context
def migrate(ctx: click.Context, target: str) -> None:
    """Bring all that is kept into another store.

    TARGET is an address as --store takes it, or is in UPSTOX_DB_TARGET. Stop the programs that use the store first. At
    the end the two are compared.
    """
    source, other = ctx.obj(), ctx.with_resource(opened(target, new=True))
    click.echo(counted(package.migrate(source, other, progress=sys.stderr.isatty())))


def opened(where: str, *, new: bool = False, **options: Any) -> TokenStorage:
    """The store of this address.

    Args:
        new: make a SQLite file that is not there. Else a mistyped name would be a healthy store without tokens.

    Raises:
        InvalidInput: there is no store of that kind.
        ConfigurationError: there is no such file.
    """
    first, _, second = where.partition(" ")
    scheme = urlsplit(first).scheme
    if scheme in ("redis", "rediss") and second.startswith("postgres"):
        return package.HybridUpstoxStorage(first, second.strip(), **options)
    if scheme in ("postgresql", "postgres"):
        return package.PostgreSQLUpstoxStorage(where, **options)
    if scheme in ("mongodb", "mongodb+srv"):
        parts = urlsplit(where)
        return package.MongoUpstoxStorage(
            urlunsplit(parts._replace(fragment="")), parts.fragment or "upstox_db", **options
        )
    if "://" not in where or scheme == "sqlite":
        file = where.removeprefix("sqlite:///")
        try:
            if not new:
                Path(file).stat()
        except OSError as error:
            raise ConfigurationError(
                f"{file} cannot be opened: {error.strerror}. Check --store and UPSTOX_DB_STORE. A new store is made by "
                "upstox-db token, login or restore."
            ) from error
        return package.SQLiteUpstoxStorage(file, **options)
    raise InvalidInput(f"There is no store for {scheme}://. See upstox-db --help.")


def shown(result: TokenResult) -> str:
    return f"{result['user_id']}: {result._token}, until {result['expires_at']}"


def counted(counts: package.Counts) -> str:
    return f"{many(counts.users, 'user')}, {many(counts.tokens, 'token')}, {entries(counts.audit_entries)}."


def entries(number: int) -> str:
    return many(number, "audit entry", "audit entries")


def many(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows))
        return
    lines = [columns, *(tuple("" if row[name] is None else str(row[name]) for name in columns) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
