"""Export, import and migration between the stores are whole or refused."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from upstox_db_examples import (
    BackupDamaged,
    Counts,
    InvalidInput,
    KeyRing,
    KeyUnavailable,
    PostgreSQLUpstoxStorage,
    SQLiteUpstoxStorage,
    StoreUnavailable,
    TokenRefused,
    TokenStorage,
    export_tokens,
    import_tokens,
    migrate,
)
from upstox_db_examples.local.servers import PostgreSQLServer
from upstox_db_examples.transfer import file as transfer_file

from ..support import leaks
from ..support.clocks import Clock
from ..support.postgresql import bare
from ..support.processes import KEY, Address, made_up_login
from ..support.transfers import USERS, as_it_was, filled, token_of, told

# Between the stores


@pytest.mark.parametrize("forth", [True, False], ids=["from", "to"])
def test_all_moves_between_sqlite_and_every_store(
    each_address: Address, sqlite: Address, opened: Callable[..., TokenStorage], clock: Clock, forth: bool
) -> None:
    source, target = opened(each_address), opened(sqlite)
    if not forth:
        source, target = target, source
    filled(source, clock)
    counts = migrate(source, target, progress=False)
    assert counts.users == len(USERS)
    assert counts.tokens == counts.new_tokens == 15
    assert counts.audit_entries == counts.new_audit_entries > 60
    assert [len(store.backend.list_users()) for store in (source, target)] == [4, 4]
    before = as_it_was(target)
    assert migrate(source, target, progress=False) == counts._replace(new_tokens=0, new_audit_entries=0)
    assert as_it_was(target) == before, "a second migration must change nothing"
    assert told(target) == told(source)
    target.store_token(USERS[0])
    assert target.get_token_history(USERS[0])[0]["is_active"]


def test_an_export_is_imported_into_another_store_of_its_kind(
    each_address: Address, another: Address, opened: Callable[..., TokenStorage], clock: Clock, tmp_path: Path
) -> None:
    source, target, file = filled(opened(each_address), clock), opened(another), tmp_path / "export"
    exported = export_tokens(source, file, progress=False)
    assert import_tokens(target, file, progress=False)[:3] == exported[:3]
    assert import_tokens(target, file, progress=False).new_tokens == 0
    assert told(target) == told(source)


def test_a_bar_is_shown_unless_it_is_not_wanted(
    sqlite: Address,
    another: Address,
    opened: Callable[..., TokenStorage],
    clock: Clock,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target, file = filled(opened(sqlite), clock), opened(another), tmp_path / "export"
    transfers: list[Callable[..., Counts]] = [
        lambda **shown: export_tokens(source, file, **shown),
        lambda **shown: import_tokens(target, file, **shown),
        lambda **shown: migrate(source, target, **shown),
    ]
    for transfer_all in transfers:
        transfer_all()
        assert f" {len(USERS)}/{len(USERS)} " in capsys.readouterr().err
        transfer_all(progress=False)
        assert capsys.readouterr() == ("", "")


def test_what_went_on_at_the_source_is_brought_over_by_the_next_migration(
    each_address: Address, sqlite: Address, opened: Callable[..., TokenStorage], clock: Clock
) -> None:
    source, target = filled(opened(sqlite), clock), opened(each_address)
    migrate(source, target, progress=False)
    source.store_token(USERS[0])
    source.get_valid_token(USERS[0])
    source.revoke_token(USERS[1])
    counts = migrate(source, target, progress=False)
    assert counts.new_tokens == 1
    assert told(target) == told(source)


def test_a_newer_token_of_the_target_stays(
    each_address: Address, sqlite: Address, opened: Callable[..., TokenStorage], clock: Clock, tmp_path: Path
) -> None:
    source, target, file = filled(opened(sqlite), clock), opened(each_address), tmp_path / "export"
    export_tokens(source, file, progress=False)
    import_tokens(target, file, progress=False)
    newer = target.store_token(USERS[0])["token"]
    target.revoke_token(USERS[1])
    import_tokens(target, file, progress=False)
    assert token_of(target, USERS[0]) == newer
    assert target.get_valid_token(USERS[1]) is None, "a restore must not undo a revocation"


def test_two_histories_are_not_mixed(
    sqlite: Address, tmp_path: Path, opened: Callable[..., TokenStorage], clock: Clock
) -> None:
    source = filled(opened(sqlite), clock)
    target = opened(sqlite._replace(arguments=(str(tmp_path / "target.db"),)))
    clock.advance(hours=1)
    target.store_token(USERS[3])
    before = as_it_was(target)
    with pytest.raises(InvalidInput, match=f"different histories of {USERS[3]}"):
        migrate(source, target, progress=False)
    assert as_it_was(target) == before, "the users before that one must not change either"


def test_keys_of_the_two_may_differ(
    sqlite: Address, tmp_path: Path, opened: Callable[..., TokenStorage], clock: Clock
) -> None:
    source, ring = filled(opened(sqlite), clock), KeyRing(KeyRing.new_key())
    target = opened(sqlite._replace(arguments=(str(tmp_path / "target.db"),)), keys=ring)
    migrate(source, target, progress=False)
    assert list(target.keys_in_use()) == ring.key_ids
    assert told(target) == told(source)


def test_a_changed_ciphertext_is_not_brought_over(
    sqlite: Address, tmp_path: Path, opened: Callable[..., TokenStorage]
) -> None:
    source = opened(sqlite)
    source.store_token(USERS[0])
    source.store_token(USERS[1])
    first, second = sorted(source.backend.find_under_other_keys("none", 10), key=lambda token: token.user_id)
    source.backend.replace_ciphertexts([(second, replace(second, ciphertext=first.ciphertext))])
    target = opened(sqlite._replace(arguments=(str(tmp_path / "target.db"),)))
    with pytest.raises(TokenRefused):
        migrate(source, target, progress=False)
    file = tmp_path / "export"
    with pytest.raises(TokenRefused):
        export_tokens(source, file, progress=False)
    assert not file.exists(), "nobody could import it"
    read = source.backend.read_tokens
    parts = (transfer_file.Part(user, read(user), []) for user in source.backend.each_user())
    kind, ring = source.backend.store_kind, source.cipher.ring
    transfer_file.write_export(file, kind, ring, parts, lambda: None)  # as earlier versions did
    with pytest.raises(TokenRefused):
        import_tokens(target, file, progress=False)
    assert target.backend.list_users() == [], "the users before that one must not be imported either"


# The file of an export


@pytest.fixture
def exported(sqlite: Address, opened: Callable[..., TokenStorage], clock: Clock, tmp_path: Path) -> Path:
    export_tokens(filled(opened(sqlite), clock), tmp_path / "export", progress=False)
    return tmp_path / "export"


@pytest.fixture
def empty(sqlite: Address, tmp_path: Path, opened: Callable[..., TokenStorage]) -> TokenStorage:
    return opened(sqlite._replace(arguments=(str(tmp_path / "empty.db"),)))


def test_an_export_shows_nobody_anything(exported: Path, sqlite: Address, opened: Callable[..., TokenStorage]) -> None:
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600
    store = opened(sqlite)
    token = token_of(store, USERS[0])
    content = exported.read_bytes()
    assert leaks.find("upstox_db_examples", content), "the search finds what is there"
    for secret in (token, store.get_token_history(USERS[0])[0]["email"], USERS[0], "tests", "deactivated"):
        assert not leaks.find(secret, content)


def test_an_export_that_is_cut_off_is_refused(exported: Path, empty: TokenStorage) -> None:
    whole, dice = exported.read_bytes(), random.Random(1)
    for offset in [len(whole) - 1, whole.rindex(b"\n", 0, -1) + 1, *(dice.randrange(len(whole)) for _ in range(20))]:
        exported.write_bytes(whole[:offset])
        with pytest.raises(BackupDamaged):
            import_tokens(empty, exported, progress=False)
        assert empty.backend.list_users() == []
    header, *lines = whole.decode().splitlines()
    readable = [
        KEY.decrypt(line, transfer_file.binding_of_line(header, number)) for number, line in enumerate(lines[:-1])
    ]
    assert len(readable) > 4, "each line is valid by itself, so reading line by line would accept a part as the whole"
    exported.write_bytes(whole)
    assert import_tokens(empty, exported, progress=False).users == 4


def test_an_export_that_was_changed_is_refused(exported: Path, empty: TokenStorage, tmp_path: Path) -> None:
    lines, dice = exported.read_text().splitlines(), random.Random(1)
    another_file = tmp_path / "another"
    filled_again = tmp_path / "again.db"
    with SQLiteUpstoxStorage(filled_again, keys=KEY, login=made_up_login) as store:
        store.store_token(USERS[0])
        export_tokens(store, another_file, progress=False)
    foreign = another_file.read_text().splitlines()
    changes = [
        [lines[0], lines[2], lines[1], *lines[3:]],
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[1], *lines[2:]],
        [lines[0], foreign[1], *lines[2:]],
        [foreign[0], *lines[1:]],
        [*lines, lines[-1]],
        [*lines[:-1], foreign[-1]],
        [lines[0], lines[-1]],
        lines[1:],
        [],
    ]
    for _ in range(20):
        number = dice.randrange(len(lines))
        line = lines[number]
        place = dice.randrange(len(line))
        other = "A" if line[place] != "A" else "B"
        changes.append([*lines[:number], line[:place] + other + line[place + 1 :], *lines[number + 1 :]])
    for changed in changes:
        exported.write_text("".join(f"{line}\n" for line in changed))
        with pytest.raises(BackupDamaged):
            import_tokens(empty, exported, progress=False)
        assert empty.backend.list_users() == []


def test_an_export_under_a_key_that_is_not_there_names_it(exported: Path, tmp_path: Path) -> None:
    with (
        SQLiteUpstoxStorage(tmp_path / "stranger.db", keys=KeyRing(KeyRing.new_key())) as stranger,
        pytest.raises(KeyUnavailable, match=KEY.key_ids[0]),
    ):
        import_tokens(stranger, exported, progress=False)


def test_an_export_replaces_only_an_export(
    exported: Path, sqlite: Address, opened: Callable[..., TokenStorage]
) -> None:
    store, before = opened(sqlite), exported.read_bytes()
    export_tokens(store, exported, progress=False)
    assert exported.read_bytes() != before
    token = token_of(store, USERS[0])
    with pytest.raises(InvalidInput, match="is not an export and would be overwritten"):
        export_tokens(store, sqlite.arguments[0], progress=False)
    assert token_of(store, USERS[0]) == token


def test_an_export_that_cannot_be_written_leaves_nothing(empty: TokenStorage, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be written: No such file"):
        export_tokens(empty, tmp_path / "nowhere" / "export")
    (tmp_path / "export").mkdir()
    with pytest.raises(StoreUnavailable, match="cannot be written: Is a directory"):
        export_tokens(empty, tmp_path / "export", progress=False)
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        import_tokens(empty, tmp_path / "nothing", progress=False)
    assert list(tmp_path.glob(".*")) == []


def test_a_full_disk_leaves_the_export_before_it(
    exported: Path, sqlite: Address, opened: Callable[..., TokenStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = exported.read_bytes()
    store = opened(sqlite)

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="No space left"):
        export_tokens(store, exported, progress=False)
    assert exported.read_bytes() == before
    assert list(exported.parent.glob(".*")) == []


def test_an_empty_store_makes_an_empty_export(empty: TokenStorage, tmp_path: Path) -> None:
    assert export_tokens(empty, tmp_path / "export", progress=False) == Counts()
    assert import_tokens(empty, tmp_path / "export", progress=False) == Counts()


# The databases' own backups


@pytest.mark.usefixtures("own_servers")
def test_pg_dump_and_a_restore_keep_all_and_show_no_token(clock: Clock) -> None:
    options: dict[str, Any] = {"keys": KEY, "login": made_up_login, "clock": clock}
    with PostgreSQLServer() as server:
        tools, second = server.binaries, f"{server.url}_restored"
        with PostgreSQLUpstoxStorage(server.url, **options) as store:
            expected = told(filled(store, clock))
            secret = token_of(store, USERS[0])
            expected = told(store)
            dump = subprocess.run([str(tools / "pg_dump"), server.url], check=True, capture_output=True).stdout
            expected_again = as_it_was(store)
        assert leaks.find("upstox_token_audit", dump)
        assert not leaks.find(secret, dump)
        conn = PostgreSQLUpstoxStorage(server.url, **options)
        with conn.get_connection() as plain, plain.cursor() as cursor:
            plain.autocommit = True
            cursor.execute("CREATE DATABASE postgres_restored")
        conn.close()
        command = [str(tools / "psql"), "-v", "ON_ERROR_STOP=1", "-q", "-o", os.devnull, second]
        subprocess.run(command, check=True, input=dump, capture_output=True)
        with PostgreSQLUpstoxStorage(second, **options) as restored:
            assert as_it_was(restored) == expected_again
            assert told(restored)[0][-1] == expected[0][-1] == secret
        assert bare(second, "SELECT count(*) AS n FROM pg_indexes WHERE indexname = 'one_active_token'") == [{"n": 1}]
