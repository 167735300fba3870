"""Pattern 1: SQLite. One file on one machine, any number of processes and threads."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import AbstractContextManager
from typing import ClassVar, Unpack

from ..core.environment import expand_home
from ..core.errors import ConfigurationError
from ..core.files import resolve_target, write_whole
from ..core.settings import Options, Settings
from ..core.store import TokenStorage
from .backend import SQLiteBackend
from .connections import SQLiteConnections, hide_path, resolve_path, translate_error
from .copies import refuse_what_is_no_copy

logger = logging.getLogger(__name__)


class SQLiteUpstoxStorage(TokenStorage):
    """Tokens in a SQLite file.

    Args:
        db_path: the file. It is made with mode 0600 if it is missing. It must not be on a network file system.
        audit_reads: count each token that is handed out, and write it to the audit trail. This is off by default:
            a read then writes nothing, and does not wait for other writers.
        options: see `Options`.

    Attributes:
        db_path: the file, without symbolic links.

    Raises:
        ConfigurationError: the path cannot be used, or the file holds something else.

    Example:
        >>> from upstox_db_examples import SQLiteUpstoxStorage
        >>> with SQLiteUpstoxStorage("upstox.db") as storage:
        ...     result = storage.get_or_create_token("AB1234")
        ...     storage.backup("copy.db")
        >>> with SQLiteUpstoxStorage("copy.db") as copy:
        ...     copy.get_valid_token("AB1234")["token"] == result["token"]
        True
    """

    backend: SQLiteBackend
    backend_class: ClassVar = SQLiteBackend

    def __init__(
        self, db_path: str | os.PathLike[str] = "upstox.db", *, audit_reads: bool = False, **options: Unpack[Options]
    ) -> None:
        place = hide_path(db_path)
        del db_path
        settings = Settings(type(self).__name__, options)
        self._open(SQLiteConnections(resolve_path(place, create=settings.create)), settings, audit_reads)

    def _open(self, connections: SQLiteConnections, settings: Settings, audit_reads: bool) -> None:
        self.db_path, self._connections = connections.path, connections
        super().__init__(self.backend_class(connections, settings.context, audit_reads=audit_reads), settings)

    def get_connection(self) -> AbstractContextManager[sqlite3.Connection]:
        """Lend a connection in autocommit mode. A transaction that is left open is rolled back.

        An error that your own code raises inside, SQLite's errors included, comes out as it is.

        Raises:
            StoreUnavailable, ConfigurationError: there is no connection to lend.
        """
        return self._connections.lend(translate=False)

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the database as it is now, while others read and write. Open the copy like any other database.

        The copy is complete or missing: it gets its name, and replaces an older copy, only once it is on the disk.
        A symbolic link is followed: the copy is where it leads.

        Raises:
            InvalidInput: something that is not an earlier copy of this database has that name.
            StoreUnavailable: the copy cannot be written there.
        """
        target = resolve_target(expand_home(path))
        with self._connections.lend() as conn:
            refuse_what_is_no_copy(conn, self.db_path, target)
        with write_whole(target) as temporary, self._connections.lend() as conn:
            copy = sqlite3.connect(temporary, isolation_level=None)
            try:
                conn.backup(copy)  # In one step. Otherwise it would start over whenever somebody writes.
                if copy.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                    raise sqlite3.DatabaseError
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.OperationalError):  # The destination failed: a full disk, for one.
                    raise translate_error(error, target) from error
                raise ConfigurationError(
                    f"{self.db_path} is damaged, and its copy would be too. Restore an older backup."
                ) from error
            finally:
                copy.close()
        logger.info("Copied %s to %s", self.db_path, path)
