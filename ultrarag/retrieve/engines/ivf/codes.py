"""Candidates for a dense query: the space is cut into lists around centroids, and the codes of the nearest are scanned.

Codes are RaBitQ's (Gao and Long, SIGMOD 2024, https://arxiv.org/abs/2405.12497), of faiss, after a random rotation: of
one bit a dimension, of more where there are few. They are derived: lost ones are made again from the vectors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from ultrarag.errors import UsageError
from ultrarag.packages import install

#: Bits of a code at least, and bits of a dimension at most: one is enough for 256 dimensions and more.
CODE_BITS, MOST_BITS = 256, 8
#: Lists for the square root of the rows: half as many lose 0.02 of the recall@10 of a million real vectors, twice as
#: many are built at half the rate. Of 4,096 a row needs 40 microseconds to find its list, all else of a passage 100.
LISTS, MOST_LISTS = 2.0, 4096
#: Vectors of the sample for each list, and rounds of k-means.
SAMPLE_ROWS, ROUNDS = 40, 8
#: Lists that a search looks into; where a filter lets few pass, more.
PROBES = 48
#: Squares of such values in a code are still finite.
LARGEST = np.float32(1e15)


class Codes:
    """Codes of the rows 0 .. `rows` - 1 of a table, by list."""

    def __init__(self, index: Any, trained: int) -> None:
        """`index` is faiss's, a rotation before inverted lists."""
        self._index = index
        #: rows that there were when it was trained
        self.trained = trained

    @property
    def rows(self) -> int:
        """Rows that have codes."""
        return int(self._index.ntotal)

    @property
    def lists(self) -> int:
        """How many lists there are."""
        return int(_library().downcast_index(self._index.index).nlist)

    @classmethod
    def train(cls, rows: int, read: Callable[[np.ndarray], np.ndarray]) -> Codes:
        """Choose the lists for so many rows by k-means over a sample; `read` gives the vectors of rows."""
        faiss = _library()
        lists = min(MOST_LISTS, max(1, round(LISTS * rows**0.5)))
        chosen = np.random.default_rng(0).choice(rows, min(rows, SAMPLE_ROWS * lists), replace=False)
        sample = _fitting(read(np.sort(chosen)))
        dim = sample.shape[1]
        kind = f"RR,IVF{lists},RaBitQ{min(MOST_BITS, -(-CODE_BITS // dim))}"
        index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        kmeans = faiss.downcast_index(index.index).cp
        kmeans.niter, kmeans.max_points_per_centroid, kmeans.min_points_per_centroid = ROUNDS, SAMPLE_ROWS, 1
        sample /= np.maximum(np.sqrt(np.einsum("rd,rd->r", sample, sample)), 1e-12)[:, None]
        index.train(sample)
        return cls(index, rows)

    def add(self, vectors: np.ndarray) -> None:
        """Add the rows that follow, (count, dim) float32."""
        self._index.add(_fitting(vectors))

    def search(self, query: np.ndarray, count: int, bits: np.ndarray | None = None, share: float = 1.0) -> np.ndarray:
        """The rows of the best candidates, at most `count`, in no order.

        Args:
            bits: which rows may be given, eight a byte, the first of them the lowest; None: all.
            share: how many of all rows pass, 0 to 1.
        """
        faiss = _library()
        selected = None if bits is None else faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        within = faiss.IVFRaBitQSearchParameters(nprobe=self._probes(count, share), sel=selected)
        asked = faiss.SearchParametersPreTransform(index_params=within)
        found = self._index.search(_fitting(query[None]), min(count, self.rows), params=asked)[1][0]
        return found[found >= 0]

    def _probes(self, count: int, share: float) -> int:
        """Lists to look into: as many as hold enough that passes."""
        enough = self.lists * 4 * count / max(1.0, self.rows * share)
        return min(self.lists, int(np.ceil(max(PROBES / max(share, 1e-9) ** 0.25, enough))))

    def write(self, file: BinaryIO) -> None:
        """Write everything to a file that `read` takes."""
        np.save(file, np.array([self.trained], np.int64))
        faiss = _library()
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    @classmethod
    def read(cls, file: BinaryIO) -> Codes:
        """Read what `write` wrote."""
        (trained,), faiss = np.load(file).tolist(), _library()
        return cls(faiss.read_index(faiss.PyCallbackIOReader(file.read)), trained)


def check_library() -> None:
    """Raise UsageError where the library of the codes is not installed."""
    _library()


def _library() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UsageError(f"the engine 'ivf' needs {error.name}: {install('faiss-cpu')}") from error
    _mind_forks()
    return faiss


@lru_cache
def _mind_forks() -> None:
    """In a fork, GNU's OpenMP waits for ever for the threads that its parent had: there one thread does it all."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _library().omp_set_num_threads(1))


def _fitting(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.clip(vectors, -LARGEST, LARGEST), np.float32)
