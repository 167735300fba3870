"""Which file a copy of the database may replace: an earlier copy of this database, and nothing else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.files import identity_of, is_open_database

# Rows of this table are never deleted, so a copy holds no token that its database lacks.
TOKENS = "SELECT user_id, generation, created_at FROM upstox_tokens"


def refuse_what_is_no_copy(conn: sqlite3.Connection, path: Path, target: Path) -> None:
    """Refuse to replace what is not an earlier copy of this database.

    Args:
        conn: to the database that is copied.
        path: the path of this database.
        target: where the copy goes. Symbolic links are resolved.

    Raises:
        InvalidInput: something else is there, or its log is: SQLite would apply that to the copy, and destroy it.
    """
    logs = any(Path(f"{target}{end}").exists() for end in ("-wal", "-journal"))
    if logs or identity_of(target) == identity_of(path) or is_open_database(target):
        raise InvalidInput(f"{target} is a database in use. Choose another file for the copy.")
    if not target.is_file() or not target.stat().st_size:
        return
    # Nobody has logged in to a copy. Without this file, what it holds tells.
    if not Path(f"{target}-locks").exists():
        try:
            # Immutable: SQLite leaves no log and no lock beside the file.
            there = sqlite3.connect(f"{target.as_uri()}?mode=ro&immutable=1", uri=True)
            with closing(there):
                if set(there.execute(TOKENS)) <= {tuple(row) for row in conn.execute(TOKENS)}:
                    return
        except sqlite3.Error:
            pass  # It is another kind of file, or a damaged one.
    raise InvalidInput(
        f"{target} is not an earlier copy of {path} and would be replaced. Choose another file for the copy, or move "
        "that one away."
    )
