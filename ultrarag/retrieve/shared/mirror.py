"""The passages of a shared index on their way between the server and the store of one process."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultrarag.checkpoint import copy_checkpoint, read_manifest
from ultrarag.encoder.engines import copy_quantised
from ultrarag.errors import CheckpointError
from ultrarag.retrieve.engines import (
    SCHEMA_FILE,
    Schema,
    collection_of,
    name_collection,
    parse_uri,
    read_schema,
    with_quantise,
    write_schema,
)
from ultrarag.retrieve.engines.qdrant import key
from ultrarag.retrieve.generation import (
    COLUMNS,
    VECTORS,
    Generation,
    IndexLayout,
    inherit_consent,
    note_live,
    note_vectors,
)
from ultrarag.retrieve.passages import Database
from ultrarag.retrieve.shared.documents import Document, SharedRow, VectorSchema

_ENTRIES = (
    "SELECT log.seq, op, passages.id, text, title, metadata, passages.hash, passages.seq, deleted FROM log "
    "JOIN passages ON passages.id = log.id WHERE log.seq > ? ORDER BY log.seq"
)


def changed_documents(db: sqlite3.Connection, after: int) -> list[Document]:
    """What the log has after an entry, to be stored in the server; each passage as it is now, under its last number."""
    found: dict[str, Document] = {}
    for seq, op, id, text, title, metadata, hash, content, deleted in db.execute(_ENTRIES, (after,)):
        body = {"id": id, "op": op, "text": text, "title": title, "metadata": metadata, "hash": hash.hex()}
        found.pop(id, None)  # keeps the order of the numbers
        found[id] = Document(key(id), seq, json.dumps({**body, "content": content, "deleted": deleted}))
    return list(found.values())


def apply_documents(database: Database, documents: Sequence[Document], until: int) -> None:
    """Take over passages that another process wrote, and that the mirror has everything up to `until`."""
    with database.transaction() as db:
        for document in documents:
            _apply(db, document.seq, json.loads(document.body))
        db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'log'", (until,))
        if not db.execute("SELECT 1 FROM sqlite_sequence WHERE name = 'log'").fetchone():
            db.execute("INSERT INTO sqlite_sequence VALUES ('log', ?)", (until,))


def _apply(db: sqlite3.Connection, seq: int, body: dict[str, Any]) -> None:
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


def apply_generations(database: Database, rows: Sequence[SharedRow], uri: str, last: int) -> None:
    """Make the catalog what the shared state says."""
    marks = ", ".join("?" for _ in COLUMNS.split(", "))
    with database.transaction() as db:
        before = db.execute("SELECT id FROM generations WHERE state = 'live'").fetchone()
        db.execute("DELETE FROM generations")
        db.execute(VECTORS)
        db.execute("DELETE FROM vectors")
        for row in rows:
            engine = with_quantise(uri, row.quantise)
            values = (row.id, row.fingerprint, row.state, engine, json.dumps(row.heads), row.precision, row.base_seq)
            more = (row.applied_seq, row.created, int(row.forced), json.dumps(row.metrics))
            db.execute(f"INSERT INTO generations ({COLUMNS}) VALUES ({marks})", (*values, *more))
            if row.passage_fingerprint:
                note_vectors(db, row.id, row.owner, row.passage_fingerprint, row.mapped_from)
            if row.state == "live" and before is not None and before[0] != row.id:
                note_live(db, row.id)
        db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'generations'", (last,))


def row_of(layout: IndexLayout, generation: Generation, known: SharedRow | None) -> SharedRow:
    """A generation as the shared state has it; where its vectors are is read from its directory, if it has one here."""
    values = asdict(generation)
    quantise = parse_uri(values.pop("backend")).quantise  # else each process has its own address for the server
    if (generation.passage_fingerprint, generation.vectors_of) == (generation.fingerprint, generation.id):
        del values["passage_fingerprint"], values["vectors_of"]  # as every version has it
    row = SharedRow(**values, quantise=quantise)
    if generation.state == "building":
        return row
    if known is not None and known.collection:
        return row.model_copy(update={"collection": known.collection, "vectors": known.vectors})
    vectors = layout.vectors(layout.final(generation.vectors_of))
    held = VectorSchema(**asdict(read_schema(vectors)[1]))
    return row.model_copy(update={"collection": collection_of(vectors), "vectors": held})


def fetch_generation(layout: IndexLayout, row: SharedRow, uri: str, checkpoints: Checkpoints) -> None:
    """Give a generation its directory here: the checkpoint's copy, and the name of the collection.

    Vectors that are shared are named in the directory of who made them, which may be nothing more any longer.
    """
    _name_vectors(layout, row, uri)
    directory = layout.final(row.id)
    if not layout.checkpoint(directory).exists():
        directory.mkdir(exist_ok=True)
        shutil.rmtree(layout.building(row.id), ignore_errors=True)
        checkpoints.fetch(row.fingerprint, layout.checkpoint(directory))
        inherit_consent(layout, directory)


def _name_vectors(layout: IndexLayout, row: SharedRow, uri: str) -> None:
    """Make the directory of who made a generation's vectors, with the name of the collection."""
    assert row.vectors is not None
    final, stage = layout.final(row.owner), layout.generations / f"{row.owner}.fetch"
    if (layout.vectors(final) / SCHEMA_FILE).exists() and collection_of(layout.vectors(final)) == row.collection:
        return
    shutil.rmtree(stage, ignore_errors=True)
    vectors = layout.vectors(stage)
    write_schema(vectors, with_quantise(uri, row.quantise), Schema(**row.vectors.model_dump()))
    name_collection(vectors, row.collection)
    shutil.rmtree(final, ignore_errors=True)
    shutil.rmtree(layout.building(row.owner), ignore_errors=True)
    os.rename(stage, final)


class Checkpoints:
    """Checkpoints by fingerprint; each appears whole or not at all, and is never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, checkpoint: Path, fingerprint: str) -> None:
        """Copy a checkpoint into the folder, unless it is there."""
        target = self.folder / fingerprint
        if target.exists():
            copy_quantised(checkpoint, target)
            return
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise CheckpointError(f"'{checkpoint}' is no checkpoint: its manifest is missing")
        self.folder.mkdir(parents=True, exist_ok=True)
        copy_checkpoint(checkpoint, manifest, target)
        copy_quantised(checkpoint, target)

    def fetch(self, fingerprint: str, target: Path) -> None:
        """Copy a checkpoint out of the folder, compared with its checksums.

        Raises:
            CheckpointError: when it is not there, damaged, or another one.
        """
        source = self.folder / fingerprint
        manifest = read_manifest(source) if source.is_dir() else None
        if manifest is None:
            raise CheckpointError(
                f"'{source}' is missing: every process of a shared index must see the folder with its checkpoints; "
                f"name it with checkpoints=, as this machine sees it"
            )
        if manifest.fingerprint != fingerprint:
            raise CheckpointError(f"'{source}' holds the encoder {manifest.fingerprint[:12]}, not the one of its name")
        copy_checkpoint(source, manifest, target)
        copy_quantised(source, target)

    def prune(self, fingerprints: set[str]) -> None:
        """Delete the checkpoints of generations that no longer are."""
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if folder.is_dir() and len(folder.name) == 64 and folder.name not in fingerprints:
                shutil.rmtree(folder)
