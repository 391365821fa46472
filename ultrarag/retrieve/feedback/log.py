"""The feedback log: searches that were asked to be remembered, and what people did with their hits.

A SQLite file beside the index (`feedback.sqlite3`), not part of its write log: it is no content, and deleting it loses
no passage. Clients are kept as keyed hashes, with a key that never leaves the file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ultrarag.retrieve.feedback.keeping import Keeping
from ultrarag.rows import text_key

#: Of queries of which a hit was ever clicked.
_CLICKED = "AND q.key IN (SELECT key FROM queries JOIN events USING (query_id) WHERE action = ?3)"
#: Of the searches of a generation that found something: how many there are, with a click on the first, with a citation.
_SEARCHES = """
WITH counted AS (
    SELECT query_id, json_extract(hits, '$[0][0]') AS first, row_number() OVER (
        PARTITION BY key, CASE client WHEN '' THEN query_id ELSE client END ORDER BY time) AS number
    FROM queries WHERE generation = ?1 AND time >= ?2 AND time < ?3 AND hits != '[]'
)
SELECT count(*), coalesce(sum(EXISTS (
    SELECT 1 FROM events e WHERE e.query_id = c.query_id AND e.action = 'click' AND e.passage_id = c.first)), 0),
    coalesce(sum(EXISTS (SELECT 1 FROM events e WHERE e.query_id = c.query_id AND e.action = 'cite')), 0)
FROM counted c WHERE number <= ?4
"""
#: Of the votes on them, each client's last one about a query's passage or answer, counted by action.
_VOTES = """
SELECT action, count(*) FROM (
    SELECT e.action, row_number() OVER (
        PARTITION BY q.key, e.passage_id, CASE e.client WHEN '' THEN e.query_id ELSE e.client END ORDER BY e.number DESC
    ) AS number
    FROM queries q JOIN events e ON e.query_id = q.query_id
    WHERE q.generation = ?1 AND q.time >= ?2 AND q.time < ?3
    AND e.action IN ('relevant', 'not_relevant', 'unsure', 'answer_up', 'answer_down')
) WHERE number = 1 GROUP BY action
"""


class FeedbackLog(Keeping):
    """Queries and events of one index; every method may be called from any thread, and from several processes.

    An event that returned is on the disk, and its query with it. Texts and clients appear in no log line and in no
    error of this library.
    """

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

    def outcomes(self, generation: int, since: float, until: float, most: int) -> dict[str, tuple[int, int]]:
        """What became of the searches that a generation answered: of each measure (how often, of how many).

        Args:
            since, until: seconds since 1970, of the search; `until` is excluded.
            most: searches of one client that count for one query.

        Returns:
            "first hit clicked" and "a hit cited", of the searches that found something; "votes for relevant" and
            "answers voted up", of the votes, of which each client's last one counts.
        """
        span = (generation, since, until)
        with self._database.reading() as db:
            searches, clicked, cited = db.execute(_SEARCHES, (*span, most)).fetchone()
            votes = dict(db.execute(_VOTES, span).fetchall())
        good = {name: votes.get(name, 0) for name in ("relevant", "answer_up")}
        bad = {name: votes.get(name, 0) for name in ("not_relevant", "answer_down")}
        return {
            "first hit clicked": (clicked, searches),
            "a hit cited": (cited, searches),
            "votes for relevant": (good["relevant"], good["relevant"] + bad["not_relevant"]),
            "answers voted up": (good["answer_up"], good["answer_up"] + bad["answer_down"]),
        }

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
