"""Token pooling: the token vectors of a passage that are most alike become one, so that there are a few times fewer.

Source:
    Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling (Clavié, Chaffin
    and Adams, 2024): hierarchical clusters by Ward's method, of which the means are kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ultrarag.types import Embeddings


def pooled(embeddings: Embeddings, factor: int, normalize: bool) -> Embeddings:
    """Embeddings of passages with as many token vectors divided by `factor`, rounded up.

    Args:
        normalize: token vectors have unit length, and get it again.
    """
    if embeddings.colbert is None or factor == 1:
        return embeddings
    held = embeddings.mask.astype(bool)
    rows = [merged(row[kept], factor) for row, kept in zip(embeddings.colbert, held, strict=True)]
    counts = np.array([len(row) for row in rows], np.int64)
    mask = (np.arange(max(1, counts.max(initial=0))) < counts[:, None]).astype(embeddings.mask.dtype)
    vectors = np.zeros((*mask.shape, embeddings.colbert.shape[-1]), np.float32)
    for place, row in enumerate(rows):
        length = np.linalg.norm(row, axis=1, keepdims=True) if normalize else 1.0
        vectors[place, : len(row)] = row / np.maximum(length, 1e-12)
    return replace(embeddings, colbert=vectors, mask=mask)


def merged(vectors: np.ndarray, factor: int) -> np.ndarray:
    """The means of clusters of vectors, (tokens, dim), of which there are as many divided by `factor`, rounded up.

    Two clusters are merged at a time, those that add least to the squared distances from the means.
    """
    means, sizes = np.array(vectors, np.float64), np.ones(len(vectors))
    squared = (means**2).sum(1)
    costs = np.maximum(squared[:, None] + squared - 2 * means @ means.T, 0) / 2
    np.fill_diagonal(costs, np.inf)
    for _ in range(len(vectors) - -(-len(vectors) // factor)):
        first, second = sorted(divmod(int(costs.argmin()), len(vectors)))
        total = sizes[first] + sizes[second]
        means[first] = (sizes[first] * means[first] + sizes[second] * means[second]) / total
        sizes[first], sizes[second] = total, 0
        costs[second] = costs[:, second] = np.inf
        apart = ((means - means[first]) ** 2).sum(1)
        cost = np.where(sizes > 0, sizes * total / np.maximum(sizes + total, 1) * apart, np.inf)
        cost[first] = np.inf
        costs[first] = costs[:, first] = cost
    return means[sizes > 0]
