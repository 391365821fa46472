"""Clusters of vectors: k-means, and thousands of centroids in two levels, among which the nearest is found fast."""

from __future__ import annotations

from itertools import pairwise
from typing import BinaryIO

import numpy as np

#: Rounds of k-means.
ROUNDS = 8
#: Vectors compared with centroids at a time.
BLOCK = 16_384
#: Cells in which the nearest centroid of a vector is looked for.
CELLS = 3


def kmeans(sample: np.ndarray, count: int, rounds: int = ROUNDS) -> np.ndarray:
    """Means around which vectors gather, (count, dim) float32; where one stays empty it keeps its place."""
    rng = np.random.default_rng(0)
    centroids = np.array(sample[rng.choice(len(sample), count, replace=False)], np.float32)
    for _ in range(rounds):
        places = nearest(sample, centroids)
        order = np.argsort(places, kind="stable")
        held, starts = np.unique(places[order], return_index=True)
        sizes = np.diff(np.append(starts, len(order)))
        centroids[held] = np.add.reduceat(sample[order], starts, axis=0) / sizes[:, None]
    return centroids


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each vector, (vectors,)."""
    return _nearest(vectors, centroids, 1)[:, 0]


def _nearest(vectors: np.ndarray, centroids: np.ndarray, count: int) -> np.ndarray:
    """The nearest centroids of each vector, (vectors, count), in no order."""
    half, found = (centroids**2).sum(1) / 2, np.empty((len(vectors), count), np.int64)
    for start in range(0, len(vectors), BLOCK):
        near = vectors[start : start + BLOCK] @ centroids.T - half
        best = near.argmax(1)[:, None] if count == 1 else np.argpartition(-near, count - 1, axis=1)[:, :count]
        found[start : start + BLOCK] = best
    return found


class Centroids:
    """Centroids in cells: a vector is compared with those in the cells that are nearest to it."""

    def __init__(self, cells: np.ndarray, ends: np.ndarray, all: np.ndarray) -> None:
        """Args: the means of the cells, (cells, dim); where the centroids of each end; (centroids, dim) float32."""
        self.cells, self.ends, self.all = cells, ends, all

    @classmethod
    def train(cls, sample: np.ndarray, count: int) -> Centroids:
        """Choose about `count` centroids by k-means over vectors, (vectors, dim); in each cell its share of them."""
        cells = kmeans(sample[: 512 * int(count**0.5)], max(1, round(count**0.5)))
        places = nearest(sample, cells)
        inside = [sample[places == cell] for cell in range(len(cells))]
        found = [kmeans(held, max(1, count * len(held) // len(sample))) for held in inside if len(held)]
        cells = cells[[cell for cell, held in enumerate(inside) if len(held)]]
        return cls(cells, np.cumsum([len(part) for part in found]), np.concatenate(found))

    def products(self, query: np.ndarray) -> np.ndarray:
        """Inner products with vectors, (vectors, dim): (vectors, centroids)."""
        return query @ self.all.T

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """The nearest centroid of each vector that is in one of the cells nearest to it, (vectors,)."""
        cells = _nearest(vectors, self.cells, min(CELLS, len(self.cells)))
        best, found = np.full(len(vectors), -np.inf, np.float32), np.zeros(len(vectors), np.int64)
        half = (self.all**2).sum(1) / 2
        order = np.argsort(cells, axis=None, kind="stable")
        owners, bounds = order // cells.shape[1], np.searchsorted(cells.ravel()[order], np.arange(len(self.cells) + 1))
        for cell, (start, end) in enumerate(pairwise(bounds)):
            first, last = int(self.ends[cell - 1]) if cell else 0, int(self.ends[cell])
            mine = owners[start:end]
            near = vectors[mine] @ self.all[first:last].T - half[first:last]
            place = near.argmax(1) if len(mine) else np.zeros(0, np.int64)
            value = near[np.arange(len(mine)), place]
            better = value > best[mine]
            best[mine[better]], found[mine[better]] = value[better], place[better] + first
        return found

    def write(self, file: BinaryIO) -> None:
        """Write to a file that `read` takes."""
        for array in (self.cells, self.ends, self.all):
            np.save(file, array)

    @classmethod
    def read(cls, file: BinaryIO) -> Centroids:
        """Read what `write` wrote."""
        return cls(np.load(file), np.load(file), np.load(file))
