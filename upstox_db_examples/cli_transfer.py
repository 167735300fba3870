"""The commands of `upstox-db` that move data: backup, restore, migrate."""

from __future__ import annotations

import errno
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import ArgumentOrVariable, OpenStore, command, exists, many
from .cli_output import on_terminal, print_error
from .core.environment import expand_home
from .core.errors import ConfigurationError, InvalidInput, StorageError, StoreUnavailable
from .core.token import IST

if TYPE_CHECKING:
    from .core.store import TokenStorage
    from .transfer import Counts

# A path fails in the same way each time with these. Others, such as a full disk, may pass.
OF_THE_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


@contextmanager
def using_a_path() -> Iterator[None]:
    """Say that a path has to be fixed first, if that is why a file could not be read or written."""
    try:
        yield
    except StoreUnavailable as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in OF_THE_PATH:
            raise ConfigurationError(*error.args) from error.__cause__
        raise


@command("backup", "upstox-db backup upstox.export", "upstox-db backup --keep 14 upstox.export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(1, 100_000),
    help="Put the time into the file's name, and keep the newest N of these backups.",
)
@click.pass_obj
def backup(store: OpenStore, file: str, keep: int | None) -> None:
    """Write everything in the store to an encrypted FILE.

    You need the store's key to read it, so keep the key somewhere else. An earlier backup with that name is replaced
    once the new one is complete, but never by a backup without tokens. With --keep, FILE such as upstox.export becomes
    upstox-20261126-093000.export, by the time in India, and older ones go once the new one is complete.

    Tokens die at 03:30 in India. So run this after the morning's login, or the backup has no working token in it:

    \b
      0 9 * * 1-5  . $HOME/upstox.env; upstox-db backup --keep 14 upstox.export
    """
    from .transfer import export_tokens

    opened, wanted = store(), expand_home(file)
    earlier = list_backups(wanted) if keep else [wanted] if exists(wanted) else []
    tokens = has_tokens(opened)
    if earlier and not tokens:
        raise InvalidInput(
            f"{earlier[-1]} already exists, and this store has no token to replace it with. Check --store and "
            "UPSTOX_DB_STORE, or choose another file."
        )
    now = opened.backend.context.now()
    target = stamped(wanted, now) if keep else wanted
    with using_a_path():
        counts = export_tokens(opened, target, progress=on_terminal())
        # The new one is kept whatever its name says: the clock may have been wrong before.
        removed = remove_older([each for each in list_backups(wanted) if each != target], keep - 1) if keep else []
    working = count_working(opened, now)
    told = [describe_counts(counts)]
    told += [f"Wrote {target}, and removed {many(len(removed), 'older backup')}."] if keep else []
    told += ["No working token is in it: back up after the morning's login."] if tokens and not working else []
    data = {"file": str(target), **counts_in_json(counts), "working_tokens": working}
    store.report("\n".join(told), data | {"removed": [str(each) for each in removed]})


def has_tokens(opened: TokenStorage) -> bool:
    return any(map(opened.backend.read_tokens, opened.backend.each_user()))


def count_working(opened: TokenStorage, now: datetime) -> int:
    newest = filter(None, map(opened.backend.find_newest, filter(None, opened.backend.each_user())))
    return sum(bool(token.ciphertext) and token.expires_at > now for token in newest)


def stamped(path: Path, now: datetime) -> Path:
    """Return this path with the time in its name, in India time: it knows no summer time, so names sort by age."""
    return path.with_name(f"{path.stem}-{now.astimezone(IST):%Y%m%d-%H%M%S}{path.suffix}")


def list_backups(path: Path) -> list[Path]:
    """Return the backups with a time in their names, oldest first."""
    name = re.compile(re.escape(path.stem) + r"-\d{8}-\d{6}" + re.escape(path.suffix))
    try:
        return sorted(each for each in path.parent.iterdir() if name.fullmatch(each.name))
    except OSError as error:
        raise ConfigurationError(f"{path.parent} cannot be read: {error.strerror}.") from error


def remove_older(backups: list[Path], keep: int) -> list[Path]:
    """Remove all but the newest of these backups, and return which. Leave alone what is no backup but has the name."""
    from .transfer.file import kind_of

    removed = []
    for each in backups[: len(backups) - keep]:
        try:
            kind_of(each)
        except StorageError:
            continue
        try:
            each.unlink()
            removed.append(each)
        except OSError as error:
            print_error(f"{each} is older than the backups to keep, but cannot be removed: {error.strerror}.")
    return removed


@command("restore", "upstox-db --store restored.db restore upstox.export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def restore(store: OpenStore, file: str) -> None:
    """Import a backup FILE into the store.

    Existing data stays. This needs the key that the backup was made with, and it can be run again: then nothing is new.
    """
    from .core.cipher import KeyRing
    from .transfer import import_tokens
    from .transfer.file import read_export

    with using_a_path():
        # First read all of it, so that a mistyped name, a missing key or a damaged file makes no store.
        deque(read_export(expand_home(file), lambda key_id: KeyRing.default(lambda: [key_id])), maxlen=0)
        counts = import_tokens(store(new=True), file, progress=on_terminal())
    store.report(describe_counts(counts, new=True), counts_in_json(counts, new=True))


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
    from .patterns import open_store
    from .transfer import migrate

    source, other = ctx.obj(), ctx.with_resource(open_store(target))
    counts = migrate(source, other, progress=on_terminal())
    ctx.obj.report(describe_counts(counts, new=True), counts_in_json(counts, new=True))


def describe_counts(counts: Counts, *, new: bool = False) -> str:
    def told(number: int, new_number: int, *words: str) -> str:
        return many(number, *words) + (f" ({new_number} new)" if new else "")

    tokens = told(counts.tokens, counts.new_tokens, "token")
    entries = told(counts.audit_entries, counts.new_audit_entries, "audit entry", "audit entries")
    return f"{many(counts.users, 'user')}, {tokens}, {entries}."


def counts_in_json(counts: Counts, *, new: bool = False) -> dict[str, Any]:
    return {name: number for name, number in counts._asdict().items() if new or not name.startswith("new_")}
