"""Listing: which passages a filter means; the one place where filters are compared with what the store holds.

The metadata of all passages is read for it: 100,000 of them with four keys take 1.3 to 4 s (one core, `count`). Where a
text must be equal, SQLite passes over metadata that does not have it anywhere, unparsed: a fifth of the time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ultrarag.retrieve.passages.files import metadata_text
from ultrarag.retrieve.passages.store import Store, delete_rows, log_metadata
from ultrarag.retrieve.search import Node, matches, needed_texts
from ultrarag.types import Passage

#: Passages read at a time; other threads and processes write in between.
CHUNK_PASSAGES = 1000


class Match(NamedTuple):
    """A passage that passes a filter, without its text."""

    id: str
    metadata: dict[str, Any]
    #: as the log has it
    hash: bytes


def list_passages(store: Store, node: Node | None = None, after: str | None = None) -> Iterator[Passage]:
    """Iterate over the passages that pass a filter; writes may go on.

    Args:
        after: in the order of their ids, those after this one; default: all, in the order in which they were first
            added.
    """
    order, last = ("row", 0) if after is None else ("id", after)
    condition, texts = _mentioning(node)
    query = (
        f"SELECT {order}, id, text, title, metadata, hash FROM passages "
        f"WHERE {order} > ? AND deleted = 0{condition} ORDER BY {order} LIMIT ?"
    )
    while True:
        with store.database.reading() as db:
            rows = db.execute(query, (last, *texts, CHUNK_PASSAGES)).fetchall()
        if not rows:
            return
        last = rows[-1][0]
        yield from (store.passage(*row[1:]) for row in rows if matches(node, json.loads(row[4])))


def count_matching(store: Store, node: Node | None) -> int:
    """The number of passages that pass a filter, at one moment."""
    if node is None:
        return store.count()
    with store.database.reading() as db:
        return sum(1 for _ in _matching(db, node))


def delete_matching(store: Store, node: Node | None) -> int:
    """Delete the passages that pass a filter in one transaction; return how many there were."""
    with store.database.transaction() as db:
        return delete_rows(db, [match.id for match in _matching(db, node)])


def update_matching(store: Store, node: Node | None, changes: Mapping[str, Any]) -> int:
    """Merge metadata into that of the passages that pass a filter, in one transaction; return how many pass.

    Only those that it changes are logged.

    Raises:
        DataError: when the metadata is not JSON; nothing has changed then.
    """
    metadata_text("(of an update)", changes)
    with store.database.transaction() as db:
        found = list(_matching(db, node))
        new = [(match, _merged(match.metadata, changes)) for match in found]
        changed = [(m.id, metadata_text(m.id, merged), m.hash) for m, merged in new if merged != m.metadata]
        log_metadata(db, changed)
    return len(found)


def _merged(held: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Keys are replaced whole, and removed where the new value is None, which filters take for absent."""
    merged = {**held, **json.loads(json.dumps(dict(changes)))}
    return {key: value for key, value in merged.items() if value is not None or key not in changes}


def _matching(db: sqlite3.Connection, node: Node | None) -> Iterator[Match]:
    condition, texts = _mentioning(node)
    query = f"SELECT id, metadata, hash FROM passages WHERE deleted = 0{condition} ORDER BY row"
    for id, text, hash in db.execute(query, texts):
        metadata = json.loads(text)
        if matches(node, metadata):
            yield Match(id, metadata, hash)


def _mentioning(node: Node | None) -> tuple[str, list[str]]:
    """SQL that lets all pass that may pass the filter: metadata in which a text stands, as `metadata_text` wrote it."""
    parts, texts = [], []
    for choice in needed_texts(node):
        parts.append(" OR ".join(["instr(metadata, ?)"] * len(choice)))
        texts += [json.dumps(text, ensure_ascii=False) for text in choice]
    return "".join(f" AND ({part})" for part in parts), texts
