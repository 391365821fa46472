"""Token vectors, and lexical weights that the table does not keep: another embedded engine's, in a folder below."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ultrarag.retrieve.engines.base import Backend, Schema
from ultrarag.retrieve.engines.ivf.table import Table

HEADS = "heads"


def create_heads(directory: Path, others: Schema) -> Backend | None:
    """An empty engine for these heads; None where there are none."""
    from ultrarag.retrieve.engines.registry import create

    name = "qdrant-edge" if find_spec("qdrant_edge") else "numpy"
    return create(directory / HEADS, others, name) if others.heads else None


def open_heads(directory: Path, others: Schema, verify: bool, read_only: bool) -> Backend | None:
    """What `create_heads` made."""
    from ultrarag.retrieve.engines.registry import open_backend

    return open_backend(directory / HEADS, None, verify, read_only) if others.heads else None


def agree(table: Table, heads: Backend) -> None:
    """After a crash keep what both hold; the log of all changes brings the rest."""
    others = set(heads.ids())
    ours = {table.id_of(row): row for row in np.flatnonzero(table.alive()).tolist()}
    table.bury([row for id, row in ours.items() if id not in others])
    heads.delete([id for id in others if id not in ours])
