"""Diversity: hits that are like the query and unlike each other."""

from __future__ import annotations

import numpy as np


def most_diverse(query: np.ndarray, vectors: np.ndarray, k: int, weight: float) -> list[int]:
    """Return the places of k vectors, chosen one after another by maximal marginal relevance.

    The first is the most like the query. Each of the others has the greatest weight * (its cosine with the query) -
    (1 - weight) * (its greatest cosine with one that was chosen before); of equals the first.

    Args:
        query: (dim,)
        vectors: (n, dim)
        weight: lambda of the paper, from 0 to 1.

    Source:
        Carbonell and Goldstein, 1998.
    """
    units, left = _units(vectors), np.ones(len(vectors), bool)
    relevance, redundancy = units @ _units(query[None])[0], np.full(len(vectors), -np.inf)
    chosen: list[int] = []
    values = relevance
    while len(chosen) < min(k, len(vectors)):
        place = int(np.argmax(np.where(left, values, -np.inf)))
        chosen.append(place)
        left[place] = False
        redundancy = np.maximum(redundancy, units @ units[place])
        values = weight * relevance - (1 - weight) * redundancy
    return chosen


def _units(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; one of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)
