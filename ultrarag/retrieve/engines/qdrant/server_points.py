"""How a schema, a filter and a passage look to a Qdrant server, in the models of its client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from qdrant_client import models

from ultrarag.retrieve.engines.base import Schema
from ultrarag.retrieve.engines.batches import sparse_rows, token_rows
from ultrarag.retrieve.engines.qdrant.points import FACTS, NUMBERS, field
from ultrarag.retrieve.search import AllOf, AnyOf, HasFact, InRange, Node, Not
from ultrarag.types import Embeddings

#: Edges per node and candidates while building, as in the embedded engine.
HNSW_M, HNSW_EF_CONSTRUCT = 16, 128
#: Segments of fewer vectors than these kilobytes hold get no graph: an exact scan is faster there.
HNSW_FROM_KB = 20_000


def settings(schema: Schema) -> dict[str, Any]:
    """Inner products for every head; a graph for the dense vectors only, as MaxSim is asked for candidates."""
    vectors = {}
    if schema.dense:
        vectors["dense"] = models.VectorParams(size=schema.dense, distance=models.Distance.DOT)
    if schema.colbert:
        vectors["colbert"] = models.VectorParams(
            size=schema.colbert,
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            hnsw_config=models.HnswConfigDiff(m=0),
            on_disk=True,
        )
    return {
        "vectors_config": vectors,
        "sparse_vectors_config": {"sparse": models.SparseVectorParams()} if schema.sparse else None,
        "hnsw_config": models.HnswConfigDiff(
            m=HNSW_M, ef_construct=HNSW_EF_CONSTRUCT, full_scan_threshold=HNSW_FROM_KB // 4
        ),
        "optimizers_config": models.OptimizersConfigDiff(indexing_threshold=HNSW_FROM_KB),
    }


def to_filter(node: Node) -> models.Filter:
    """Translate a filter's tree."""
    if isinstance(node, Not):
        return models.Filter(must_not=[to_filter(node.node)])
    if isinstance(node, AllOf):
        return models.Filter(must=[to_filter(child) for child in node.nodes])
    if isinstance(node, AnyOf):
        return models.Filter(should=[to_filter(child) for child in node.nodes])
    if isinstance(node, HasFact):
        any_of = models.MatchAny(any=list(node.facts))
        return models.Filter(must=[models.FieldCondition(key=FACTS, match=any_of)])
    return models.Filter(must=[models.FieldCondition(key=f"{NUMBERS}.{field(node.fact)}", range=_range(node))])


def _range(node: InRange) -> models.Range:
    return models.Range(gt=node.gt, gte=node.gte, lt=node.lt, lte=node.lte)


def named_vectors(ids: Sequence[str], batch: Embeddings) -> list[dict[str, Any]]:
    """The vectors of each point by head; a head without tokens is left out, which the engine would refuse."""
    vectors: list[dict[str, Any]] = [{} for _ in ids]
    if batch.dense is not None:
        for point, row in zip(vectors, batch.dense, strict=True):
            point["dense"] = np.asarray(row, np.float32).tolist()
    if batch.sparse is not None:
        for point, (tokens, weights) in zip(vectors, sparse_rows(ids, batch.sparse), strict=True):
            if len(tokens):
                point["sparse"] = models.SparseVector(indices=tokens.tolist(), values=weights.tolist())
    if batch.colbert is not None:
        for point, rows in zip(vectors, token_rows(batch), strict=True):
            if len(rows):
                point["colbert"] = rows.tolist()
    return vectors


def floats_of(point: models.PointStruct) -> int:
    """About how many numbers a point holds."""
    held: dict[str, Any] = point.vector  # type: ignore[assignment]
    colbert, sparse = held.get("colbert", ()), held.get("sparse")
    count = len(held.get("dense", ())) + (2 * len(sparse.indices) if sparse else 0)
    return count + (len(colbert) * len(colbert[0]) if colbert else 0)


def lexical_row(vector: models.SparseVector | None) -> tuple[np.ndarray, np.ndarray]:
    """The token ids, ascending, and weights of a stored vector."""
    if vector is None:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    order = np.argsort(vector.indices)
    return np.array(vector.indices, np.int64)[order], np.array(vector.values, np.float32)[order]
