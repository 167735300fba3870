"""Connections to a SQLite file. They are reused, a forked child gets its own, and SQLite's errors become ours."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..core.addresses import looks_like_no_file
from ..core.environment import expand_home
from ..core.errors import ConfigurationError, DatabaseMissing, InvalidInput, StorageError, StoreUnavailable
from ..core.files import Identity, identity_of
from ..core.pool import Pool, PoolTimeout
from ..core.token import Secret
from .forks import Connection, close_before_forks, is_pending

logger = logging.getLogger(__name__)

BUSY_SECONDS = 5.0  # how long a statement waits for another writer
# While another thread is reading, a read waits for this many seconds, at most so many times. SQLite gives Python's lock
# away several times in each read, so 32 threads that read at the same time mostly take the lock from each other, and
# together read a third of what one thread does.
TURN, TURNS = 0.005, 4


class SQLiteConnections:
    """Open as many connections as there are callers at once, and keep them. Safe to share between threads.

    One connection per thread would be worse: it would stay open after its thread has ended.

    Args:
        path: the database file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._name = path, str(path)
        self._idle: deque[Connection] = deque()  # The last one used is on top.
        self._closed = False
        self.is_reading = False  # a thread is in the middle of a read
        # A pool with one place is a lock that is fair, can time out, and survives Ctrl-C and a fork.
        self.writers = Pool(object, lambda _: None, size=1, timeout=BUSY_SECONDS)
        self._identity: Identity | None = None  # which file it is, as soon as a connection has opened it
        # As in the guide, you need not close a store: its connections are closed when it is garbage-collected.
        weakref.finalize(self, _close_all, self._idle)
        close_before_forks(self)

    def lend(self, *, translate: bool = True) -> AbstractContextManager[Connection]:
        """Lend a connection in autocommit mode. A transaction that is left open is rolled back.

        Args:
            translate: turn SQLite's errors inside into ours. With False, only those of lending are: a caller's own code
                runs inside, and its error may come from another database.

        Raises:
            StoreUnavailable, ConfigurationError: the translation of SQLite's error.
        """
        return _Lent(self, translate)

    def read(self, sql: str, values: tuple[object, ...]) -> list[sqlite3.Row]:
        """Return the rows of a SELECT. This does what `lend` does, in half the time: every read comes through here.

        Raises:
            StoreUnavailable, ConfigurationError: the translation of SQLite's error.
        """
        for _ in range(TURNS):
            if not self.is_reading:
                break
            time.sleep(TURN)
        # Not a lock: Ctrl-C could leave it locked. A wrong value here costs one read these pauses.
        self.is_reading = True
        try:
            return self._read(sql, values)
        except sqlite3.Error as error:
            raise translate_error(error, self.path) from error
        finally:
            self.is_reading = False

    @contextmanager
    def turn_to_write(self) -> Iterator[None]:
        """Hold the turn to write. SQLite lets its writers sleep and try again; in here they have a queue.

        Raises:
            StoreUnavailable: the other writers of this process took too long.
        """
        try:
            with self.writers.borrow():
                yield
        except PoolTimeout as error:
            raise StoreUnavailable(f"{self.path} {_TRANSLATIONS['SQLITE_BUSY'][1]}") from error

    def close(self) -> None:
        self._closed = True
        self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that nobody uses now."""
        _close_all(self._idle)

    def count_idle(self) -> int:
        """Return how many connections are open and free."""
        return len(self._idle)

    def refuse_if_closed(self) -> None:
        """
        Raises:
            StoreUnavailable: the store is closed.
        """
        if self._closed:
            raise StoreUnavailable("This store is closed.")

    def refuse_another_file(self) -> None:
        """Notice that the database was moved, deleted or replaced: SQLite would go on with the old file.

        Raises:
            ConfigurationError: it was.
        """
        if self._identity is not None and (now := identity_of(self._name)) != self._identity:
            raise ConfigurationError(
                f"{self.path} was {'replaced' if now else 'moved or deleted'} while this program had it open, so what "
                f"is written now might be lost. Stop every program that uses it, see that the right file is there, "
                f"without {self.path.name}-wal and {self.path.name}-shm of another one, and start them again."
            )

    def remember_file(self) -> None:
        """Remember which file it is. A connection is open: on a layered file system, that may change the inode."""
        if self._identity is None:
            self._identity = identity_of(self.path)

    def refuse_another_log(self, conn: Connection) -> None:
        """Notice that the log was deleted or replaced while this connection had it open. The caller is writing.

        Raises:
            StoreUnavailable: it was. The connection must be closed.
        """
        now = identity_of(f"{self._name}-wal") or (0, 0)
        if conn.log is None:
            conn.log = now
        elif conn.log != now:
            raise StoreUnavailable(
                f"{self.path}-wal was deleted or replaced while this program had it open, so what was written last "
                "might be lost. Try again. Nobody may delete that file, and a program that has the database open may "
                "not open and close its file by other means, as to copy it."
            )

    def _read(self, sql: str, values: tuple[object, ...]) -> list[sqlite3.Row]:
        conn = self._take()
        try:
            rows = conn.execute(sql, values).fetchall()
        except BaseException:
            conn.close()
            raise
        self._give_back(conn)
        return rows

    def _take(self) -> Connection:
        self.refuse_if_closed()
        self.refuse_another_file()
        try:
            conn = self._idle.pop()
        except IndexError:
            conn = open_connection(self.path)
            self.remember_file()
        conn.thread = threading.get_ident()
        return conn

    def _give_back(self, conn: Connection) -> None:
        if conn.inherited:
            return
        conn.rollback()
        conn.thread = None
        if self._closed or is_pending():
            conn.close()
        else:
            self._idle.append(conn)


class _Lent:
    """A connection on loan. This is a class, because a generator takes three times as long to enter and leave."""

    __slots__ = ("_conn", "_connections", "_translate")

    def __init__(self, connections: SQLiteConnections, translate: bool) -> None:
        self._connections, self._translate = connections, translate

    def __enter__(self) -> Connection:
        try:
            self._conn = self._connections._take()
        except sqlite3.Error as error:
            raise translate_error(error, self._connections.path) from error
        return self._conn

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            try:
                self._connections._give_back(self._conn)
            except sqlite3.Error as failed:
                self._conn.close()
                raise translate_error(failed, self._connections.path) from failed
            return
        self._conn.close()  # This rolls back. We do not reuse a connection that saw an error.
        if self._translate and isinstance(error, sqlite3.Error):
            raise translate_error(error, self._connections.path) from error


def open_connection(path: Path) -> Connection:
    """Open a new connection to a file that exists."""
    conn = Connection(path, BUSY_SECONDS)
    conn.row_factory = sqlite3.Row
    try:
        # With NORMAL instead of FULL, a power cut loses tokens that were already reported as stored.
        conn.executescript("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
    except sqlite3.Error:
        conn.close()
        raise
    return conn


def _close_all(idle: deque[Connection]) -> None:
    while idle:
        idle.pop().close()


_NO_FILE = (
    "db_path must be the path of a file, without quotes, ? or line breaks around or in it. This one looks like a "
    "connection string, so no file was made. open_store() and upstox-db take addresses such as sqlite:///upstox.db and "
    "postgresql://user:password@host/database."
)


def hide_path(db_path: object) -> Secret:
    """Wrap the path. A connection string given by mistake must not show in a traceback that prints local variables."""
    text = os.fspath(db_path) if isinstance(db_path, str | os.PathLike) else ""
    return Secret(text if isinstance(text, str) else "")


def resolve_path(db_path: str | os.PathLike[str] | Secret, *, create: bool = True) -> Path:
    """Resolve the path, and make its file with mode 0600 if it is missing. SQLite itself would use the umask.

    The WAL and shared memory files take the mode of the database.

    Args:
        create: with False, raise `DatabaseMissing` if there is no file.
    """
    given = db_path if isinstance(db_path, Secret) else hide_path(db_path)
    del db_path
    text = given.reveal()
    if not text or "\0" in text or text.startswith((":memory:", "file:")):
        raise InvalidInput("db_path must be the path of a file. A database in memory would end with the process.")
    try:
        # Resolve symbolic links: two names for one file would mean two locks, and so two logins at once.
        path = expand_home(text)
        if looks_like_no_file(text) and not path.exists():  # An earlier version may have made such a file.
            del text, path
            raise InvalidInput(_NO_FILE)
        path = path.resolve()
        if path.is_dir():
            raise ConfigurationError(f"{path} is a folder. db_path must be the path of a file.")
        if not create and not path.exists():
            raise DatabaseMissing(f"{path} does not exist.")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            logger.info("Made %s", path)
        except FileExistsError:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ConfigurationError(
                    f"{path} is not an ordinary file. db_path must be the path of a file."
                ) from None
            if found.st_nlink > 1:
                raise ConfigurationError(
                    f"{path} has {found.st_nlink} names (hard links). SQLite would keep a log for each name, and each "
                    f"would lack what is in the other. Delete the other names; this finds them on the same disk: "
                    f"find / -xdev -samefile {shlex.quote(str(path))}"
                ) from None
            if found.st_mode & 0o077:
                run = f"chmod 600 {shlex.quote(str(path))}"
                logger.warning("Others can access %s, which holds names and histories. Run: %s", path, run)
    except (OSError, RuntimeError) as error:  # Python 3.12 raises RuntimeError for a loop of links.
        reason = getattr(error, "strerror", None) or "its symbolic links form a loop"
        raise ConfigurationError(f"{text} cannot be created: {reason}.") from error
    return path


def refuse_cut_off(conn: sqlite3.Connection, path: Path) -> None:
    """Refuse a file whose last page is incomplete. SQLite itself notices only when whole pages are missing.

    Raises:
        ConfigurationError: the file was cut off, for example by a copy that did not finish.
    """
    page: int = conn.execute("PRAGMA page_size").fetchone()[0]
    wal = Path(f"{path}-wal")  # It may hold pages that are not in the file yet.
    if path.stat().st_size % page and not (wal.exists() and wal.stat().st_size):
        raise ConfigurationError(f"{path} {_TRANSLATIONS['SQLITE_CORRUPT'][1]}")


def translate_error(error: sqlite3.Error, path: Path) -> StorageError:
    """Translate an error of SQLite into one of ours that says what to do."""
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    for start, (kind, what) in _TRANSLATIONS.items():
        if name.startswith(start):
            return kind(f"{path} {what}")
    return StoreUnavailable(f"{path}: SQLite failed ({name}). Try again.")


_TRANSLATIONS: dict[str, tuple[type[StorageError], str]] = {
    "SQLITE_BUSY": (StoreUnavailable, f"was locked by another writer for {BUSY_SECONDS:.0f} s. Try again."),
    "SQLITE_FULL": (StoreUnavailable, "cannot grow because the disk is full. Free some space and try again."),
    "SQLITE_IOERR": (StoreUnavailable, "is on a disk that failed or is full. Fix that and try again."),
    "SQLITE_READONLY": (ConfigurationError, "cannot be written. Check the mode and owner of the file and its folder."),
    "SQLITE_CANTOPEN": (ConfigurationError, "cannot be opened. Check the mode and owner of the file and its folder."),
    "SQLITE_NOTADB": (ConfigurationError, "is not a SQLite database. Choose another file."),
    "SQLITE_CORRUPT": (
        ConfigurationError,
        "is damaged. Stop every program that uses it, move it away together with its -wal and -shm, and then restore a "
        "backup or log in again.",
    ),
}
