"""`upstox-db` backup, restore and migrate."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from upstox_db_examples import SQLiteUpstoxStorage

from ..support.command import USER, Run, good, in_json


def test_a_backup_is_restored_once_and_the_second_time_nothing_is_new(run: Run) -> None:
    token = good(run("token"))
    assert good(run("backup", "all.export")) == "1 user, 1 token, 2 audit entries.\n"
    restored = "--store", "restored.db"
    assert good(run(*restored, "restore", "all.export")) == "1 user, 1 token (1 new), 2 audit entries (2 new).\n"
    assert good(run(*restored, "restore", "all.export")) == "1 user, 1 token (0 new), 2 audit entries (0 new).\n"
    assert in_json(run("restore", "all.export", "--json", *restored))["new_tokens"] == 0
    assert good(run(*restored, "token")) == token
    assert good(run("migrate", "moved.db")) == "1 user, 1 token (1 new), 2 audit entries (2 new).\n"
    assert good(run("migrate", UPSTOX_DB_TARGET="moved.db")).count("(0 new)") == 2


def test_a_path_that_is_not_there_has_to_be_fixed_first(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for arguments in (
        ["restore", "no.export"],
        ["--store", "new.db", "restore", "no.export"],
        ["restore", "file/no.export"],
        ["backup", "nowhere/all.export"],
        ["backup", "file/all.export"],
        ["backup", "--keep", "3", "nowhere/all.export"],
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (3, ""), done
        assert re.fullmatch(r"ConfigurationError: \S+ cannot be (read|written): \D+\.\n", done.stderr)
    assert sorted(tmp_path.iterdir()) == before, "a mistyped backup must make no store"


def test_in_a_deleted_folder_a_command_says_so_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTOX_DB_STORE", str(tmp_path / "upstox.db"))
    good(run("login"))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for arguments in (
        ["backup", "all.export"],
        ["backup", "--keep", "2", "all.export"],
        ["restore", "all.export"],
        ["migrate", "moved.db"],
        ["save", "some.token"],
        ["copy", "sqlite", "mine"],
        ["copy", "--minimal", "sqlite", "mine.py"],
        ["--store", "new.db", "init"],
        ["--accounts", "accounts.toml", "status"],
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (3, ""), done
        assert re.fullmatch(
            r"ConfigurationError: .*: No such file or directory\.( Nothing was copied\.)?\n", done.stderr
        )
    monkeypatch.chdir(tmp_path)


def test_what_is_no_backup_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "damaged").write_text("nothing")
    done = run("restore", "damaged")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("BackupDamaged: ")


def test_a_backup_is_not_replaced_by_one_without_tokens(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    good(run("backup", "good.export"))
    kept = (tmp_path / "good.export").read_bytes()
    good(run("backup", "--keep", "1", "good.export"))
    SQLiteUpstoxStorage(tmp_path / "new.db").close()
    # A failed login leaves a user and an audit entry, but nothing that anybody would want to restore.
    assert run("--store", "failed.db", "token", UPSTOX_PIN_CODE="000000").returncode == 3
    for store in ("new.db", "failed.db"):
        for arguments in (["good.export"], ["--keep", "1", "good.export"]):
            done = run("--store", store, "backup", *arguments)
            assert (done.returncode, done.stdout) == (3, "")
            assert re.search(r"good(-\d+-\d+)?\.export already exists, and this store has no token", done.stderr)
        assert (tmp_path / "good.export").read_bytes() == kept
        good(run("--store", store, "backup", f"{store}.export"))
    good(run("backup", "good.export"))
    assert (tmp_path / "good.export").read_bytes() != kept


def test_the_newest_backups_are_kept_and_nothing_else_is_removed(run: Run, tmp_path: Path) -> None:
    good(run("login"))
    folder = tmp_path / "backups"
    folder.mkdir()
    good(run("backup", "backups/upstox.export"))
    mine = folder / "upstox-20200101-000000.export"
    mine.write_text("a file of somebody else, with a name like a backup's")
    old = [folder / f"upstox-2021010{n}-093000.export" for n in (1, 2, 3)]
    for each in old:
        each.write_bytes((folder / "upstox.export").read_bytes())
    told = in_json(run("backup", "--keep", "2", "backups/upstox.export", "--json"))
    assert told["removed"] == [f"backups/{each.name}" for each in old[:2]]
    assert told["working_tokens"] == 1
    assert re.fullmatch(r"backups/upstox-20\d{6}-\d{6}\.export", told["file"])
    assert {each.name for each in folder.iterdir()} == {
        mine.name, "upstox.export", old[2].name, Path(told["file"]).name,
    }  # fmt: skip
    assert good(run("--store", "restored.db", "restore", told["file"])).startswith("1 user, 1 token (1 new)")
    future = folder / "upstox-29990101-000000.export"  # The clock was wrong once.
    old[2].rename(future)
    time.sleep(1)
    said = good(run("backup", "--keep", "2", "backups/upstox.export")).splitlines()
    assert said[0] == "1 user, 1 token, 2 audit entries."
    assert re.fullmatch(r"Wrote backups/upstox-\d+-\d+\.export, and removed 1 older backup\.", said[1])
    kept = {each.name for each in folder.iterdir()} - {mine.name, "upstox.export"}
    assert kept == {future.name, Path(said[1].split()[1].rstrip(",")).name}, (
        "the new one stays, whatever the clock said"
    )
    assert run("backup", "--keep", "0", "all.export").returncode == 2


def test_a_backup_says_that_no_working_token_is_in_it(run: Run) -> None:
    good(run("login"))
    assert "working" not in good(run("backup", "all.export"))
    with closing(sqlite3.connect("upstox.db")) as conn, conn:
        conn.execute("UPDATE upstox_tokens SET expires_at = 1000")
    told = good(run("backup", "all.export")).splitlines()
    assert told[1:] == ["No working token is in it: back up after the morning's login."]


def test_old_tokens_can_be_cleaned_up_and_are_counted_correctly(run: Run) -> None:
    good(run("login"))
    with closing(sqlite3.connect("upstox.db")) as conn, conn:
        conn.execute("UPDATE upstox_tokens SET expires_at = 0")
        conn.execute("UPDATE upstox_token_audit SET performed_at = 0 WHERE action = 'login'")
    assert good(run("cleanup")) == "Erased 1 dead token.\n"
    assert "login" in good(run("audit", USER)), "a cleanup must not cut the audit trail unless asked"
    assert good(run("cleanup", "--audit-days", "365")) == "Erased 0 dead tokens.\nDeleted 1 audit entry.\n"
    assert [entry["action"] for entry in in_json(run("audit", USER, "--json"))] == ["expired", "created"]
    assert in_json(run("cleanup", "--json")) == {"erased_tokens": 0, "deleted_audit_entries": None}
    assert run("cleanup", "--audit-days", "-1").returncode == 2
