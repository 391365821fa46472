"""Feedback in the names of OpenSearch's User Behavior Insights (UBI 1.3), in and out, as lines of JSON.

A line with `action_name` is an event, one with `user_query` a query. What UBI has no name for (scores, fingerprint,
generation, options) travels in `query_attributes`. Clients go out as hashes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultrarag.errors import DataError, UsageError
from ultrarag.io import replacing
from ultrarag.retrieve.feedback.entries import ACTIONS
from ultrarag.retrieve.feedback.log import FeedbackLog

APPLICATION = "ultrarag"
#: Names that other collectors give to what we call otherwise.
ALIASES = {
    "item_click": "click",
    "product_click": "click",
    "thumbs_up": "answer_up",
    "thumbs_down": "answer_down",
    "citation": "cite",
}


def export_ubi(log: FeedbackLog, path: str | Path, since: float | None = None) -> dict[str, int]:
    """Write the log as lines of JSON, each query before its events; the file appears whole.

    Returns:
        how many "queries" and "events" were written.
    """
    queries = events = 0
    with replacing(Path(path)) as file:
        for query in log.queries(since):
            file.write(_line(_query(query)))
            queries += 1
            for event in query.events:
                file.write(_line(_event(query, *event)))
                events += 1
    return {"queries": queries, "events": events}


def import_ubi(log: FeedbackLog, path: str | Path) -> dict[str, int]:
    """Read such a file; queries that are there already, and events of the same id, change nothing.

    Events with other action names (such as "on_search", "view") are counted and left out.

    Returns:
        how many "queries" and "events" were read, and how many events were "left out".

    Raises:
        DataError: a line cannot be used; names the file and the line. Lines before it are kept.
    """
    counts = {"queries": 0, "events": 0, "left out": 0}
    for place, found in _lines(Path(path)):
        try:
            if "action_name" in found:
                counts["events" if _read_event(log, found, place) else "left out"] += 1
            elif "user_query" in found:
                _read_query(log, found)
                counts["queries"] += 1
            else:
                raise UsageError("is neither an event ('action_name') nor a query ('user_query')")
        except (UsageError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{place}: {reason}") from error
    return counts


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                place = f"'{path}' line {number}"
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{place}: not valid JSON: {error}") from error
                if not isinstance(found, dict):
                    raise DataError(f"{place}: is not a JSON object")
                yield place, found
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"'{path}': {error.strerror}") from error


def _query(query: Any) -> dict[str, Any]:
    return {
        "application": APPLICATION,
        "query_id": query.query_id,
        "client_id": query.client,
        "user_query": query.text,
        "timestamp": _iso(query.time),
        "object_id_field": "id",
        "query_response_hit_ids": [id for id, _ in query.hits],
        "query_attributes": {
            "scores": [score for _, score in query.hits],
            "fingerprint": query.fingerprint,
            "generation": query.generation,
            "options": query.options,
        },
    }


def _event(query: Any, action: str, passage: str, client: str, at: float) -> dict[str, Any]:
    event: dict[str, Any] = {
        "application": APPLICATION,
        "action_name": action,
        "query_id": query.query_id,
        "client_id": client,
        "timestamp": _iso(at),
    }
    if passage:
        position = {"position": {"ordinal": rank}} if (rank := query.rank(passage)) else {}
        event["event_attributes"] = {"object": {"object_id": passage, "object_id_field": "id"}, **position}
    return event


def _read_query(log: FeedbackLog, found: dict[str, Any]) -> None:
    attributes = found.get("query_attributes") or {}
    ids = [str(id) for id in found.get("query_response_hit_ids") or []]
    scores = attributes.get("scores") or [0.0] * len(ids)
    if len(scores) != len(ids):
        raise UsageError(f"has {len(ids)} hits and {len(scores)} scores")
    log.remember(
        [(str(found["query_id"]), str(found["user_query"]), list(zip(ids, map(float, scores), strict=True)))],
        fingerprint=str(attributes.get("fingerprint") or ""),
        generation=int(attributes.get("generation") or 0),
        options=attributes.get("options") or {},
        client=str(found.get("client_id") or ""),
        at=_seconds(found["timestamp"]),
    )


def _read_event(log: FeedbackLog, found: dict[str, Any], place: str) -> bool:
    action = ALIASES.get(found["action_name"], found["action_name"])
    if action not in ACTIONS:
        return False
    thing = (found.get("event_attributes") or {}).get("object") or {}
    passage = thing.get("object_id")
    at = _seconds(found["timestamp"])
    query_id, id = str(found["query_id"]), None if passage is None else str(passage)
    if not found.get("event_id") and log.has_event(query_id, action, id, at):
        return True  # of our own export: it would come in as somebody else's, for clients are hashed anew
    parts = [found["query_id"], action, passage, found.get("client_id"), at]
    log.add(
        query_id,
        action,
        id,
        client=str(found.get("client_id") or "") or None,
        at=at,
        event_id=str(found.get("event_id") or json.dumps(parts)),
    )
    return True


def _seconds(stamp: Any) -> float:
    """Milliseconds since 1970 (a number), or ISO 8601."""
    if isinstance(stamp, int | float) and not isinstance(stamp, bool):
        return float(stamp) / 1000
    moment = datetime.datetime.fromisoformat(str(stamp))
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
