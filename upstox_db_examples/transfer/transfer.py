"""Move data between any two stores: export to an encrypted file, import, migrate. Each of them can be repeated.

Users are transferred one by one. Their tokens go first, in one transaction of the target (MongoDB: in an order of
writes that is safe to interrupt anywhere). The audit entries follow, a few hundred at a time. Existing data is left
alone, so you simply run a killed transfer again. Tokens are re-encrypted and not copied as they are. So the two stores
may have different keys, and an unreadable token is found before anything is written.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime

from ..core.batch import progress_bar
from ..core.environment import expand_home
from ..core.errors import InvalidInput, StorageError
from ..core.files import resolve_target
from ..core.locks import ENTRIES_LOCK, NOBODY_LOCK
from ..core.store import TokenStorage
from ..core.token import AuditEntry, Secret, StoredToken
from .brought import Brought
from .file import Counts, Part, by_user, kind_of, read_export, write_export

logger = logging.getLogger(__name__)

ENTRIES_AT_ONCE = 500  # in one transaction, so that nobody is locked out for long

COMPARED = (
    "generation", "created_at", "expires_at", "user_name", "email", "broker", "user_type", "products", "exchanges",
    "account", "metadata",
)  # fmt: skip


def migrate(source: TokenStorage, target: TokenStorage, *, progress: bool = True) -> Counts:
    """Copy everything from `source` to `target`, and then compare the two.

    Tokens are re-encrypted under the target's first key. A user who has since logged in at the target keeps that newer
    token. Stop the programs that use the source first: a login there during the migration would need another one.

    Returns:
        how much the source holds, and how much of it was new to the target.

    Raises:
        InvalidInput: the two stores have unrelated histories for some user. Nothing is changed. If they diverged while
            this ran, nothing of that user is changed.
        KeyUnavailable, TokenRefused: a working token of the source cannot be read. Nothing is changed.
        StorageError: the two still differ at the end, because somebody wrote meanwhile. Run it again.

    Example:
        >>> from upstox_db_examples import migrate
        >>> result = storage.get_or_create_token("AB1234")
        >>> with SQLiteUpstoxStorage("moved.db") as moved:
        ...     counts = migrate(storage, moved, progress=False)
        ...     moved.get_valid_token("AB1234")["token"] == result["token"]
        True
    """
    tokens = (Part(user_id, source.backend.read_tokens(user_id), []) for user_id in source.backend.each_user())
    users = _check_parts(tokens, target, source.cipher.decrypt)
    return _transfer(lambda: _read_parts(source), target, source.cipher.decrypt, users, progress)


def export_tokens(store: TokenStorage, path: str | os.PathLike[str], *, progress: bool = True) -> Counts:
    """Write everything in the store to one file with mode 0600, encrypted under the store's first key.

    The file is either complete or absent: it gets its name, and replaces an older export, once it is on the disk.

    A symbolic link is followed: the export is where it leads.

    Raises:
        InvalidInput: something that is not an export has that name.
        KeyUnavailable, TokenRefused: a working token cannot be read, so nobody could import it. No file is written.
        StoreUnavailable: the file cannot be written, or the store cannot be read.

    Example:
        >>> from upstox_db_examples import export_tokens
        >>> result = storage.get_or_create_token("AB1234")
        >>> export_tokens(storage, "upstox.export", progress=False).tokens
        1
    """
    target = resolve_target(expand_home(path))
    users = sum(1 for _ in store.backend.each_user()) if progress else 0
    with progress_bar(users, "user", progress) as advance:
        counts = write_export(target, store.backend.store_kind, store.cipher.ring, _read_readable(store), advance)
    logger.info("Exported %s to %s: %s users, %s tokens, %s audit entries", store, path, *counts[:3])
    return counts


def import_tokens(store: TokenStorage, path: str | os.PathLike[str], *, progress: bool = True) -> Counts:
    """Import a file of `export_tokens` into a store of any kind. Check the file first, then proceed like `migrate`.

    Raises:
        BackupDamaged: the file is incomplete or was changed. Nothing is imported.
        KeyUnavailable: the store's key ring lacks the key of the file or of a token in it; the error names the key.
            Nothing is imported.
        InvalidInput: see `migrate`.

    Example:
        >>> from upstox_db_examples import export_tokens, import_tokens
        >>> result = storage.get_or_create_token("AB1234")
        >>> counts = export_tokens(storage, "upstox.export", progress=False)
        >>> with SQLiteUpstoxStorage("restored.db") as restored:
        ...     import_tokens(restored, "upstox.export", progress=False).new_tokens
        1
    """
    file = expand_home(path)
    kind = kind_of(file)

    def decrypt(token: StoredToken) -> Secret:
        return store.cipher.decrypt(token, kind)

    users = _check_parts(read_export(file, store.cipher.ring_with), store, decrypt)
    return _transfer(lambda: read_export(file, store.cipher.ring_with), store, decrypt, users, progress)


def _check_parts(parts: Iterator[Part], target: TokenStorage, decrypt: Callable[[StoredToken], Secret]) -> int:
    """Count the users. Everything that can be refused is refused here, before anything is written."""
    users, now = 0, target.backend.context.now()
    for _, parts_of_user in by_user(parts):
        users += 1
        for part in parts_of_user:
            if part.tokens:
                _refuse_another_history(part.user_id, part.tokens, target.backend.read_tokens(part.user_id))
            for token in part.tokens:
                if _is_alive(token, now):
                    decrypt(token)
    return users


def _transfer(
    source: Callable[[], Iterator[Part]],
    target: TokenStorage,
    decrypt: Callable[[StoredToken], Secret],
    users: int,
    progress: bool,
) -> Counts:
    counts, brought = Counts(), Brought()
    with progress_bar(users, "user", progress) as advance:
        for user_id, parts in by_user(source()):
            tokens = next(parts).tokens
            # Take the login lock, so that no login comes in between.
            with target.backend.lock(user_id.upper() if user_id else NOBODY_LOCK):
                there = target.backend.read_tokens(user_id)
                _refuse_another_history(user_id, tokens, there)  # A login may have happened since the check.
                known = {token.generation for token in there}
                if changed := _merge(tokens, there, target.backend.context.now()):
                    target.backend.merge(user_id, [_encrypt_again(t, known, target, decrypt) for t in changed], [])
                brought.add(t for t in changed if t.ciphertext and t.generation not in known)
            new = sum(token.generation not in known for token in tokens)
            counts = counts.plus(users=1, tokens=len(tokens), new_tokens=new)
            # Use another lock here, because entries may take long and must not block logins. Without any lock, two
            # imports would write every entry twice.
            with target.backend.lock(ENTRIES_LOCK):
                entries = _Counting(entry for part in parts for entry in part.entries)
                for batch in itertools.batched(_find_missing(entries, read_entries(target, user_id)), ENTRIES_AT_ONCE):
                    target.backend.merge(user_id, [], list(batch))
                    counts = counts.plus(new_audit_entries=len(batch))
            counts = counts.plus(audit_entries=entries.number)
            advance()
    for user_id, parts in by_user(source()):
        tokens, there = next(parts).tokens, target.backend.read_tokens(user_id)
        there_too = (entry for part in parts for entry in part.entries)
        living = brought.take(tokens)
        same = _has_all(tokens, there, living, target, decrypt)
        if not same or any(_find_missing(there_too, read_entries(target, user_id))):
            raise StorageError(f"The two stores differ for {user_id}: somebody wrote meanwhile. Run it again.")
    if brought.left:
        raise StorageError("Tokens have gone from the source meanwhile. Run it again.")
    logger.info("Copied into %s and compared: %s", target, counts)
    return counts


# What is read


def _read_parts(store: TokenStorage) -> Iterator[Part]:
    for user_id in store.backend.each_user():
        tokens = store.backend.read_tokens(user_id)
        yield Part(user_id, tokens, [])
        # A token that arrived since then waits for the next run, and so do its entries.
        known = {None, *(token.generation for token in tokens)}
        entries = (entry._replace(position=None) for entry in read_entries(store, user_id) if entry.generation in known)
        for batch in itertools.batched(entries, ENTRIES_AT_ONCE):
            yield Part(user_id, [], list(batch))


def _read_readable(store: TokenStorage) -> Iterator[Part]:
    """Do the same, and decrypt each working token. An import would refuse a file with one that cannot be read."""
    now = store.backend.context.now()
    for part in _read_parts(store):
        for token in part.tokens:
            if _is_alive(token, now):
                store.cipher.decrypt(token)
        yield part


def read_entries(store: TokenStorage, user_id: str | None) -> Iterator[AuditEntry]:
    last = None
    while batch := store.backend.read_entries(user_id, last, ENTRIES_AT_ONCE):
        yield from batch
        last = batch[-1]


class _Counting:
    """Counts the items taken from an iterable."""

    def __init__(self, entries: Iterable[AuditEntry]) -> None:
        self.read_entries, self.number = entries, 0

    def __iter__(self) -> Iterator[AuditEntry]:
        for entry in self.read_entries:
            self.number += 1
            yield entry


# What is written


def _refuse_another_history(user_id: str | None, tokens: list[StoredToken], there: list[StoredToken]) -> None:
    known = {token.generation: token for token in there}
    for token in tokens:
        other = known.get(token.generation, token)
        if not _is_same(token, other):
            raise InvalidInput(
                f"The two stores have different histories of {user_id}: token {token.generation} was made at "
                f"{token.created_at} in one and at {other.created_at} in the other. Nothing of this user was changed. "
                "Use a target that has no tokens of this user. (Restore a backup before any program logs in there.)"
            )


def _is_same(one: StoredToken, other: StoredToken) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in COMPARED)


def _is_alive(token: StoredToken, now: datetime) -> bool:
    return bool(token.ciphertext) and token.expires_at > now


def _merge(tokens: list[StoredToken], there: list[StoredToken], now: datetime) -> list[StoredToken]:
    """Return the tokens to write so that the target has all of these. The later event wins, on either side."""
    known = {token.generation: token for token in there}
    latest = max(known, default=0)
    changed = []
    for token in sorted(tokens, key=lambda each: each.generation):
        mine = known.get(token.generation)
        if mine is None:
            living = _is_alive(token, now) and token.generation > latest
            changed.append(token if living else replace(token, ciphertext=""))
            continue
        used = [moment for moment in (mine.last_used_at, token.last_used_at) if moment]
        merged = replace(
            mine,
            ciphertext=mine.ciphertext if _is_alive(token, now) else "",
            usage_count=max(mine.usage_count, token.usage_count),
            last_used_at=max(used, default=None),
        )
        # The cleanup takes care of a dead token's ciphertext.
        if merged != (mine if mine.expires_at > now else replace(mine, ciphertext="")):
            changed.append(merged)
    return changed


def _has_all(
    tokens: list[StoredToken],
    there: list[StoredToken],
    living: set[int],
    target: TokenStorage,
    decrypt: Callable[[StoredToken], Secret],
) -> bool:
    """Return whether the target has all of these tokens. Working tokens, `living` among them, must match exactly.

    This does not use `_merge`, which would not notice its own mistakes.
    """
    known, now = {token.generation: token for token in there}, target.backend.context.now()
    for token in tokens:
        mine = known.get(token.generation)
        if mine is None or not _is_same(token, mine) or mine.usage_count < token.usage_count:
            return False
        if _is_alive(mine, now):
            if not _is_alive(token, now) or target.cipher.decrypt(mine).reveal() != decrypt(token).reveal():
                return False
        elif token.generation in living and _is_alive(token, now):
            return False
    return True


def _find_missing(entries: Iterable[AuditEntry], there: Iterator[AuditEntry]) -> Iterator[AuditEntry]:
    """Yield the entries that the target lacks. Both sides come oldest first.

    Ids differ between databases, and two uses in one second look the same. So equal entries in a second are counted.
    """
    seconds = itertools.groupby(there, key=_when)
    second, kept = next(seconds, (None, iter(())))
    for moment, at_once in itertools.groupby(entries, key=_when):
        while second is not None and second < moment:
            second, kept = next(seconds, (None, iter(())))
        known = Counter(map(_content, kept)) if second == moment else Counter[object]()
        for entry in at_once:
            content = _content(entry)
            if known[content]:
                known[content] -= 1
            else:
                yield entry


def _when(entry: AuditEntry) -> datetime:
    return entry.performed_at


def _content(entry: AuditEntry) -> object:
    return entry.action, entry.actor, entry.generation, json.dumps(entry.metadata, sort_keys=True)


def _encrypt_again(
    token: StoredToken, known: set[int], target: TokenStorage, decrypt: Callable[[StoredToken], Secret]
) -> StoredToken:
    return (
        target.cipher.replace_ciphertext(token, decrypt(token))
        if token.ciphertext and token.generation not in known
        else token
    )
