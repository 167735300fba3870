"""From any store to any other: export to an encrypted file, import, migrate. All of it can be repeated.

One user after another: first the tokens, in one transaction of the target (MongoDB: in an order of writes that may be
cut off anywhere), then the audit entries, some hundreds at a time. What is there already is left alone, so a transfer
that was killed is simply run again. Tokens are encrypted again and not moved as they lie: so the two stores may have
different keys, and a token that cannot be read is found out before anything is written.
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
from pathlib import Path

from ..core.backend import ENTRIES_LOCK, NOBODY_LOCK
from ..core.batch import progress_bar
from ..core.errors import InvalidInput, StorageError
from ..core.store import BATCH, TokenStorage
from ..core.token import AuditEntry, Secret, StoredToken
from .file import Counts, Part, by_user, kind_of, read_export, write_export

logger = logging.getLogger(__name__)

COMPARED = (
    "generation", "created_at", "expires_at", "user_name", "email", "broker", "user_type", "products", "exchanges",
    "account", "metadata",
)  # fmt: skip


def migrate(source: TokenStorage, target: TokenStorage, *, progress: bool = True) -> Counts:
    """Bring all that `source` keeps into `target`, and compare.

    Tokens are encrypted again, under the target's first key. A user who has logged in at the target since keeps that
    newer token. Stop the programs that use the source first: a login there during the migration would have to be
    brought over by another one.

    Returns:
        what the source keeps, and how much of it was new to the target.

    Raises:
        InvalidInput: for some user the two have histories that never were one. Nothing is changed; where the two
            parted while this ran, nothing of that user.
        KeyUnavailable, TokenRefused: a living token of the source cannot be read. Nothing is changed.
        StorageError: afterwards the two still differ; somebody wrote meanwhile. Run it again.
    """
    tokens = (Part(user_id, source._tokens_of(user_id), []) for user_id in source._users())
    users = _checked(tokens, target, source._decrypt)
    return _bring(lambda: _parts(source), target, source._decrypt, users, progress)


def export_tokens(store: TokenStorage, path: str | os.PathLike[str], *, progress: bool = True) -> Counts:
    """All that the store keeps, in one file of mode 0600, each line encrypted under the store's first key.

    The file is whole or not there: it gets its name, in place of an older one, when it is on the disk.

    Raises:
        InvalidInput: something else lies there under that name.
        StoreUnavailable: it cannot be written, or the store cannot be read.
    """
    with progress_bar(len(store._users()), "user", progress) as advance:
        counts = write_export(Path(path), store._kind, store._ring, _parts(store), advance)
    logger.info("Exported %s to %s: %s users, %s tokens, %s audit entries", store, path, *counts[:3])
    return counts


def import_tokens(store: TokenStorage, path: str | os.PathLike[str], *, progress: bool = True) -> Counts:
    """Bring what `export_tokens` wrote into a store, of whatever kind. As `migrate`; the file is checked first.

    Raises:
        BackupDamaged: it is not a whole export, or was changed. Nothing is imported.
        KeyUnavailable: its key, or that of a token in it, is not in the store's key ring; the error names it. Nothing
            is imported.
        InvalidInput: as `migrate`.
    """
    file = Path(path)
    kind = kind_of(file)

    def decrypt(token: StoredToken) -> Secret:
        return store._decrypt(token, kind)

    users = _checked(read_export(file, store._ring), store, decrypt)
    return _bring(lambda: read_export(file, store._ring), store, decrypt, users, progress)


def _checked(parts: Iterator[Part], target: TokenStorage, decrypt: Callable[[StoredToken], Secret]) -> int:
    """How many users there are; all that can be refused is refused here, before anything is written."""
    users, now = 0, target._now()
    for _, parts_of_user in by_user(parts):
        users += 1
        for part in parts_of_user:
            if part.tokens:
                _refuse_another_history(part.user_id, part.tokens, target._tokens_of(part.user_id))
            for token in part.tokens:
                if _alive(token, now):
                    decrypt(token)
    return users


def _bring(
    source: Callable[[], Iterator[Part]],
    target: TokenStorage,
    decrypt: Callable[[StoredToken], Secret],
    users: int,
    progress: bool,
) -> Counts:
    counts, brought = Counts(), set()
    with progress_bar(users, "user", progress) as advance:
        for user_id, parts in by_user(source()):
            tokens = next(parts).tokens
            # The lock of logins, so that none comes in between.
            with target._lock(user_id or NOBODY_LOCK):
                there = target._tokens_of(user_id)
                _refuse_another_history(user_id, tokens, there)  # Since it was checked, there may have been a login.
                known = {token.generation for token in there}
                if changed := _merged(tokens, there, target._now()):
                    target._put_in(user_id, [_encrypted_again(t, known, target, decrypt) for t in changed], [])
                brought |= {(user_id, t.generation) for t in changed if t.ciphertext and t.generation not in known}
            new = sum(token.generation not in known for token in tokens)
            counts = counts.plus(users=1, tokens=len(tokens), new_tokens=new)
            # Another lock, for these may take long and stand in no login's way; but two imports would double them.
            with target._lock(ENTRIES_LOCK):
                entries = _Counted(entry for part in parts for entry in part.entries)
                for batch in itertools.batched(_missing(entries, _entries(target, user_id)), BATCH):
                    target._put_in(user_id, [], list(batch))
                    counts = counts.plus(new_audit_entries=len(batch))
            counts = counts.plus(audit_entries=entries.number)
            advance()
    for user_id, parts in by_user(source()):
        tokens, there = next(parts).tokens, target._tokens_of(user_id)
        there_too = (entry for part in parts for entry in part.entries)
        living = {token.generation for token in tokens if (user_id, token.generation) in brought}
        if not _agree(tokens, there, living, target, decrypt) or any(_missing(there_too, _entries(target, user_id))):
            raise StorageError(f"What was brought over of {user_id} differs: somebody wrote meanwhile. Run it again.")
    logger.info("Brought over to %s, and compared: %s", target, counts)
    return counts


# What is read


def _parts(store: TokenStorage) -> Iterator[Part]:
    for user_id in store._users():
        tokens = store._tokens_of(user_id)
        yield Part(user_id, tokens, [])
        # What belongs to a token that came since is left to the next time, as is that token.
        known = {None, *(token.generation for token in tokens)}
        entries = (entry._replace(position=None) for entry in _entries(store, user_id) if entry.generation in known)
        for batch in itertools.batched(entries, BATCH):
            yield Part(user_id, [], list(batch))


def _entries(store: TokenStorage, user_id: str | None) -> Iterator[AuditEntry]:
    last = None
    while batch := store._entries_of(user_id, last, BATCH):
        yield from batch
        last = batch[-1]


class _Counted:
    """Counts what is taken from it."""

    def __init__(self, entries: Iterable[AuditEntry]) -> None:
        self._entries, self.number = entries, 0

    def __iter__(self) -> Iterator[AuditEntry]:
        for entry in self._entries:
            self.number += 1
            yield entry


# What is written


def _refuse_another_history(user_id: str | None, tokens: list[StoredToken], there: list[StoredToken]) -> None:
    known = {token.generation: token for token in there}
    for token in tokens:
        other = known.get(token.generation, token)
        if not _same(token, other):
            raise InvalidInput(
                f"{user_id} has another history there: token {token.generation} was made at {token.created_at} here "
                f"and at {other.created_at} there. Nothing of it was changed; take a target that has no tokens of this "
                "user. (Bring a backup back before any program logs in at the new store.)"
            )


def _same(one: StoredToken, other: StoredToken) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in COMPARED)


def _alive(token: StoredToken, now: datetime) -> bool:
    return bool(token.ciphertext) and token.expires_at > now


def _merged(tokens: list[StoredToken], there: list[StoredToken], now: datetime) -> list[StoredToken]:
    """What has to be written so that the target has these tokens. Whatever happened later wins, on either side."""
    known = {token.generation: token for token in there}
    latest = max(known, default=0)
    changed = []
    for token in sorted(tokens, key=lambda each: each.generation):
        mine = known.get(token.generation)
        if mine is None:
            living = _alive(token, now) and token.generation > latest
            changed.append(token if living else replace(token, ciphertext=""))
            continue
        used = [moment for moment in (mine.last_used_at, token.last_used_at) if moment]
        merged = replace(
            mine,
            ciphertext=mine.ciphertext if _alive(token, now) else "",
            usage_count=max(mine.usage_count, token.usage_count),
            last_used_at=max(used, default=None),
        )
        # A dead token's ciphertext is the cleanup's business.
        if merged != (mine if mine.expires_at > now else replace(mine, ciphertext="")):
            changed.append(merged)
    return changed


def _agree(
    tokens: list[StoredToken],
    there: list[StoredToken],
    living: set[int],
    target: TokenStorage,
    decrypt: Callable[[StoredToken], Secret],
) -> bool:
    """Whether the target has all of these tokens, and those that live, `living` among them, are the same to the letter.

    Not by `_merged`, which would take its own mistakes for an agreement.
    """
    known, now = {token.generation: token for token in there}, target._now()
    for token in tokens:
        mine = known.get(token.generation)
        if mine is None or not _same(token, mine) or mine.usage_count < token.usage_count:
            return False
        if _alive(mine, now):
            if not _alive(token, now) or target._decrypt(mine).reveal() != decrypt(token).reveal():
                return False
        elif token.generation in living and _alive(token, now):
            return False
    return True


def _missing(entries: Iterable[AuditEntry], there: Iterator[AuditEntry]) -> Iterator[AuditEntry]:
    """Entries that the target lacks, both sides oldest first.

    Ids differ between databases, and two uses in one second look the same: so equal ones of a second are counted.
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


def _encrypted_again(
    token: StoredToken, known: set[int], target: TokenStorage, decrypt: Callable[[StoredToken], Secret]
) -> StoredToken:
    return target._encrypt(decrypt(token), token) if token.ciphertext and token.generation not in known else token
