"""The directory of a generation in a mirror: its own, or a copy of what another process built."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict

from ultrarag.retrieve.backends.base import SCHEMA_FILE, Schema, read_schema, write_schema
from ultrarag.retrieve.backends.server import collection_of, name_collection
from ultrarag.retrieve.generations import Generation, Layout
from ultrarag.retrieve.shared.checkpoints import Checkpoints
from ultrarag.retrieve.shared.state import Row, VectorSchema


def row_of(layout: Layout, generation: Generation, known: Row | None) -> Row:
    """A generation as the shared state has it; where its vectors are is read from its directory, if it has one here."""
    values = asdict(generation)
    del values["backend"]  # each process has its own address for the server
    row = Row(**values)
    if generation.state == "building":
        return row
    if known is not None and known.collection:
        return row.model_copy(update={"collection": known.collection, "vectors": known.vectors})
    vectors = layout.vectors(layout.final(generation.id))
    held = VectorSchema(**asdict(read_schema(vectors)[1]))
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
    name_collection(vectors, row.collection)
    shutil.rmtree(final, ignore_errors=True)
    shutil.rmtree(layout.building(row.id), ignore_errors=True)
    os.rename(stage, final)
