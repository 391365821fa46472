"""How a schema and a passage look to Qdrant: configuration and named vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import qdrant_edge as qdrant

from ultrarag.retrieve.engines.base import Schema
from ultrarag.retrieve.engines.batches import sparse_rows, token_rows
from ultrarag.retrieve.engines.qdrant.points import FACTS, NUMBERS, field
from ultrarag.retrieve.search import AllOf, AnyOf, HasFact, InRange, Node, Not
from ultrarag.types import Embeddings

#: Edges per node and candidates while building: the engine's defaults are 16 and 100.
HNSW_M, HNSW_EF_CONSTRUCT = 16, 128
#: Segments of fewer vectors than these kilobytes hold get no graph: an exact scan is faster there (0.5 ms against
#: 0.8 ms at 10,000 x 384, one core).
HNSW_FROM_KB = 20_000


def config(schema: Schema) -> qdrant.EdgeConfig:
    """Inner products for every head; a graph for the dense vectors only, as MaxSim is asked for candidates."""
    vectors = {}
    if schema.dense:
        vectors["dense"] = qdrant.EdgeVectorParams(size=schema.dense, distance=qdrant.Distance.Dot)
    if schema.colbert:
        vectors["colbert"] = qdrant.EdgeVectorParams(
            size=schema.colbert,
            distance=qdrant.Distance.Dot,
            multivector_config=qdrant.MultiVectorConfig(qdrant.MultiVectorComparator.MaxSim),
            hnsw_config=qdrant.HnswIndexConfig(m=0, ef_construct=16, full_scan_threshold=HNSW_FROM_KB),
            memory=qdrant.Memory.Cold,
        )
    return qdrant.EdgeConfig(
        vectors=vectors,
        sparse_vectors={"sparse": qdrant.EdgeSparseVectorParams()} if schema.sparse else None,
        hnsw_config=qdrant.HnswIndexConfig(HNSW_M, HNSW_EF_CONSTRUCT, full_scan_threshold=HNSW_FROM_KB // 4),
        optimizers=qdrant.EdgeOptimizersConfig(indexing_threshold=HNSW_FROM_KB),
    )


def named_vectors(ids: Sequence[str], batch: Embeddings) -> list[dict[str, Any]]:
    """The vectors of each point by head; a head without tokens is left out, which the engine would refuse."""
    vectors: list[dict[str, Any]] = [{} for _ in ids]
    if batch.dense is not None:
        for point, row in zip(vectors, batch.dense, strict=True):
            point["dense"] = np.ascontiguousarray(row, np.float32)
    if batch.sparse is not None:
        for point, weights in zip(vectors, sparse_rows(ids, batch.sparse), strict=True):
            if len(weights[0]):
                point["sparse"] = sparse_vector(weights)
    if batch.colbert is not None:
        for point, tokens in zip(vectors, token_rows(batch), strict=True):
            if len(tokens):
                point["colbert"] = tokens
    return vectors


def sparse_vector(weights: tuple[np.ndarray, np.ndarray]) -> qdrant.SparseVector:
    return qdrant.SparseVector(weights[0].tolist(), weights[1].tolist())


def lexical_row(vector: qdrant.SparseVector | None) -> tuple[np.ndarray, np.ndarray]:
    if vector is None:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.array(vector.indices, np.int64), np.array(vector.values, np.float32)


def to_filter(node: Node) -> qdrant.Filter:
    """Translate a filter's tree."""
    if isinstance(node, Not):
        return qdrant.Filter(must_not=[to_filter(node.node)])
    if isinstance(node, AllOf):
        return qdrant.Filter(must=[to_filter(child) for child in node.nodes])
    if isinstance(node, AnyOf):
        return qdrant.Filter(should=[to_filter(child) for child in node.nodes])
    if isinstance(node, HasFact):
        return qdrant.Filter(must=[qdrant.FieldCondition(FACTS, match=qdrant.MatchAny(list(node.facts)))])
    return qdrant.Filter(must=[qdrant.FieldCondition(f"{NUMBERS}.{field(node.fact)}", range=_range(node))])


def _range(node: InRange) -> qdrant.RangeFloat:
    return qdrant.RangeFloat(gt=node.gt, gte=node.gte, lt=node.lt, lte=node.lte)
