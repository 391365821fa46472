"""The SQLite file under an index: one durable writer, a pool of readers, and errors that name the file."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrarag.errors import IndexStateError
from ultrarag.io import resource_error

FORMAT = 1
#: Seconds that a connection waits for another one's write.
TIMEOUT = 10
#: Connections that are kept for the next reader: each has memory of its own, and a new one takes 0.2 ms.
IDLE = 8
#: KiB that a reader remembers of the file, which the system remembers as well; SQLite's default is 2,000.
CACHE_KB = 256
#: SQLite cannot create the index of its write-ahead log.
_NO_LOG_INDEX = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL}

logger = logging.getLogger("ultrarag")

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
-- A deleted passage stays as a tombstone, without its content, until `vacuum`.
CREATE TABLE passages (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, title TEXT NOT NULL, metadata TEXT NOT NULL,
    hash BLOB NOT NULL, seq INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0
);
-- What happened, in order: 'content' (new or changed text), 'metadata' (nothing else changed), 'delete'.
CREATE TABLE log (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, op TEXT NOT NULL, hash BLOB NOT NULL);
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL, state TEXT NOT NULL, backend TEXT NOT NULL,
    heads TEXT NOT NULL, precision TEXT NOT NULL, base_seq INTEGER NOT NULL, applied_seq INTEGER NOT NULL,
    created TEXT NOT NULL, forced INTEGER NOT NULL DEFAULT 0, metrics TEXT NOT NULL DEFAULT '{}'
);
-- Never two live ones, nor two to roll back to, whatever the code does.
CREATE UNIQUE INDEX one_live ON generations (state) WHERE state IN ('live', 'previous');
"""

#: Came later than format 1; an older version does not look at it, a file without it gets it when it is next written to.
UNENCODED = """
CREATE TABLE IF NOT EXISTS unencoded (
    generation INTEGER NOT NULL, id TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (generation, id)
)
"""
#: The number of passages, kept by the file itself whoever writes to it: to count ten million takes seconds. As
#: UNENCODED, it came later than format 1; who opens an older file for writing adds it.
COUNTED = (
    "CREATE TABLE counted (passages INTEGER NOT NULL)",
    "INSERT INTO counted SELECT count(*) FROM passages WHERE deleted = 0",
    "CREATE TRIGGER counted_new AFTER INSERT ON passages WHEN NEW.deleted = 0 "
    "BEGIN UPDATE counted SET passages = passages + 1; END",
    "CREATE TRIGGER counted_changed AFTER UPDATE OF deleted ON passages WHEN NEW.deleted != OLD.deleted "
    "BEGIN UPDATE counted SET passages = passages + OLD.deleted - NEW.deleted; END",
    "CREATE TRIGGER counted_gone AFTER DELETE ON passages WHEN OLD.deleted = 0 "
    "BEGIN UPDATE counted SET passages = passages - 1; END",
)


