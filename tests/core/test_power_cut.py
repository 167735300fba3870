"""What must be on the disk before it counts: the file itself, and its name in the folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from upstox_db_examples import KeyRing, SQLiteUpstoxStorage, export_tokens

from ..support.processes import KEY, USER, made_up_login

Synced = list[tuple[str, int]]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    """What is written to the disk from now on, in this order: "file" or "folder", and its inode."""
    found: Synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        found.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", status.st_ino))
        if found[-1][0] == "file":
            assert status.st_size > 0, "what is not written yet is not synced either"
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_a_new_key_is_on_the_disk_before_it_is_used(tmp_path: Path, synced: Synced) -> None:
    file = tmp_path / "new" / "keys"
    KeyRing.from_file(file)
    assert synced == [("file", file.stat().st_ino), ("folder", file.parent.stat().st_ino)]


def test_an_export_is_on_the_disk_before_it_counts(tmp_path: Path, synced: Synced) -> None:
    file = tmp_path / "exports" / "upstox.export"
    file.parent.mkdir()
    with SQLiteUpstoxStorage(str(tmp_path / "upstox.db"), login=made_up_login, keys=KEY) as store:
        store.store_token(USER)
        synced.clear()
        export_tokens(store, file, progress=False)
    assert [each for each in synced if each[1] in (file.stat().st_ino, file.parent.stat().st_ino)] == [
        ("file", file.stat().st_ino),
        ("folder", file.parent.stat().st_ino),
    ]
