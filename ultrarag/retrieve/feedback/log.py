"""The feedback log: searches that were asked to be remembered, and what people did with their hits.

A SQLite file beside the index (`feedback.sqlite3`), not part of its write log: it is no content, and deleting it loses
no passage. Clients are kept as keyed hashes, with a key that never leaves the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.retrieve.feedback.entries import (
    ACTIONS,
    OF_A_PASSAGE,
    SHOWN,
    LoggedQuery,
    check_id,
    check_time,
    hits_json,
    logged,
)
from ultrarag.retrieve.feedback.forgotten import discard_forgotten
from ultrarag.retrieve.passages import Database
from ultrarag.rows import text_key

FILE = "feedback.sqlite3"
#: Of queries of which a hit was ever clicked.
_CLICKED = "AND q.key IN (SELECT key FROM queries JOIN events USING (query_id) WHERE action = ?3)"
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


class FeedbackLog:
    """Queries and events of one index; every method may be called from any thread, and from several processes.

    An event that returned is on the disk, and its query with it. Texts and clients appear in no log line and in no
    error of this library.
    """

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

    def __enter__(self) -> FeedbackLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # what comes in

    def remember(
        self,
        queries: Sequence[tuple[str, str, Sequence[tuple[str, float]]]],
        *,
        fingerprint: str,
        generation: int,
        options: Mapping[str, Any] | None = None,
        client: str | None = None,
        at: float | None = None,
    ) -> None:
        """Remember searches of one generation.

        It survives the end of the process at once; a power cut can take those of the last moments whose events were
        not reported yet.

        Args:
            queries: (query id, text, hits as (passage id, score), best first) of each.
            fingerprint, generation: who answered.
            options: of the searches, JSON values.
            client: who asked; kept as a keyed hash.
            at: seconds since 1970; default: now.
        """
        kept = self.texts == "kept"
        check_time("at", at)
        told = json.dumps(dict(options or {}), ensure_ascii=False, sort_keys=True, default=str)
        when, who = time.time() if at is None else at, self.hashed(client)
        rows = [
            (id, when, text_key(text), text if kept else "", fingerprint, generation, told, hits_json(hits), who)
            for id, text, hits in queries
        ]
        with self._database.transaction(durable=False) as db:
            db.executemany("INSERT OR IGNORE INTO queries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def add(
        self,
        query_id: str,
        action: str,
        passage_id: str | None = None,
        *,
        client: str | None = None,
        at: float | None = None,
        event_id: str | None = None,
    ) -> None:
        """Remember what somebody did with the hits of a search; durable when it returns.

        Args:
            query_id: of the search, as in its result.
            action: one of ACTIONS.
            passage_id: of the passage that it is about; None for "answer_up" and "answer_down".
            client: who did it; default: whoever searched.
            at: seconds since 1970; default: now.
            event_id: an event with an id that is there already changes nothing, so that it can be sent again.

        Raises:
            UsageError: for an action that does not exist, a query that is not in the log (names it), and a click or
                citation of a passage that was not among the hits.
        """
        if action not in ACTIONS:
            near = did_you_mean(str(action), ACTIONS)
            raise UsageError(f"there is no feedback '{action}'; choose one of {', '.join(ACTIONS)}{near}")
        if (action in OF_A_PASSAGE) != bool(passage_id):
            wants = "the id of a passage" if action in OF_A_PASSAGE else "no passage: it is about the whole answer"
            raise UsageError(f"feedback '{action}' takes {wants}")
        for what, value in (("query", query_id), ("passage", passage_id), ("event", event_id)):
            check_id(what, value)
        check_time("at", at)
        with self._database.transaction() as db:
            asked = db.execute("SELECT hits, client FROM queries WHERE query_id = ?", (query_id,)).fetchone()
            if asked is None:
                raise UsageError(
                    f"query '{query_id}' is not in the feedback log: search with log=True, and report within the "
                    f"{self.retention_days} days for which it is kept"
                )
            if action in SHOWN and passage_id not in {id for id, _ in json.loads(asked[0])}:
                raise UsageError(f"passage '{passage_id}' was not among the hits of query '{query_id}'")
            who = asked[1] if client is None else self.hashed(client)
            when = time.time() if at is None else at
            db.execute(
                "INSERT OR IGNORE INTO events (query_id, passage_id, action, client, time, event_id) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (query_id, passage_id or "", action, who, when, event_id),
            )

    def has_event(self, query_id: str, action: str, passage_id: str | None, at: float) -> bool:
        """Whether such an event of that millisecond is here: one that is read back from an export is."""
        with self._database.reading() as db:
            found = db.execute(
                "SELECT 1 FROM events WHERE query_id = ? AND action = ? AND passage_id = ? AND abs(time - ?) < 0.001",
                (query_id, action, passage_id or "", at),
            ).fetchone()
        return found is not None

    # what goes out

    def queries(
        self, since: float | None = None, until: float | None = None, clicked: bool = False
    ) -> Iterator[LoggedQuery]:
        """Iterate over the searches, the oldest first, each with its events.

        Args:
            since, until: seconds since 1970, of the search or of one of its events; `until` is excluded.
            clicked: only those for queries of which a hit was ever clicked.
        """
        check_time("since", since)
        check_time("until", until)
        low, high = -math.inf if since is None else since, math.inf if until is None else until
        found = (
            "SELECT q.query_id, q.time, q.key, q.text, q.fingerprint, q.generation, q.options, q.hits, q.client, "
            "e.action, e.passage_id, e.client, e.time FROM queries q LEFT JOIN events e ON e.query_id = q.query_id "
            "WHERE ((q.time >= ?1 AND q.time < ?2) OR q.query_id IN "
            "(SELECT query_id FROM events WHERE time >= ?1 AND time < ?2)) "
            f"{_CLICKED if clicked else ''} "
            "ORDER BY q.time, q.query_id, e.number"
        )
        with self._database.reading() as db:
            query: LoggedQuery | None = None
            for row in db.execute(found, (low, high, *(["click"] if clicked else []))):
                if query is None or query.query_id != row[0]:
                    if query is not None:
                        yield query
                    query = logged(row)
                if row[9] is not None:
                    query.events.append((row[9], row[10], row[11], row[12]))
            if query is not None:
                yield query

    def clicked(self) -> set[tuple[int, str]]:
        """(query's key, passage id) of all clicks."""
        found = "SELECT DISTINCT key, passage_id FROM events JOIN queries USING (query_id) WHERE action = 'click'"
        with self._database.reading() as db:
            return set(db.execute(found).fetchall())

    def get(self, query_id: str) -> LoggedQuery | None:
        """One search with its events, or None."""
        columns = "query_id, time, key, text, fingerprint, generation, options, hits, client"
        with self._database.reading() as db:
            row = db.execute(f"SELECT {columns} FROM queries WHERE query_id = ?", (query_id,)).fetchone()
            if row is None:
                return None
            events = "SELECT action, passage_id, client, time FROM events WHERE query_id = ? ORDER BY number"
            query = logged(row)
            query.events.extend(db.execute(events, (query_id,)).fetchall())
        return query

    def counts(self) -> dict[str, Any]:
        """How many queries and events of each kind there are, since when, and the settings."""
        with self._database.reading() as db:
            queries, first = db.execute("SELECT count(*), min(time) FROM queries").fetchone()
            different = db.execute("SELECT count(DISTINCT key) FROM queries").fetchone()[0]
            clients = db.execute("SELECT count(DISTINCT client) FROM queries WHERE client != ''").fetchone()[0]
            events = dict(db.execute("SELECT action, count(*) FROM events GROUP BY action").fetchall())
        return {
            "searches": queries,
            "queries": different,
            "clients": clients,
            "since": first,
            "events": {action: events.get(action, 0) for action in ACTIONS},
            "retention_days": self.retention_days,
            "texts": self.texts,
        }

    # what is kept, and for how long

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
