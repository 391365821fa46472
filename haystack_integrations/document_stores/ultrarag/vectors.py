"""Vectors between documents and an index: lists there, arrays here, and always somebody's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from haystack import Document

from haystack_integrations.document_stores.ultrarag.converters import Vector, fingerprint_of
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.retrieve import LiveIndex


def dense(rows: Sequence[Any]) -> Embeddings:
    """Embeddings of dense vectors, which are lists."""
    return Embeddings(dense=np.asarray(rows, np.float32))


def given_vectors(documents: list[Document], own: frozenset[str]) -> dict[str, Any]:
    """Their embeddings as `LiveIndex.add` takes them, where all are of one encoder, which is the live one."""
    made_by = {fingerprint_of(document.embedding) for document in documents}
    if len(made_by) != 1 or not made_by <= own:
        return {}
    return {"embeddings": dense([document.embedding for document in documents]), "fingerprint": made_by.pop()}


def stored_vectors(live: LiveIndex, ids: list[str]) -> dict[str, Vector]:
    """The dense vectors that the live generation stores, all of one encoder; none where it stores no dense ones."""
    while ids:
        before = _made_by(live)
        found, vectors = live.vectors(ids, missing="skip")
        if _made_by(live) == before:
            rows = [] if vectors.dense is None else vectors.dense.tolist()
            return {id: Vector.of(row, before) for id, row in zip(found, rows, strict=False)}
    return {}


def _made_by(live: LiveIndex) -> str:
    """The fingerprint of the encoder whose vectors are stored: also under a bridge, where another one searches."""
    return str(live.status()["live"]["fingerprint"])
