"""From any store to any other: export to an encrypted file, import, migrate. All of it can be repeated.

One user after another is taken out and put in, tokens, history, usage and audit, each in one transaction of the target
(MongoDB: in an order of writes that may be cut off anywhere). What is there already is left alone, so a transfer that
was killed is simply run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from .batch import progress_bar
from .cipher import Binding
from .errors import BackupDamaged, InvalidInput, StorageError, StoreUnavailable, TokenRefused
from .files import written_whole
from .storage import TokenStorage
from .token import AuditEntry, Secret, StoredToken

FORMAT = "upstox_db_examples export, version 1"
COMPARED = (
    "generation", "created_at", "expires_at", "user_name", "email", "broker", "user_type", "products", "exchanges",
    "account", "metadata",
)  # fmt: skip

Taken = tuple[str | None, list[StoredToken], list[AuditEntry]]


class Counts(NamedTuple):
    """How much was in what was transferred; with `new_` how much of it the target did not have."""

    users: int = 0
    tokens: int = 0
    audit_entries: int = 0
    new_tokens: int = 0
    new_audit_entries: int = 0

    def plus(self, *more: int) -> Counts:
        return Counts(*(a + b for a, b in zip(self, (*more, 0, 0), strict=False)))


def migrate(source: TokenStorage, target: TokenStorage, *, progress: bool = True) -> Counts:
    """Bring all that `source` keeps into `target`, and compare.

    Tokens are encrypted again, under the target's first key. A user who has logged in at the target since keeps that
    newer token. Stop the programs that use the source first: a login there during the migration would have to be
    brought over by another one.

    Returns:
        what the source keeps, and how much of it was new to the target.

    Raises:
        InvalidInput: for some user the two have histories that never were one. Nothing is changed.
        StorageError: afterwards the two still differ; somebody wrote meanwhile. Run it again.
        KeyUnavailable, TokenRefused: a living token of the source cannot be read.
    """
    return _bring(lambda: _taken_out(source), target, source._decrypt, len(source._users()), progress)


def export_tokens(store: TokenStorage, path: str | os.PathLike[str], *, progress: bool = True) -> Counts:
    """All that the store keeps, in one file of mode 0600, each line encrypted under the store's first key.

    The file is whole or not there: it gets its name, in place of an older one, when it is on the disk.

    Raises:
        StoreUnavailable: it cannot be written, or the store cannot be read.
    """
    export_id, counts, digest = secrets.token_hex(8), Counts(), hashlib.sha256()
    users = len(store._users())
    with written_whole(Path(path)) as temporary, temporary.open("w") as file:

        def write(text: str) -> None:
            digest.update(f"{text}\n".encode())
            file.write(f"{text}\n")

        write(f"{FORMAT}, {export_id}")
        with progress_bar(users, "user", progress) as advance:
            for number, taken in enumerate(_taken_out(store)):
                counts = counts.plus(1, len(taken[1]), len(taken[2]))
                write(_sealed(store, _dumped(taken), export_id, number))
                advance()
        end = json.dumps({"counts": counts[:3], "sha256": digest.hexdigest()})
        write(_sealed(store, end, export_id, -1))
    return counts


def import_tokens(store: TokenStorage, path: str | os.PathLike[str], *, progress: bool = True) -> Counts:
    """Bring what `export_tokens` wrote into a store, of whatever kind. As `migrate`; the file is checked first.

    Raises:
        BackupDamaged: it is not a whole export, or was changed. Nothing is imported.
        KeyUnavailable: its key is not in the store's key ring; the error names it.
        InvalidInput: as `migrate`.
    """
    file = Path(path)
    users = sum(1 for _ in _read(store, file))
    return _bring(lambda: _read(store, file), store, store._decrypt, users, progress)


def _bring(
    taken: Callable[[], Iterator[Taken]],
    target: TokenStorage,
    decrypt: Callable[[StoredToken], Secret],
    users: int,
    progress: bool,
) -> Counts:
    for user_id, tokens, _ in taken():
        _refuse_another_history(user_id, tokens, target)
    counts = Counts()
    with progress_bar(users, "user", progress) as advance:
        for user_id, tokens, entries in taken():
            # The lock of logins, so that none comes in between.
            with target._lock(user_id or "nobody"):
                there, entries_there = target._take_out(user_id)
                missing = _missing(entries, entries_there)
                changed = [_encrypted_again(t, there, target, decrypt) for t in _merged(tokens, there, target._now())]
                if changed or missing:
                    target._put_in(user_id, changed, missing)
            known = {token.generation for token in there}
            new = sum(token.generation not in known for token in tokens)
            counts = counts.plus(1, len(tokens), len(entries))._replace(
                new_tokens=counts.new_tokens + new, new_audit_entries=counts.new_audit_entries + len(missing)
            )
            advance()
    for user_id, tokens, entries in taken():
        there, entries_there = target._take_out(user_id)
        if _merged(tokens, there, target._now()) or _missing(entries, entries_there):
            raise StorageError(f"What was brought over of {user_id} differs: somebody wrote meanwhile. Run it again.")
    return counts


def _taken_out(store: TokenStorage) -> Iterator[Taken]:
    for user_id in store._users():
        yield (user_id, *store._take_out(user_id))


def _refuse_another_history(user_id: str | None, tokens: list[StoredToken], target: TokenStorage) -> None:
    there = {token.generation: token for token in target._take_out(user_id)[0]}
    for token in tokens:
        other = there.get(token.generation, token)
        if any(getattr(token, name) != getattr(other, name) for name in COMPARED):
            raise InvalidInput(
                f"{user_id} has another history there: token {token.generation} was made at {token.created_at} here "
                f"and at {other.created_at} there. Nothing was changed; take a target that has no tokens of this user."
            )


def _merged(tokens: list[StoredToken], there: list[StoredToken], now: datetime) -> list[StoredToken]:
    """What has to be written so that the target has these tokens. Whatever happened later wins, on either side."""
    known = {token.generation: token for token in there}
    latest = max(known, default=0)
    changed = {}
    for token in tokens:
        alive = bool(token.ciphertext) and token.expires_at > now
        mine = known.get(token.generation)
        if mine is None:
            changed[token.generation] = token if alive and token.generation > latest else replace(token, ciphertext="")
        else:
            used = [moment for moment in (mine.last_used_at, token.last_used_at) if moment]
            merged = replace(
                mine,
                ciphertext=mine.ciphertext if alive else "",
                usage_count=max(mine.usage_count, token.usage_count),
                last_used_at=max(used, default=None),
            )
            if merged != (mine if mine.expires_at > now else replace(mine, ciphertext="")):
                changed[token.generation] = merged
    return [changed[generation] for generation in sorted(changed)]


def _missing(entries: list[AuditEntry], there: list[AuditEntry]) -> list[AuditEntry]:
    """Entries that the target lacks. Equal ones are counted, for two uses in one second look the same."""
    known = Counter(map(_key, there))
    missing = []
    for entry in entries:
        known[_key(entry)] -= 1
        if known[_key(entry)] < 0:
            missing.append(entry)
    return missing


def _key(entry: AuditEntry) -> str:
    return json.dumps(entry, default=datetime.isoformat, sort_keys=True)


def _encrypted_again(
    token: StoredToken, there: list[StoredToken], target: TokenStorage, decrypt: Callable[[StoredToken], Secret]
) -> StoredToken:
    if not token.ciphertext or token.ciphertext in {each.ciphertext for each in there}:
        return token
    return target._encrypt(decrypt(token), token)


# The file


def _sealed(store: TokenStorage, text: str, export_id: str, number: int) -> str:
    return store._ring.encrypt(Secret(text), _place(export_id, number))


def _place(export_id: str, number: int) -> Binding:
    """Where a line belongs: a line of another export, or in another place, is refused. -1 is the last one."""
    return Binding(export_id, datetime.fromtimestamp(number + 1, tz=UTC), number, kind="export")


def _read(store: TokenStorage, path: Path) -> Iterator[Taken]:
    """The users of an export. It was whole only if this comes to its end without an error."""
    damaged = BackupDamaged(f"{path} is not a whole export: it was cut off or changed. Nothing was imported from it.")
    digest, counts, previous, number = hashlib.sha256(), Counts(), None, 0
    try:
        with path.open(encoding="ascii") as file:
            header = file.readline()
            digest.update(header.encode())
            export_id = header.removeprefix(f"{FORMAT}, ").rstrip("\n")
            if not header.startswith(FORMAT) or not header.endswith("\n"):
                raise BackupDamaged(f"{path} is not an export of this version.")
            for line in file:
                if previous is not None:
                    taken = _loaded(_opened(store, previous, export_id, number))
                    digest.update(previous.encode())
                    counts = counts.plus(1, len(taken[1]), len(taken[2]))
                    number += 1
                    yield taken
                previous = line
        if previous is None or not previous.endswith("\n"):
            raise damaged
        end = json.loads(_opened(store, previous, export_id, -1))
        if end != {"counts": list(counts[:3]), "sha256": digest.hexdigest()}:
            raise damaged
    except (TokenRefused, ValueError, TypeError, KeyError) as error:
        raise damaged from error
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be read: {error.strerror}.") from error


def _opened(store: TokenStorage, line: str, export_id: str, number: int) -> str:
    return store._ring.decrypt(line.removesuffix("\n"), _place(export_id, number)).reveal()


def _dumped(taken: Taken) -> str:
    user_id, tokens, entries = taken
    return json.dumps([user_id, [asdict(token) for token in tokens], entries], default=datetime.isoformat)


def _loaded(text: str) -> Taken:
    user_id, tokens, entries = json.loads(text)
    for token in tokens:
        for name in ("created_at", "expires_at", "last_used_at"):
            token[name] = token[name] and datetime.fromisoformat(token[name])
    loaded = [AuditEntry(*entry)._replace(performed_at=datetime.fromisoformat(entry[2])) for entry in entries]
    return user_id, [StoredToken(**token) for token in tokens], loaded
