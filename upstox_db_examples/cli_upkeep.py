"""The commands of `upstox-db` that maintain a store: init, cleanup, rotate-keys."""

from __future__ import annotations

from typing import Any, cast

import click

from .cli_common import OpenStore, command, many


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
    if runtime_role is not None:  # An empty name, from a variable that is not set, is an error.
        cast(Any, opened).init_database(runtime_role)
    told = f"{opened!r} is up to date" + (f", and {runtime_role} may store and read tokens." if runtime_role else ".")
    store.report(told, {"store": repr(opened), "runtime_role": runtime_role})


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
    opened = store()
    erased = opened.cleanup_expired_tokens()
    deleted = None if audit_days is None else opened.cleanup_old_audit_entries(audit_days)
    told = f"Erased {many(erased, 'dead token')}."
    if deleted is not None:
        told += f"\nDeleted {many(deleted, 'audit entry', 'audit entries')}."
    store.report(told, {"erased_tokens": erased, "deleted_audit_entries": deleted})


@command("rotate-keys", "upstox-db rotate-keys")
@click.pass_obj
def rotate_keys(store: OpenStore) -> None:
    """Re-encrypt tokens that are not under the first key.

    The keys come from UPSTOX_DB_KEYS or the key file. Give every program the new key after the old ones, then move it
    before them, then run this. You can remove a key that is no longer in use once no backup needs it.
    """
    opened = store()
    again, keys = opened.rotate_keys(), opened.keys_in_use()
    store.report(
        f"Re-encrypted {many(again, 'token')}. Keys in use: {', '.join(keys)}",
        {"reencrypted_tokens": again, "keys_in_use": keys},
    )
