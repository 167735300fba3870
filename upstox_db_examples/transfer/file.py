"""The export file: its contents, their order, and how a reader detects an incomplete file.

The first line is plain text. It names the format, the kind of store, the key and this one export. Then comes one line
per part, and a last line with the counts and a checksum over everything before it. All of these lines are encrypted,
and bound to the first line and to their line number. So a reader refuses a line that was changed, moved, left out or
taken from another export, and a file without its last line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ..core.cipher import READABLE_VERSIONS, Binding, KeyRing
from ..core.errors import BackupDamaged, InvalidInput, StoreUnavailable, TokenRefused
from ..core.files import is_open_database, open_ordinary, write_whole
from ..core.token import AuditEntry, Secret, StoredToken

FORMAT = "upstox_db_examples export, version 2"
# Earlier versions wrote this format. They refuse the newer one, because they would mistake new token fields for damage.
EARLIER_FORMAT = "upstox_db_examples export, version 1"


class Part(NamedTuple):
    """One part of a user's data. The first part has the tokens; later parts have the audit entries, oldest first.

    The data is split, because a user whose token is read a thousand times an hour has more audit entries than memory
    can hold.
    """

    user_id: str | None
    tokens: list[StoredToken]
    entries: list[AuditEntry]


class Counts(NamedTuple):
    """How much was transferred. The `new_` fields count only what the target did not have before.

    Example:
        >>> result = storage.get_or_create_token("AB1234")
        >>> with SQLiteUpstoxStorage("moved.db") as moved:
        ...     migrate(storage, moved, progress=False)
        Counts(users=1, tokens=1, audit_entries=2, new_tokens=1, new_audit_entries=2)
    """

    users: int = 0
    tokens: int = 0
    audit_entries: int = 0
    new_tokens: int = 0
    new_audit_entries: int = 0

    def plus(self, **more: int) -> Counts:
        """Return the counts with these numbers added."""
        return self._replace(**{name: getattr(self, name) + number for name, number in more.items()})


def by_user(parts: Iterator[Part]) -> Iterator[tuple[str | None, Iterator[Part]]]:
    return itertools.groupby(parts, key=lambda part: part.user_id)


def write_export(path: Path, kind: str, ring: KeyRing, parts: Iterator[Part], advance: Callable[[], object]) -> Counts:
    """Write an export; see `transfer.export_tokens`. It calls `advance` after each user."""
    _refuse_another_file(path)
    header = f"{FORMAT}, {kind}, {ring.key_ids[0]}, {secrets.token_hex(8)}"
    counts, digest, number = Counts(), hashlib.sha256(), 0
    with write_whole(path) as temporary, temporary.open("w") as file:

        def write(text: str) -> None:
            digest.update(f"{text}\n".encode())
            file.write(f"{text}\n")

        write(header)
        for _, parts_of_user in by_user(parts):
            for part in parts_of_user:
                counts = counts.plus(tokens=len(part.tokens), audit_entries=len(part.entries))
                write(ring.encrypt(Secret(_dump(part)), binding_of_line(header, number)))
                number += 1
            counts = counts.plus(users=1)
            advance()
        end = json.dumps({"counts": counts[:3], "sha256": digest.hexdigest()})
        write(ring.encrypt(Secret(end), binding_of_line(header, -1)))
    return counts


def read_export(path: Path, ring_with: Callable[[str], KeyRing]) -> Iterator[Part]:
    """Yield the parts of an export. The file is complete only if this ends without an error.

    Args:
        ring_with: returns the key ring that should have the key with this id.
    """
    damaged = BackupDamaged(f"{path} is not a complete export: it was cut off or changed. Nothing was imported.")
    digest, counts, previous, number = hashlib.sha256(), Counts(), None, 0
    last_user: object = object()
    try:
        with open_ordinary(path) as file:
            header = _header(path, file.readline())
            digest.update(f"{header}\n".encode())
            key_id = header.split(", ")[3]
            ring = ring_with(key_id)
            begins = tuple(f"{version}.{key_id}." for version in READABLE_VERSIONS)
            for line in file:
                # Otherwise one wrong letter in a key id would look like a missing key.
                if not line.startswith(begins) or not line.endswith("\n"):
                    raise damaged
                if previous is not None:
                    part = _load(_opened(ring, previous, header, number))
                    digest.update(previous.encode())
                    counts = counts.plus(tokens=len(part.tokens), audit_entries=len(part.entries))
                    if part.user_id != last_user:
                        counts, last_user = counts.plus(users=1), part.user_id
                    number += 1
                    yield part
                previous = line
        if previous is None:
            raise damaged
        end = json.loads(_opened(ring, previous, header, -1))
        if end != {"counts": list(counts[:3]), "sha256": digest.hexdigest()}:
            raise damaged
    except (TokenRefused, ValueError, LookupError, TypeError) as error:
        raise damaged from error
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be read: {error.strerror}.") from error


def kind_of(path: Path) -> str:
    """Return the kind of store that the export's tokens are bound to. Each line that decrypts proves it."""
    try:
        with open_ordinary(path, errors="replace") as file:
            return _header(path, file.readline()).split(", ")[2]
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be read: {error.strerror}.") from error


def _header(path: Path, first: str) -> str:
    header = first.removesuffix("\n")
    if not header.startswith((FORMAT, EARLIER_FORMAT)) or header == first or header.count(", ") != 4:
        raise BackupDamaged(f"{path} is not an export that this version can read. Nothing was imported.")
    return header


def _refuse_another_file(path: Path) -> None:
    if not path.is_file():
        return  # Nothing is there, or a folder, which the system refuses to replace.
    ours = False
    if not is_open_database(path):
        try:
            with open_ordinary(path, errors="replace") as file:
                ours = file.read(len(FORMAT)) in (FORMAT, EARLIER_FORMAT, "")
        except OSError as error:  # Perhaps we may replace it, but not look what it is.
            raise StoreUnavailable(f"{path} cannot be read: {error.strerror}. Choose another file.") from error
    if not ours:
        raise InvalidInput(f"{path} is not an export and would be overwritten. Choose another file.")


def binding_of_line(header: str, number: int) -> Binding:
    """Return the binding of a line, so that a moved line or one from another export is refused. -1 is the last line."""
    return Binding(header, datetime.fromtimestamp(number + 1, tz=UTC), number, kind="export")


def _opened(ring: KeyRing, line: str, header: str, number: int) -> str:
    return ring.decrypt(line.removesuffix("\n"), binding_of_line(header, number)).reveal()


def _dump(part: Part) -> str:
    return json.dumps(
        [part.user_id, [asdict(token) for token in part.tokens], part.entries], default=datetime.isoformat
    )


def _load(text: str) -> Part:
    user_id, tokens, entries = json.loads(text)
    for token in tokens:
        for name in ("created_at", "expires_at", "last_used_at", "issued_at"):
            token[name] = token.get(name) and datetime.fromisoformat(token[name])
    loaded = [AuditEntry(*entry)._replace(performed_at=datetime.fromisoformat(entry[2])) for entry in entries]
    return Part(user_id, [StoredToken(**token) for token in tokens], loaded)
