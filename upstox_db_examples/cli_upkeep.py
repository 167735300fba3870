"""The commands of `upstox-db` that inspect and maintain a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import click

import upstox_db_examples as package

from .cli import TRY_AGAIN, ArgumentOrVariable, OpenStore, command
from .cli_output import on_terminal, print_result, report
from .core.environment import expand_home
from .core.errors import InvalidInput


def limit(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--limit", metavar="N", default=default, show_default=True, help="How many to show at most.")


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@command("init", "upstox-db init", "upstox-db init --runtime-role upstox_app")
@click.option(
    "--runtime-role",
    metavar="ROLE",
    help="Let this role store and read tokens, and nothing more. PostgreSQL must have the role; MongoDB makes it.",
)
@click.pass_obj
def init(store: OpenStore, runtime_role: str | None) -> None:
    """Create the tables, or update older ones.

    Run this as their owner. A program with a runtime role cannot do it itself.
    """
    opened = store(new=True)
    if runtime_role:
        cast(Any, opened).init_database(runtime_role)
    report(f"{opened!r} is up to date" + (f", and {runtime_role} may store and read tokens." if runtime_role else "."))


@command("status", "upstox-db status", "upstox-db status --json")
@as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show whether each database answers.

    The exit code is 1 if one does not.
    """
    found = ctx.obj().get_storage_status()
    print_result(json.dumps(found) if as_json else "\n".join(f"{name}: {value}" for name, value in found.items()))
    if any(str(value).startswith("error") for value in found.values()):
        ctx.exit(TRY_AGAIN)


@command("history", "upstox-db history AB1234", "upstox-db history AB1234 --limit 100 --json")
@click.argument("user")
@limit(10)
@as_json
@click.pass_obj
def history(store: OpenStore, user: str, limit: int, as_json: bool) -> None:
    """List a user's tokens, newest first.

    It shows when each token was made and when it expires, whether it is active and how often it was used, but never the
    token itself. USER is an Upstox user id such as AB1234.
    """
    table(store().get_token_history(user, limit), ("created_at", "expires_at", "is_active", "usage_count"), as_json)


@command("audit", "upstox-db audit AB1234", "upstox-db audit AB1234 --limit 1000 --json")
@click.argument("user")
@limit(50)
@as_json
@click.pass_obj
def audit(store: OpenStore, user: str, limit: int, as_json: bool) -> None:
    """List what was done to a user's tokens.

    It shows when, what and by whom, newest first. USER is an Upstox user id such as AB1234.
    """
    table(store().get_audit_trail(user, limit), ("performed_at", "action", "actor", "token_id"), as_json)


@command("cleanup", "upstox-db cleanup", "upstox-db cleanup --audit-days 365")
@click.option(
    "--audit-days",
    metavar="N",
    type=click.IntRange(0, 36_500),
    help="Also delete audit entries older than N days.",
)
@click.pass_obj
def cleanup(store: OpenStore, audit_days: int | None) -> None:
    """Erase the ciphertexts of dead tokens.

    Their history stays, and so does the audit trail unless you pass --audit-days.
    """
    open_store = store()
    report(f"Erased {many(open_store.cleanup_expired_tokens(), 'dead token')}.")
    if audit_days is not None:
        report(f"Deleted {count_entries(open_store.cleanup_old_audit_entries(audit_days))}.")


@command("rotate-keys", "upstox-db rotate-keys")
@click.pass_obj
def rotate_keys(store: OpenStore) -> None:
    """Re-encrypt tokens that are not under the first key.

    The keys come from UPSTOX_DB_KEYS or the key file. Give every program the new key after the old ones, then move it
    before them, then run this. You can remove a key that is no longer in use once no backup needs it.
    """
    open_store = store()
    again = many(open_store.rotate_keys(), "token")
    report(f"Re-encrypted {again}. Keys in use: {', '.join(open_store.keys_in_use())}")


@command("backup", "upstox-db backup upstox.export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def backup(store: OpenStore, file: str) -> None:
    """Write everything in the store to an encrypted FILE.

    You need the store's key to read it, so keep the key somewhere else. An earlier backup with that name is replaced
    once the new one is complete, but never by a backup without tokens.
    """
    open_store = store()
    if expand_home(file).exists() and not any(map(open_store.backend.read_tokens, open_store.backend.list_users())):
        raise InvalidInput(
            f"{file} already exists, and this store has no token to replace it with. Check --store and "
            "UPSTOX_DB_STORE, or choose another file."
        )
    report(describe_counts(package.export_tokens(open_store, file, progress=on_terminal())))


@command("restore", "upstox-db --store restored.db restore upstox.export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def restore(store: OpenStore, file: str) -> None:
    """Import a backup FILE into the store.

    Existing data stays. This needs the key that the backup was made with, and it can be run again.
    """
    report(describe_counts(package.import_tokens(store(new=True), file, progress=on_terminal())))


@command(
    "migrate",
    "upstox-db --store upstox.db migrate moved.db",
    "UPSTOX_DB_TARGET=postgresql://user:password@host/name upstox-db migrate",
)
@click.argument("target", cls=ArgumentOrVariable, envvar="UPSTOX_DB_TARGET")
@click.pass_context
def migrate(ctx: click.Context, target: str) -> None:
    """Copy everything into another store.

    TARGET is an address as for --store; the default is UPSTOX_DB_TARGET. Stop the programs that use the store first. At
    the end the two stores are compared.
    """
    source, other = ctx.obj(), ctx.with_resource(package.open_store(target))
    report(describe_counts(package.migrate(source, other, progress=on_terminal())))


def describe_counts(counts: package.Counts) -> str:
    return f"{many(counts.users, 'user')}, {many(counts.tokens, 'token')}, {count_entries(counts.audit_entries)}."


def count_entries(number: int) -> str:
    return many(number, "audit entry", "audit entries")


def many(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        print_result(json.dumps(rows))
        return
    lines = [columns, *(tuple("" if row[name] is None else str(row[name]) for name in columns) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    shown = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    print_result("\n".join(shown))
