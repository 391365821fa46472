"""The directory of a generation in a mirror: its own, or a copy of what another process built."""

from __future__ import annotations

import json
import os
import shutil

from ultrarag.retrieve.backends.base import SCHEMA_FILE, Schema, read_schema, write_schema
from ultrarag.retrieve.backends.files import write_atomically
from ultrarag.retrieve.backends.server import COLLECTION_FILE, collection_of
from ultrarag.retrieve.generations import Generation, Layout
from ultrarag.retrieve.shared.checkpoints import Checkpoints
from ultrarag.retrieve.shared.state import Row, VectorSchema


def row_of(layout: Layout, generation: Generation, known: Row | None) -> Row:
    """A generation as the shared state has it; where its vectors are is read from its directory, if it has one here."""
    row = Row(
        id=generation.id,
        fingerprint=generation.fingerprint,
        state=generation.state,
        heads=list(generation.heads),
        precision=generation.precision,
        base_seq=generation.base_seq,
        applied_seq=generation.applied_seq,
        created=generation.created,
        forced=generation.forced,
        metrics=generation.metrics,
    )
    if generation.state == "building":
        return row
    if known is not None and known.collection:
        return row.model_copy(update={"collection": known.collection, "vectors": known.vectors})
    vectors = layout.vectors(layout.final(generation.id))
    schema = read_schema(vectors)[1]
    held = VectorSchema(
        dense=schema.dense, sparse=schema.sparse, colbert=schema.colbert, fingerprint=schema.fingerprint
    )
    return row.model_copy(update={"collection": collection_of(vectors), "vectors": held})


def place(layout: Layout, row: Row, uri: str, checkpoints: Checkpoints) -> None:
    """Give a generation its directory here: the checkpoint's copy, and the name of the collection."""
    assert row.vectors is not None
    final = layout.final(row.id)
    if (layout.vectors(final) / SCHEMA_FILE).exists() and collection_of(layout.vectors(final)) == row.collection:
        return
    stage = layout.generations / f"{row.id}.fetch"
    shutil.rmtree(stage, ignore_errors=True)
    vectors = layout.vectors(stage)
    checkpoints.fetch(row.fingerprint, layout.checkpoint(stage))
    write_schema(vectors, uri, Schema(**row.vectors.model_dump()))
    write_atomically(vectors / COLLECTION_FILE, json.dumps({"collection": row.collection}).encode())
    shutil.rmtree(final, ignore_errors=True)
    shutil.rmtree(layout.building(row.id), ignore_errors=True)
    os.rename(stage, final)
