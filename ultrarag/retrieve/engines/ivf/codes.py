"""Candidates for a dense query: the space is cut into partitions, and the codes of the nearest ones are scanned.

Codes are derived: lost ones are made again from the vectors, more than 100,000 a second (384 dimensions, one core).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from ultrarag.errors import UsageError
from ultrarag.packages import install

#: Bits of a code for each dimension: with ten candidates for each hit, the recall of 384 dimensions is that of 4 bits.
BITS = 2
#: Rows of a partition, about. A million real vectors are searched with a recall of 0.972 in 16 partitions of 4,096, and
#: of 0.973 in 8 of 16,384, in 1.9 and 2.5 ms (a loaded machine); smaller ones cost more calls, and more k-means.
PARTITION_ROWS = 4096
#: Vectors of the sample for each partition, and rounds of k-means.
SAMPLE_ROWS, ROUNDS = 256, 10
#: Partitions that a search looks into; where a filter lets few pass, more.
PROBES = 16
#: Vectors that are compared with the centres at a time.
BLOCK_ROWS = 8192
#: Codes take values up to 1e16.
LARGEST = np.float32(1e15)


class Codes:
    """Codes of the rows 0 .. `rows` - 1 of a table, by partition."""

    def __init__(self, centroids: np.ndarray) -> None:
        """`centroids` are unit vectors, (partitions, dim) float32."""
        self.centroids = centroids
        self.rows = 0
        #: rows that there were when it was trained
        self.trained = 0
        self._indexes = [_index(centroids.shape[1]) for _ in centroids]
        self._held = [np.zeros(0, np.int32) for _ in centroids]

    @classmethod
    def train(cls, rows: int, read: Callable[[np.ndarray], np.ndarray]) -> Codes:
        """Choose the partitions for so many rows by k-means over a sample; `read` gives the vectors of rows."""
        partitions = max(1, round(rows / PARTITION_ROWS))
        size = min(rows, SAMPLE_ROWS * max(partitions, 16))
        sample = read(np.sort(np.random.default_rng(0).choice(rows, size, replace=False)))
        codes = cls(kmeans(sample, partitions))
        codes.trained = rows
        places = nearest(sample, codes.centroids)
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], range(1, len(codes.centroids)))
        for index, rows in zip(codes._indexes, np.split(order, bounds), strict=True):
            own = sample[rows]
            index.calibrate(_fitting(own if len(own) >= SAMPLE_ROWS // 2 else sample))
        return codes

    def add(self, vectors: np.ndarray) -> None:
        """Add the rows that follow, (count, dim) float32."""
        places = nearest(vectors, self.centroids)
        for number in np.unique(places):
            own = np.flatnonzero(places == number)
            self._indexes[number].add(_fitting(vectors[own]))
            self._held[number] = np.concatenate([self._held[number], (own + self.rows).astype(np.int32)])
        self.rows += len(vectors)

    def search(self, query: np.ndarray, count: int, passing: np.ndarray | None, share: float) -> np.ndarray:
        """The rows of the best candidates, at most `count`, in no order.

        Args:
            passing: which rows may be given, (rows,) bool; None: all.
            share: how many of all rows pass, 0 to 1.
        """
        probes = self._probes(count, share)
        nearness = self.centroids @ query
        chosen = np.argpartition(-nearness, probes - 1)[:probes] if probes < len(nearness) else range(len(nearness))
        asked = _fitting(query[None])
        found = [self._search(number, asked, count, passing) for number in chosen]
        scores, rows = (np.concatenate(part) for part in zip(*found, strict=True))
        return rows if len(rows) <= count else rows[np.argpartition(-scores, count - 1)[:count]]

    def _probes(self, count: int, share: float) -> int:
        """Partitions to look into: as many as hold enough that passes."""
        enough = len(self.centroids) * 4 * count / max(1.0, self.rows * share)
        return min(len(self.centroids), int(np.ceil(max(PROBES / max(share, 1e-9) ** 0.5, enough))))

    def _search(
        self, number: int, query: np.ndarray, count: int, passing: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        held = self._held[number]
        kept = None if passing is None else passing[held]
        if not len(held) or (kept is not None and not kept.any()):
            return np.zeros(0, np.float32), np.zeros(0, np.int32)
        scores, places = self._indexes[number].search(query, count, mask=kept)
        return scores[0], held[places[0]]

    def write(self, file: BinaryIO) -> None:
        """Write everything to a file that `read` takes."""
        np.save(file, np.array([self.rows, self.trained], np.int64))
        np.save(file, self.centroids)
        for index, held in zip(self._indexes, self._held, strict=True):
            np.save(file, held)
            np.save(file, np.frombuffer(index.to_bytes(), np.uint8))

    @classmethod
    def read(cls, file: BinaryIO) -> Codes:
        """Read what `write` wrote."""
        rows, trained = np.load(file).tolist()
        codes = cls(np.load(file))
        codes.rows, codes.trained = rows, trained
        for number in range(len(codes.centroids)):
            codes._held[number] = np.load(file)
            codes._indexes[number] = _library().from_bytes(np.load(file).tobytes())
        return codes


def kmeans(sample: np.ndarray, count: int) -> np.ndarray:
    """Directions around which vectors gather, (count, dim) unit vectors; where one stays empty it keeps its place."""
    unit = sample / np.maximum(np.linalg.norm(sample, axis=1, keepdims=True), 1e-12)
    rng = np.random.default_rng(0)
    centroids = unit[rng.choice(len(unit), min(count, len(unit)), replace=False)].copy()
    for _ in range(ROUNDS):
        places = nearest(unit, centroids)
        order = np.argsort(places, kind="stable")
        for number, rows in enumerate(np.split(order, np.searchsorted(places[order], range(1, len(centroids))))):
            total = unit[rows].sum(0)
            if length := float(np.linalg.norm(total)):
                centroids[number] = total / length
    return np.ascontiguousarray(centroids, np.float32)


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The centroid with the largest inner product for each vector, (len(vectors),); a block at a time: the products of
    all the sample of ten million rows would be six gigabytes.
    """
    found = [(vectors[at : at + BLOCK_ROWS] @ centroids.T).argmax(1) for at in range(0, len(vectors), BLOCK_ROWS)]
    return np.concatenate([np.zeros(0, np.int64), *found])


def check_library() -> None:
    """Raise UsageError where the library of the codes is not installed."""
    _library()


def _library() -> Any:
    try:
        from turbovec import TurboQuantIndex
    except ModuleNotFoundError as error:
        raise UsageError(f"the engine 'ivf' needs {error.name}: {install('turbovec')}") from error
    return TurboQuantIndex


def _index(dim: int) -> Any:
    return _library()(-(-dim // 8) * 8, BITS)


def _fitting(vectors: np.ndarray) -> np.ndarray:
    """As the library takes them: of a width that eight divides, and with values that it does not refuse."""
    if missing := -vectors.shape[1] % 8:
        vectors = np.pad(vectors, ((0, 0), (0, missing)))
    return np.ascontiguousarray(np.clip(vectors, -LARGEST, LARGEST), np.float32)
