"""SQLite when its file is not the one that it was: moved, replaced, linked, or without its log."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import (
    ConfigurationError,
    InvalidInput,
    PooledUpstoxStorage,
    SQLiteUpstoxStorage,
    StoreUnavailable,
    TokenNotStored,
    TokenStorage,
    export_tokens,
    import_tokens,
)
from upstox_db_examples.core.token import StoredToken
from upstox_db_examples.sqlite import backend, rows

from ..support.processes import KEY, USER, made_up_login
from ..support.sqlite import bare

OTHER = "CD5678"


@pytest.fixture(params=[SQLiteUpstoxStorage, PooledUpstoxStorage])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def store(kind: Any, tmp_path: Path) -> Any:
    store = kind(tmp_path / "upstox.db", keys=KEY, login=made_up_login)
    store.store_token(USER)
    yield store
    store.close()


def reopened(store: SQLiteUpstoxStorage) -> TokenStorage:
    return type(store)(store.db_path, keys=KEY, login=made_up_login)


# Moved and replaced


def test_a_database_that_was_moved_away_is_neither_read_nor_written_until_it_is_back(
    store: SQLiteUpstoxStorage, tmp_path: Path
) -> None:
    store.db_path.rename(tmp_path / "away.db")
    with pytest.raises(ConfigurationError, match="was moved or deleted while this program had it open"):
        store.get_valid_token(USER)
    with pytest.raises(ConfigurationError, match="was moved or deleted"):
        store.store_token(OTHER)
    assert not store.db_path.exists(), "nothing was made in its place"
    (tmp_path / "away.db").rename(store.db_path)
    token = store.store_token(OTHER)["token"]
    with reopened(store) as again:
        assert again.get_valid_token(OTHER)["token"] == token  # type: ignore[index]


def test_a_database_that_was_replaced_is_not_written_as_if_it_were_the_old_one(
    store: SQLiteUpstoxStorage, tmp_path: Path
) -> None:
    store.backup(tmp_path / "copy.db")
    (tmp_path / "copy.db").replace(store.db_path)
    with pytest.raises(ConfigurationError, match="was replaced while this program had it open"):
        store.store_token(OTHER)
    with pytest.raises(ConfigurationError, match="was replaced"):
        store.get_valid_token(USER)


@pytest.mark.parametrize("what", ["upstox.db", "upstox.db-wal"])
def test_what_is_moved_during_the_write_is_not_acknowledged(
    store: SQLiteUpstoxStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def move_and_go_on(token: StoredToken) -> dict[str, object]:  # inside the transaction that stores the token
        monkeypatch.undo()
        (tmp_path / what).rename(tmp_path / "away")
        return rows.columns_of(token)

    monkeypatch.setattr(backend, "columns_of", move_and_go_on)
    if what == "upstox.db":
        with pytest.raises(TokenNotStored, match="was moved or deleted while this program had it open"):
            store.store_token(OTHER)
    else:  # The connection is closed, which saves what is in its log, and the next one sees that the token is there.
        token = store.store_token(OTHER)["token"]
        with reopened(store) as again:
            assert again.get_valid_token(OTHER)["token"] == token  # type: ignore[index]


def test_nothing_is_written_into_a_log_that_was_deleted(store: SQLiteUpstoxStorage) -> None:
    Path(f"{store.db_path}-wal").unlink()
    with pytest.raises(StoreUnavailable, match="-wal was deleted or replaced while this program had it open"):
        store.store_token(OTHER)
    for _ in range(9):  # Each connection that had the old log notices once.
        try:
            token = store.store_token(OTHER)["token"]
            break
        except StoreUnavailable:
            pass
    with reopened(store) as again:
        assert again.get_valid_token(OTHER)["token"] == token  # type: ignore[index]


# Names


def test_a_file_with_two_names_is_refused(store: SQLiteUpstoxStorage, kind: Any, tmp_path: Path) -> None:
    (tmp_path / "second.db").hardlink_to(store.db_path)
    for name in ("second.db", "upstox.db"):
        with pytest.raises(ConfigurationError, match=r"has 2 names \(hard links\)"):
            kind(tmp_path / name)
    assert not (tmp_path / "second.db-wal").exists()
    (tmp_path / "second.db").unlink()
    reopened(store).close()


def test_a_path_that_is_no_ordinary_file_is_refused(kind: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(ConfigurationError, match="is not an ordinary file"):
            kind(path)


# Its locks


def locks_on(path: Path) -> int:
    """How many locks this process has on the file, as the system says."""
    inode = str(path.stat().st_ino)
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sum(line[4] == str(os.getpid()) and line[5].endswith(f":{inode}") for line in lines)


def test_nothing_takes_the_locks_of_an_open_database_away(store: SQLiteUpstoxStorage, tmp_path: Path) -> None:
    with SQLiteUpstoxStorage(tmp_path / "other.db", keys=KEY, login=made_up_login) as other:
        other.store_token(USER)
        before = [1, 1]
        assert [locks_on(one.db_path) for one in (store, other)] == before
        for path in (store.db_path, other.db_path):
            with pytest.raises(InvalidInput, match="is not an export and would be overwritten"):
                export_tokens(store, path, progress=False)
            with pytest.raises(InvalidInput, match="is a database in use"):
                import_tokens(store, path, progress=False)
            with pytest.raises(InvalidInput, match="is a database in use"):
                store.backup(path)
            with store.get_connection(), other.get_connection():
                assert [locks_on(one.db_path) for one in (store, other)] == before


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigurationError, match=r"refuses locks .* Put the database on a local disk"):
        kind(tmp_path / "upstox.db")
    assert [file.name for file in (tmp_path / "upstox.db-locks").iterdir()] == ["-schema.lock"]
    assert (tmp_path / "upstox.db").stat().st_size == 0


# Copies


def not_to_be_replaced(folder: Path) -> dict[str, Path]:
    """What a backup or an export must leave alone, by what it is."""
    (folder / "accounts.toml").write_text("[AB1234]\nmobile = '9999999999'\n")
    os.mkfifo(folder / "fifo")
    with SQLiteUpstoxStorage(folder / "closed.db", keys=KEY, login=made_up_login) as closed:
        closed.store_token(USER)
    with SQLiteUpstoxStorage(folder / "empty.db", keys=KEY):
        pass
    with SQLiteUpstoxStorage(folder / "moved.db", keys=KEY, login=made_up_login) as moved:
        moved.store_token("ZZ9999")
    (folder / "moved.db").rename(folder / "from_elsewhere.db")  # without its locks
    with bare(folder / "foreign.db") as foreign:
        foreign.execute("CREATE TABLE prices (id)")
    (folder / "link").symlink_to(folder / "accounts.toml")
    names = ("accounts.toml", "fifo", "closed.db", "empty.db", "from_elsewhere.db", "foreign.db", "link")
    return {name: folder / name for name in names}


def test_a_backup_and_an_export_replace_only_what_is_theirs(store: SQLiteUpstoxStorage, tmp_path: Path) -> None:
    for name, path in not_to_be_replaced(tmp_path).items():
        before = (path.lstat(), None if name == "fifo" else path.read_bytes())
        with pytest.raises(InvalidInput, match=r"is not an earlier copy of|is not an ordinary file"):
            store.backup(path)
        with pytest.raises(InvalidInput, match=r"is not an export|is not an ordinary file"):
            export_tokens(store, path, progress=False)
        after = (path.lstat(), None if name == "fifo" else path.read_bytes())
        assert [after[0].st_ino, after[0].st_mode, after[1]] == [before[0].st_ino, before[0].st_mode, before[1]], name
    for write in (store.backup, lambda path: export_tokens(store, path, progress=False)):
        with pytest.raises(InvalidInput, match="is not an ordinary file"):
            write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    with pytest.raises(InvalidInput, match="is not an ordinary file"):
        import_tokens(store, tmp_path / "fifo", progress=False)


def test_a_backup_and_an_export_replace_their_earlier_copy(store: SQLiteUpstoxStorage, tmp_path: Path) -> None:
    for name, write in (
        ("copy.db", store.backup),
        ("export", lambda path: export_tokens(store, path, progress=False)),
    ):
        (tmp_path / "disk").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        sizes = []
        for number in range(3):
            write(tmp_path / name)
            sizes.append((tmp_path / "disk" / name).stat().st_ino)
            store.store_token(f"EF{number:04}")
            store.revoke_token(USER)
        assert len(set(sizes)) > 1
        assert (tmp_path / name).is_symlink(), "a link is followed, and stays"
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(StoreUnavailable, match="loop cannot be written"):
            write(tmp_path / "loop")


def test_a_copy_that_got_tokens_of_its_own_is_not_replaced(store: SQLiteUpstoxStorage, tmp_path: Path) -> None:
    store.backup(tmp_path / "copy.db")
    with SQLiteUpstoxStorage(tmp_path / "copy.db", keys=KEY, login=made_up_login) as copy:
        assert copy.get_valid_token(USER), "to look into it is no use of it"
    store.backup(tmp_path / "copy.db")
    with SQLiteUpstoxStorage(tmp_path / "copy.db", keys=KEY, login=made_up_login) as copy:
        copy.store_token("ZZ9999")
    with pytest.raises(InvalidInput, match="is not an earlier copy of"):
        store.backup(tmp_path / "copy.db")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(store: SQLiteUpstoxStorage, path: str) -> None:
    for write in (store.backup, lambda path: export_tokens(store, path, progress=False)):
        with pytest.raises(InvalidInput, match="A path must be text"):
            write(path)
    with pytest.raises((InvalidInput, StoreUnavailable)):
        import_tokens(store, path, progress=False)
