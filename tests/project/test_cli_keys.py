"""What `upstox-db` does without the key of the store."""

from __future__ import annotations

from pathlib import Path

from upstox_db_examples import KeyRing
from upstox_db_examples.local.upstox import LocalUpstox

from ..support.command import USER, Run, good, unsaved_file


class TestWithoutTheKeyFileOfTheStore:
    """A new key could read nothing of what is stored, and a backup under it would be lost."""

    def test_no_command_makes_another_key(self, run: Run, tmp_path: Path, upstox: LocalUpstox) -> None:
        refused = good(run("token"))
        good(run("backup", "good.export"))
        file = unsaved_file(upstox.notify(USER)["access_token"])
        ids = KeyRing.from_file(tmp_path / "keys").key_ids
        (tmp_path / "keys").rename(tmp_path / "away")
        before = sorted(tmp_path.iterdir())
        for arguments in (
            ["backup", "bad.export"],
            ["--store", "restored.db", "restore", "good.export"],
            ["migrate", "upstox.db"],
            ["rotate-keys"],
            ["token"],
            ["token", "--no-login"],
            ["login", "--keep"],
            ["renew", USER],
            ["save", file],
            ["logout", USER],
        ):
            done = run(*arguments, stdin=refused)
            assert (done.returncode, done.stdout) == (3, ""), done
            told = done.stderr.splitlines()[-1]
            assert told.startswith(f"KeyUnavailable: There is no key file {tmp_path / 'keys'}. ")
            assert ids[0] in told
            assert sorted(tmp_path.iterdir()) == before, arguments
        assert upstox.logins() == 2, "one by the first command, and one by notify"
        (tmp_path / "away").rename(tmp_path / "keys")
        assert good(run("token")) == refused

    def test_login_replaces_a_lost_key(self, run: Run, tmp_path: Path) -> None:
        good(run("token"))
        (tmp_path / "keys").unlink()
        done = run("login")
        assert done.returncode == 0
        assert "Made a new key" in done.stderr
        good(run("token"))


def test_a_backup_that_nobody_could_restore_is_no_success(run: Run, tmp_path: Path) -> None:
    good(run("token"))
    good(run("backup", "all.export"))
    kept = (tmp_path / "all.export").read_bytes()
    (tmp_path / "keys").unlink()
    KeyRing.from_file(tmp_path / "keys")
    for name in ("all.export", "new.export"):
        done = run("backup", name)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("KeyUnavailable: ")
    assert (tmp_path / "all.export").read_bytes() == kept
    assert not (tmp_path / "new.export").exists()


def test_a_restore_that_fails_makes_no_store(run: Run, tmp_path: Path) -> None:
    good(run("token"))
    good(run("backup", "all.export"))
    (tmp_path / "cut.export").write_bytes((tmp_path / "all.export").read_bytes()[:300])
    done = run("--store", "restored.db", "restore", "cut.export")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("BackupDamaged: ")
    assert not (tmp_path / "restored.db").exists()
