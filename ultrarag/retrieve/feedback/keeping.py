"""The file of a feedback log: its tables and settings, how long what is in it is kept, and how it is forgotten."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from pathlib import Path
from typing import Any, Self

from ultrarag.errors import UsageError
from ultrarag.retrieve.feedback.entries import check_time
from ultrarag.retrieve.feedback.forgotten import discard_forgotten
from ultrarag.retrieve.passages import Database

FILE = "feedback.sqlite3"
#: Days after which queries and their events are deleted, unless another number is set.
RETENTION_DAYS = 180
MOST_DAYS = 1_000_000
#: Days for which the rows of a refresh are left when a query of theirs has become too old, so that it can go on.
DAYS_OF_ROWS = 7
#: Seconds to wait for who reads what is being deleted.
READER_SECONDS = 5.0
#: Note that what was deleted is still in the file.
_UNCLEAN = "unclean"
TEXTS = ("kept", "hashed")

_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS queries (
        query_id TEXT PRIMARY KEY, time REAL NOT NULL, key INTEGER NOT NULL, text TEXT NOT NULL,
        fingerprint TEXT NOT NULL, generation INTEGER NOT NULL, options TEXT NOT NULL, hits TEXT NOT NULL,
        client TEXT NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS events (
        number INTEGER PRIMARY KEY, query_id TEXT NOT NULL, passage_id TEXT NOT NULL, action TEXT NOT NULL,
        client TEXT NOT NULL, time REAL NOT NULL, event_id TEXT UNIQUE
    )""",
    "CREATE INDEX IF NOT EXISTS events_of_query ON events (query_id)",
    "CREATE INDEX IF NOT EXISTS queries_by_time ON queries (time)",
    "CREATE INDEX IF NOT EXISTS queries_by_client ON queries (client)",
)


class Keeping:
    """What `FeedbackLog` offers of its file beside what comes in and goes out."""

    def __init__(self, path: Path) -> None:
        """Open the file, and make it where it is missing.

        Raises:
            ResourceError: the folder cannot be written.
            IndexStateError: the file is damaged.
        """
        self._database = Database(path)
        try:
            with self._database.transaction() as db:
                for statement in _TABLES:
                    db.execute(statement)
                db.execute("INSERT OR IGNORE INTO settings VALUES ('key', ?)", (secrets.token_hex(32),))
            self._key = bytes.fromhex(str(self._setting("key", "")))
        except BaseException:
            self._database.close()
            raise

    @property
    def path(self) -> Path:
        """The file."""
        return self._database.path

    def close(self) -> None:
        """Close the file; twice is harmless."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def retention_days(self) -> int:
        """Days after which a query and its events are deleted; 0: never."""
        return int(self._setting("retention_days", str(RETENTION_DAYS)))

    @property
    def texts(self) -> str:
        """ "kept", or "hashed": equal queries are still counted as one, and none can be read or trained on."""
        return self._setting("texts", TEXTS[0])

    def set(self, retention_days: int | None = None, texts: str | None = None) -> None:
        """Change what is kept. "hashed" also removes the texts that are there, fewer days what is older.

        Raises:
            UsageError: for days that are no whole number of at least 0, and texts that are neither "kept" nor "hashed".
        """
        whole = isinstance(retention_days, int) and not isinstance(retention_days, bool)
        if retention_days is not None and not (whole and 0 <= retention_days <= MOST_DAYS):
            raise UsageError(f"retention_days is {retention_days!r}: give a whole number of days, or 0 to keep all")
        if texts is not None and texts not in TEXTS:
            raise UsageError(f"texts is '{texts}': choose 'kept' or 'hashed'")
        with self._database.transaction() as db:
            for name, value in (("retention_days", retention_days), ("texts", texts)):
                if value is not None:
                    self._store(db, name, str(value))
            if texts == "hashed":
                db.execute("UPDATE queries SET text = ''")
        if texts == "hashed":
            self._gone()  # or the texts would stay in pages that are free
        self.expire()

    def forget(self, *, client: str | None = None, before: float | None = None) -> int:
        """Delete what a client did, or what is older than a time, for good; return how many searches that were.

        What is deleted cannot be read in the file either; where somebody reads it for longer than five seconds, only
        after the next `expire`, which an open index calls every hour. A checkpoint that was trained on it stays.

        Args:
            client: as it was given; both its searches and its events go.
            before: seconds since 1970.

        Raises:
            UsageError: for neither or both, an empty client (nobody was named then), and a time that is no number.
        """
        if (client is None) == (before is None) or client == "":
            raise UsageError("forget takes a client, or a time before which all is deleted")
        check_time("before", before)
        return self._forget(client, before)

    def _forget(self, client: str | None, before: float | None, days: float = 0) -> int:
        with self._database.transaction() as db:
            if client is not None:
                who = self.hashed(client)
                db.execute("DELETE FROM events WHERE client = ?", (who,))
                gone = db.execute("DELETE FROM queries WHERE client = ? AND client != ''", (who,)).rowcount
            else:
                gone = db.execute("DELETE FROM queries WHERE time < ?", (before,)).rowcount
            db.execute("DELETE FROM events WHERE query_id NOT IN (SELECT query_id FROM queries)")
        self._gone(days)
        return int(gone)

    def _gone(self, days: float = 0) -> None:
        """Let nothing of what was deleted be read in a file: pages that are free, the rows of refreshes."""
        clean = self._database.vacuum(patience=READER_SECONDS)
        if clean == bool(self.noted(_UNCLEAN)):  # somebody reads for long: `expire` comes back to it
            self.note(_UNCLEAN, not clean)
        with self._database.reading() as db:
            known = {key for (key,) in db.execute("SELECT DISTINCT key FROM queries WHERE text != ''")}
        discard_forgotten(self.path.parent, known, days)

    def expire(self, now: float | None = None) -> int:
        """Delete what is older than `retention_days`; return how many searches that were.

        What was deleted while somebody read, and so is still in the file, is removed from it now.
        """
        if self.noted(_UNCLEAN):
            self._gone(DAYS_OF_ROWS)
        days = self.retention_days
        if not days:
            return 0
        limit = (time.time() if now is None else now) - days * 86400
        with self._database.reading() as db:
            if db.execute("SELECT 1 FROM queries WHERE time < ? LIMIT 1", (limit,)).fetchone() is None:
                return 0
        return self._forget(None, limit, DAYS_OF_ROWS)

    def note(self, name: str, value: Any) -> None:
        """Keep a JSON value of the schedule's."""
        with self._database.transaction() as db:
            self._store(db, f"note.{name}", json.dumps(value))

    def noted(self, name: str, default: Any = None) -> Any:
        """What `note` has kept."""
        return json.loads(self._setting(f"note.{name}", json.dumps(default)))

    def _setting(self, name: str, default: str) -> str:
        with self._database.reading() as db:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    @staticmethod
    def _store(db: sqlite3.Connection, name: str, value: str) -> None:
        db.execute(
            "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
        )

    def hashed(self, client: str | None) -> str:
        """The hash of a name, keyed, so that nobody who has only the hashes can try names; "" for nobody."""
        if client is None or client == "":
            return ""
        return hashlib.blake2b(str(client).encode("utf-8", "surrogatepass"), key=self._key, digest_size=12).hexdigest()
