"""A Qdrant server through its client: connection, what errors mean, and schema, filter and passage in its models."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import httpx
import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from ultrarag.retrieve.engines.address import Address
from ultrarag.retrieve.engines.arrays import sparse_rows, token_rows
from ultrarag.retrieve.engines.base import Schema
from ultrarag.retrieve.engines.qdrant.payload import FACTS, NUMBERS, field
from ultrarag.retrieve.engines.server import Clients, Connection
from ultrarag.retrieve.search import AllOf, AnyOf, HasFact, InRange, Node, Not
from ultrarag.types import Embeddings

#: Statuses of HTTP after which the same request may succeed.
_PASSING = (429, 502, 503, 504)
#: The local mode is not made for several threads.
_ONE_THREAD = threading.RLock()

_Result = TypeVar("_Result")


def connect(address: Address) -> QdrantClient:
    """Make a client; nothing is sent yet."""
    if address.folder is not None:
        return QdrantClient(path=str(address.folder), force_disable_check_same_thread=True)
    return QdrantClient(
        url=address.url,
        api_key=address.secret(),
        https=address.tls,
        timeout=max(1, int(address.timeout)),
        check_compatibility=False,  # one request more, and a warning where the server is away
    )


class QdrantConnection(Connection):
    """A client of Qdrant, which of its errors pass, and what the others are to say."""

    clients = Clients(connect)

    def _call(self, work: Callable[[Any], _Result]) -> _Result:
        with _ONE_THREAD if self.address.folder is not None else nullcontext():
            return super()._call(work)

    def _pause_after(self, error: Exception) -> float | None:
        if isinstance(error, ResourceExhaustedResponse):
            return float(error.retry_after_s)
        if isinstance(error, UnexpectedResponse) and error.status_code in _PASSING:
            return 0.0
        broken = isinstance(error, ResponseHandlingException) and isinstance(error.source, httpx.TransportError)
        return 0.0 if broken else None

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, UnexpectedResponse):
            return self._say(_reason(error))
        if isinstance(error, ResponseHandlingException):
            return self._say(
                f"no answer within {self.address.timeout:g} s ({error.source or type(error.source).__name__})"
            )
        if isinstance(error, ApiException | ResourceExhaustedResponse | RuntimeError | OSError):
            return self._say(error)
        return error


def _reason(error: UnexpectedResponse) -> str:
    """What the server said; a key that is wrong is said to be."""
    if error.status_code in (401, 403):
        return f"the server refuses the API key ({error.status_code}); set QDRANT_API_KEY, or key_env in the URI"
    try:
        reason = json.loads(error.content)["status"]["error"]
    except (ValueError, KeyError, TypeError):
        reason = error.content.decode(errors="replace")
    return f"HTTP {error.status_code} {error.reason_phrase}: {reason}"


#: Edges per node and candidates while building, as in the embedded engine.
HNSW_M, HNSW_EF_CONSTRUCT = 16, 128
#: Segments of fewer vectors than these kilobytes hold get no graph: an exact scan is faster there.
HNSW_FROM_KB = 20_000


def settings(schema: Schema, quantise: str = "") -> dict[str, Any]:
    """Inner products for every head; a graph for the dense vectors only, as MaxSim is asked for candidates.

    Where dense and token vectors are quantised, their codes are in memory, and they themselves on the server's disk.
    """
    vectors = {}
    if schema.dense:
        vectors["dense"] = models.VectorParams(
            size=schema.dense,
            distance=models.Distance.DOT,
            quantization_config=_codes(quantise),
            on_disk=True if quantise else None,
        )
    if schema.colbert:
        vectors["colbert"] = models.VectorParams(
            size=schema.colbert,
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            hnsw_config=models.HnswConfigDiff(m=0),
            quantization_config=_codes(quantise),
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


def _codes(quantise: str) -> models.ScalarQuantization | models.BinaryQuantization | None:
    """What is kept in memory of vectors; a byte stands for one of 256 values between the 0.5 % least and highest."""
    if quantise == "int8":
        kept = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        return models.ScalarQuantization(scalar=kept)
    if quantise == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
    return None


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