class Database:
    """Connections to one file; every commit is on the disk when it returns (WAL, synchronous=FULL).

    Writes take turns on one connection; reads run beside them, each thread on a connection of its own while it reads,
    and see the last commit.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self.lock = threading.RLock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        #: what the writer does now; it is opened so
        self._durable = True
        #: called with what a transaction has done, before that is kept; an error undoes it
        self.before_commit: Callable[[sqlite3.Connection], None] | None = None
        #: called when a transaction was undone, maybe after `before_commit`
        self.after_rollback: Callable[[], None] | None = None
        with named_errors(path):
            self._writer = None if read_only else self._connect()

    @classmethod
    def create(cls, path: Path) -> Database:
        """Create the file with empty tables."""
        database = cls(path)
        with database.transaction() as db:
            for statement in (*_TABLES.split(";"), *COUNTED):
                db.execute(statement)
            db.execute("INSERT INTO meta VALUES ('format', ?)", (str(FORMAT),))
        return database

    @classmethod
    def open(cls, path: Path, read_only: bool = False) -> Database:
        """Open an existing file.

        Raises:
            IndexStateError: when it is missing, damaged, or of another version.
        """
        if not path.is_file():
            raise IndexStateError(
                f"'{path.parent}' holds no index ('{path.name}' is missing); LiveIndex.create (ultrarag index create) "
                "makes one"
            )
        database = cls(path, read_only)
        try:
            with database.reading() as db:
                row = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
            if row is None or row[0] != str(FORMAT):
                found = row[0] if row else "none"
                raise IndexStateError(f"'{path}' has format {found}; this version of ultrarag reads format {FORMAT}")
            if not read_only:
                database._keep_count()
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Write all or nothing; committed durably when the block ends.

        Without `durable` it survives the end of this process, and a power cut from the next durable one on.
        """
        with self.lock, named_errors(self.path):
            db = self._writing()
            self._flush_commits(db, durable)
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                if self.before_commit is not None:
                    self.before_commit(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if self.after_rollback is not None:
                    self.after_rollback()
                raise

    def _flush_commits(self, db: sqlite3.Connection, durable: bool) -> None:
        """Say whether a commit waits for the disk, where the last one on this connection was another kind."""
        if durable != self._durable:
            db.execute("PRAGMA synchronous=" + ("FULL" if durable else "NORMAL"))
            self._durable = durable

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for reading."""
        with named_errors(self.path):
            if self._closed:
                raise IndexStateError(f"'{self.path}' was closed; open it again")
            try:
                db = self._idle.pop()
            except IndexError:
                db = self._connect()
                db.execute(f"PRAGMA cache_size=-{CACHE_KB}")
            try:
                yield db
            finally:
                if self._closed or len(self._idle) >= IDLE:
                    db.close()
                else:
                    self._idle.append(db)

    def vacuum(self, patience: float = 0.0) -> bool:
        """Give free pages back to the file system; return whether all were, for a reader keeps those that it sees.

        Args:
            patience: seconds to wait for readers; writers wait meanwhile.
        """
        with self.lock, named_errors(self.path):
            db = self._writing()
            db.execute("VACUUM")
            db.execute(
                f"PRAGMA busy_timeout={int(patience * 1000)}"
            )  # whoever reads in another process may do so for long
            try:
                busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                db.execute(f"PRAGMA busy_timeout={TIMEOUT * 1000}")
        if busy:
            logger.warning(
                "'%s' is compacted, but another process or thread is reading it: its old pages are given back when "
                "the last reader has left, at the next vacuum or close",
                self.path,
            )
        return not busy

    def close(self) -> None:
        """Close all connections; closing twice is harmless."""
        with self.lock:
            self._closed = True
            while self._idle:
                self._idle.pop().close()
            if self._writer is not None:  # last, so that it folds the log into the file
                self._writer.close()
                self._writer = None

    def _keep_count(self) -> None:
        """Have an older file keep the number of its passages."""
        with self.reading() as db:
            there = _has_count(db)
        if not there:
            with self.transaction() as db:
                for statement in COUNTED:
                    db.execute(statement)

    def _writing(self) -> sqlite3.Connection:
        if self._writer is None:
            raise IndexStateError(f"'{self.path}' " + ("is open for reading" if self.read_only else "was closed"))
        return self._writer

    def _connect(self) -> sqlite3.Connection:
        if self.read_only:
            return connect_for_reading(self.path)
        return connect(self.path, "mode=rwc", "PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL")


def counted(db: sqlite3.Connection) -> int:
    """The number of passages; they are counted in an older file that was never opened for writing since."""
    kept = _has_count(db)
    query = "SELECT passages FROM counted" if kept else "SELECT count(*) FROM passages WHERE deleted = 0"
    return int(db.execute(query).fetchone()[0])


def _has_count(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'counted'").fetchone() is not None


def connect_for_reading(path: Path) -> sqlite3.Connection:
    """Connect to a file that is only read, also where nothing can be written beside it.

    SQLite shares the index of the write-ahead log between processes, in a file that it creates. Where it cannot,
    this process makes an index of its own in memory; and where there is no log, all is in the file. Both suppose that
    nobody writes meanwhile.
    """
    try:
        return connect(path, "mode=ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in _NO_LOG_INDEX:
            raise
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        vfs = "win32-none" if os.name == "nt" else "unix-none"
        return connect(path, f"mode=ro&vfs={vfs}", "PRAGMA locking_mode=EXCLUSIVE")
    return connect(path, "mode=ro&immutable=1")


def connect(path: Path, options: str, *settings: str) -> sqlite3.Connection:
    """Connect to a file, for any thread, and look into it; `options` are those of SQLite's URIs."""
    uri = f"{path.absolute().as_uri()}?{options}"
    db = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None, timeout=TIMEOUT)
    try:
        for statement in (*settings, "PRAGMA schema_version"):
            db.execute(statement).fetchall()
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Say which file an error of SQLite is about, and what is left of the data."""
    try:
        yield
    except sqlite3.Error as error:
        if found := resource_error(error, path):
            raise found from error
        raise IndexStateError(f"'{path}': {error}; {_advice(error)}") from error


def _advice(error: sqlite3.Error) -> str:
    text = str(error)
    if "disk I/O" in text:
        return "make room on the disk, or it fails; what was acknowledged before is kept, nothing of this write is"
    if "malformed" in text or "not a database" in text:
        return "the file is damaged: restore it from a copy (vectors can be rebuilt, passages cannot)"
    return "nothing of this call was written"
