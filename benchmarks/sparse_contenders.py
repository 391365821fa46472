"""The contenders of `sparse_engines.py`: each builds an index in a folder, opens it, and gives rows for a query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sparse_vectors import VOCABULARY, Rows

BATCH = 10_000


class Contender:
    """One way to search lexical weights."""

    #: what a search does, from the fastest on: the benchmark takes the first that reaches the recall
    efforts: tuple[Any, ...] = (None,)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self, rows: Rows) -> None:
        """Index all rows, durably."""
        raise NotImplementedError

    def open(self) -> None:
        """Read what was built."""
        raise NotImplementedError

    def search(self, ids: np.ndarray, weights: np.ndarray, k: int, effort: Any) -> list[int]:
        """The k best rows."""
        raise NotImplementedError


class Exact(Contender):
    """Our embedded default: every list of the query's tokens, in qdrant-edge."""

    engine_name = "qdrant-edge"

    def build(self, rows: Rows) -> None:
        from ultrarag.retrieve.engines import Schema, create

        engine = create(self.folder / "engine", Schema(sparse=True), self.engine_name)
        for first in range(0, len(rows[0]) - 1, BATCH):
            last = min(first + BATCH, len(rows[0]) - 1)
            engine.upsert([str(row) for row in range(first, last)], padded(rows, first, last), [{}] * (last - first))
        engine.flush()
        engine.optimize()
        engine.close()

    def open(self) -> None:
        from ultrarag.retrieve.engines import open_backend

        self.engine = open_backend(self.folder / "engine", verify=False)

    def search(self, ids: np.ndarray, weights: np.ndarray, k: int, effort: Any) -> list[int]:
        return [int(id) for id, _ in self.engine.search_sparse(ids, weights, k)]


class Postings(Exact):
    """Our embedded engine for many passages: blocks of alike rows by their bounds, hits scored anew."""

    engine_name = "ivf"


class Seismic(Contender):
    """pyseismic-lsr: lists cut to their highest weights, in clusters with summaries."""

    #: (tokens of the query that are looked at, how much of a summary's score must reach the hits)
    efforts = ((10, 0.8), (10, 0.9), (20, 0.9), (50, 0.9), (50, 1.0))

    def build(self, rows: Rows) -> None:
        import seismic

        starts, ids, weights = rows
        held = seismic.SeismicDataset(VOCABULARY)
        held.add_documents_by_id([str(row) for row in range(len(starts) - 1)], ids.astype(np.int64), weights, starts)
        kept = max(1000, (len(starts) - 1) // 250)  # of a million passages 1,000 give a recall@10 of 0.945 at best
        index = seismic.SeismicIndex.build_from_dataset(held, n_postings=kept, num_threads=1)
        index.save(str(self.folder / "index"))

    def open(self) -> None:
        import seismic

        self.index = seismic.SeismicIndex.load(str(self.folder / "index.index.seismic"))
        self.kind = seismic.get_seismic_string()

    def search(self, ids: np.ndarray, weights: np.ndarray, k: int, effort: Any) -> list[int]:
        return [int(hit[2]) for hit in self.index.search("", ids.astype(self.kind), weights, k, *effort)]


def padded(rows: Rows, first: int, last: int) -> Any:
    """Some rows as Embeddings."""
    from ultrarag.types import Embeddings, Sparse

    starts, ids, weights = rows
    lengths, held = np.diff(starts[first : last + 1]), slice(int(starts[first]), int(starts[last]))
    there = np.arange(lengths.max()) < lengths[:, None]
    found = Sparse(np.full(there.shape, Sparse.PAD_ID, np.int64), np.zeros(there.shape, np.float32))
    found.ids[there], found.weights[there] = ids[held], weights[held]
    return Embeddings(sparse=found)


CONTENDERS: dict[str, type[Contender]] = {
    "ultrarag qdrant-edge": Exact,
    "ultrarag ivf": Postings,
    "pyseismic-lsr": Seismic,
}
