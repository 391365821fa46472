"""The checks of what goes into an engine and of what it is asked, and rows of ragged heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve.engines.base import Schema
from ultrarag.retrieve.ranking import check_ids
from ultrarag.types import Embeddings, Sparse


def prepare(
    schema: Schema, ids: Sequence[str], embeddings: Embeddings, payloads: Sequence[Mapping[str, Any]]
) -> tuple[list[str], Embeddings, list[Mapping[str, Any]]]:
    """Check a batch to be stored against the schema, and keep the last of each id.

    Raises:
        UsageError: for lengths, heads or widths that do not fit.
        DataError: for an id that is no non-empty string, or a value that is not finite.
    """
    if not len(ids) == len(embeddings) == len(payloads):
        raise UsageError(
            f"{len(ids)} ids, {len(embeddings)} embeddings and {len(payloads)} payloads: they must be as many"
        )
    check_ids(ids)
    batch = embeddings.numpy()
    check_embeddings(schema, ids, batch)
    last = sorted({id: row for row, id in enumerate(ids)}.values())
    if len(last) < len(ids):
        batch = batch[np.array(last)]
    return [ids[row] for row in last], batch, [payloads[row] for row in last]


def check_embeddings(schema: Schema, ids: Sequence[str], embeddings: Embeddings) -> None:
    """Raise when Embeddings of passages do not have the heads and widths of the schema, or are not finite."""
    if embeddings.heads != schema.heads:
        raise UsageError(
            f"the embeddings hold {_names(embeddings.heads)}, the index stores {_names(schema.heads)}; "
            f"encode with the encoder that built the index"
        )
    for head in ("dense", "colbert"):
        width, array = getattr(schema, head), getattr(embeddings, head)
        if width and array.shape[-1] != width:
            raise UsageError(f"the {head} vectors are {array.shape[-1]} wide, those of the index {width}")
    for array in embeddings.arrays():
        wrong = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        if wrong.any():
            raise DataError(f"passage '{ids[int(wrong.argmax())]}' has a vector that is not finite; nothing was stored")


def dense_query(schema: Schema, vector: np.ndarray) -> np.ndarray:
    """Check a dense query vector; (dim,) float32."""
    return _query("dense", schema.dense, vector, 1)


def token_query(schema: Schema, tokens: np.ndarray) -> np.ndarray:
    """Check the token vectors of a query; (tokens, dim) float32."""
    return _query("colbert", schema.colbert, tokens, 2)


def _query(head: str, width: int | None, array: np.ndarray, dimensions: int) -> np.ndarray:
    if not width:
        raise UsageError(f"the index stores no {head} vectors")
    query = np.ascontiguousarray(array, np.float32)
    if query.ndim != dimensions or query.shape[-1] != width:
        shape = f"({width},)" if dimensions == 1 else f"(tokens, {width})"
        raise UsageError(f"the {head} query has shape {query.shape}, not {shape}")
    if not np.isfinite(query).all():
        raise UsageError(f"the {head} query is not finite")
    return query


def sparse_query(schema: Schema, token_ids: Sequence[int], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Check lexical weights of a query; ids ascending, int64, and weights above 0, float32."""
    if not schema.sparse:
        raise UsageError("the index stores no sparse weights")
    try:
        return lexical(np.asarray(token_ids), np.asarray(weights))
    except DataError as error:
        raise UsageError(f"the sparse query {error}") from None


def sparse_rows(ids: Sequence[str], sparse: Sparse) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the (token ids, weights) of each row, without padding and zeros; DataError names the passage."""
    rows = []
    for id, token_ids, weights in zip(ids, sparse.ids, sparse.weights, strict=True):
        try:
            rows.append(lexical(token_ids, weights))
        except DataError as error:
            raise DataError(f"passage '{id}' {error}; nothing was stored") from None
    return rows


def lexical(token_ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop padding and zero weights, and sort by token id."""
    if token_ids.ndim != 1 or token_ids.shape != weights.shape:
        raise DataError(f"has token ids of shape {token_ids.shape} and weights of shape {weights.shape}")
    token_ids, weights = token_ids.astype(np.int64), weights.astype(np.float32)
    if not np.isfinite(weights).all() or (weights[token_ids >= 0] < 0).any():
        raise DataError("has a lexical weight that is negative or not finite")
    held = (token_ids >= 0) & (weights > 0)
    token_ids, weights = token_ids[held], weights[held]
    if (np.diff(token_ids) <= 0).any():
        order = np.argsort(token_ids, kind="stable")
        token_ids, weights = token_ids[order], weights[order]
    if (np.diff(token_ids) == 0).any():
        raise DataError("names a token id twice")
    return token_ids, weights


def token_rows(embeddings: Embeddings) -> list[np.ndarray]:
    """Return the token vectors of each row without padding, each (tokens, dim) float32."""
    if embeddings.mask is None:
        raise UsageError("the colbert vectors come without their mask")
    held = embeddings.mask.astype(bool)
    return [np.ascontiguousarray(row[kept], np.float32) for row, kept in zip(embeddings.colbert, held, strict=True)]


def assemble(
    schema: Schema,
    dense: Sequence[np.ndarray],
    sparse: Sequence[tuple[np.ndarray, np.ndarray]],
    tokens: Sequence[np.ndarray],
) -> Embeddings:
    """Build padded Embeddings from rows of each head that the schema has."""
    result = Embeddings()
    if schema.dense:
        result.dense = np.array(dense, np.float32).reshape(-1, schema.dense)
    if schema.sparse:
        longest = max((len(ids) for ids, _ in sparse), default=0)
        token_ids = np.full((len(sparse), longest), Sparse.PAD_ID, np.int64)
        weights = np.zeros((len(sparse), longest), np.float32)
        for row, (row_ids, row_weights) in enumerate(sparse):
            token_ids[row, : len(row_ids)], weights[row, : len(row_ids)] = row_ids, row_weights
        result.sparse = Sparse(token_ids, weights)
    if schema.colbert:
        longest = max((len(row) for row in tokens), default=0)
        result.colbert = np.zeros((len(tokens), longest, schema.colbert), np.float32)
        result.mask = np.zeros((len(tokens), longest), np.int64)
        for row, vectors in enumerate(tokens):
            result.colbert[row, : len(vectors)], result.mask[row, : len(vectors)] = vectors, 1
    return result


def products(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Inner products, (rows,); the same for the same vector in any row, which those of BLAS are not."""
    found: np.ndarray = np.einsum("rd,d->r", vectors, query)
    return found


def _names(heads: Sequence[str]) -> str:
    return ", ".join(heads) or "no head"
