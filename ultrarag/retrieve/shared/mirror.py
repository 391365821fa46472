"""The passages of a shared index on their way between the server and the store of one process."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from ultrarag.retrieve.backends.points import key
from ultrarag.retrieve.database import Database
from ultrarag.retrieve.generations import COLUMNS
from ultrarag.retrieve.shared.documents import Document
from ultrarag.retrieve.shared.state import Row

_ENTRIES = (
    "SELECT log.seq, op, passages.id, text, title, metadata, passages.hash, passages.seq, deleted FROM log "
    "JOIN passages ON passages.id = log.id WHERE log.seq > ? ORDER BY log.seq"
)


def entries(db: sqlite3.Connection, after: int) -> list[Document]:
    """What the log has after an entry, to be stored in the server; each passage as it is now, under its last number."""
    found: dict[str, Document] = {}
    for seq, op, id, text, title, metadata, hash, content, deleted in db.execute(_ENTRIES, (after,)):
        body = {"id": id, "op": op, "text": text, "title": title, "metadata": metadata, "hash": hash.hex()}
        found.pop(id, None)  # keeps the order of the numbers
        found[id] = Document(key(id), seq, json.dumps({**body, "content": content, "deleted": deleted}))
    return list(found.values())


def adopt(database: Database, documents: Sequence[Document], until: int) -> None:
    """Take over passages that another process wrote, and that the mirror has everything up to `until`."""
    with database.transaction() as db:
        for document in documents:
            _adopt(db, document.seq, json.loads(document.body))
        db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'log'", (until,))
        if not db.execute("SELECT 1 FROM sqlite_sequence WHERE name = 'log'").fetchone():
            db.execute("INSERT INTO sqlite_sequence VALUES ('log', ?)", (until,))


def _adopt(db: sqlite3.Connection, seq: int, body: dict[str, Any]) -> None:
    hash = bytes.fromhex(body["hash"])
    held = db.execute("SELECT hash FROM passages WHERE id = ? AND deleted = 0", (body["id"],)).fetchone()
    op = "delete" if body["deleted"] else "metadata" if held and held[0] == hash else "content"
    # the number of the content, as the store has it: what was written before a build began is built
    values = (body["id"], body["text"], body["title"], body["metadata"], hash, body["content"], body["deleted"])
    db.execute(
        "INSERT INTO passages (id, text, title, metadata, hash, seq, deleted) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET text = excluded.text, title = excluded.title, metadata = excluded.metadata, "
        "hash = excluded.hash, seq = excluded.seq, deleted = excluded.deleted",
        values,
    )
    db.execute("INSERT OR REPLACE INTO log VALUES (?, ?, ?, ?)", (seq, body["id"], op, hash))


def adopt_generations(database: Database, rows: Sequence[Row], uri: str, last: int) -> None:
    """Make the catalog what the shared state says."""
    marks = ", ".join("?" for _ in COLUMNS.split(", "))
    with database.transaction() as db:
        db.execute("DELETE FROM generations")
        for row in rows:
            values = (row.id, row.fingerprint, row.state, uri, json.dumps(row.heads), row.precision, row.base_seq)
            more = (row.applied_seq, row.created, int(row.forced), json.dumps(row.metrics))
            db.execute(f"INSERT INTO generations ({COLUMNS}) VALUES ({marks})", (*values, *more))
        db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'generations'", (last,))
