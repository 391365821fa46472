"""The engines that `live_index.py` compares, and the synthetic data that they are given."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, TOKENS, WORDS, LENGTH, CLUSTERS, NOISE = 30_000, 60, 50_000, 60, 200, 32
HNSW_M, EF_CONSTRUCT, EF_SEARCH = 16, 128, 128  # as our engine has them, for the peers too
K = 10
#: What a contender leaves in the folder that all contenders of one size share.
FILES = {
    "ultrarag dense": ["dense"],
    "faiss flat": ["dense exact.faiss"],
    "faiss hnsw": ["dense approximate.faiss"],
    "ultrarag sparse": ["sparse"],
    "ultrarag bm25": ["bm25"],
    "bm25s": ["bm25s"],
    "ultrarag hybrid": ["dense", "bm25"],
    "lancedb": ["lance"],
}


def vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors, (count, dim) float32."""
    basis = np.random.default_rng(1).normal(size=(CLUSTERS + NOISE, dim)).astype(np.float32)
    rng, parts = np.random.default_rng(seed), []
    for start in range(0, count, 50_000):
        rows = min(50_000, count - start)
        noise = rng.normal(size=(rows, NOISE)).astype(np.float32)
        part = basis[rng.integers(CLUSTERS, size=rows)] + 0.35 * noise @ basis[CLUSTERS:]
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    return np.concatenate(parts)


def texts(count: int, length: int, seed: int) -> list[str]:
    """Texts of made-up words; the share of a word falls with its rank."""
    share = 1 / (np.arange(WORDS) + 2.7)
    drawn = np.random.default_rng(seed).choice(WORDS, size=(count, length), p=share / share.sum())
    words = np.array([f"w{number}" for number in range(WORDS)])
    return [" ".join(row) for row in words[drawn]]


def lexical(count: int, seed: int) -> Any:
    """Lexical weights of TOKENS distinct token ids per row."""
    from ultrarag.types import Sparse

    rng, step = np.random.default_rng(seed), VOCABULARY // TOKENS
    ids = rng.integers(step, size=(count, TOKENS)) + np.arange(TOKENS) * step
    return Sparse(ids, rng.random((count, TOKENS)).astype(np.float32) + 0.01)


# Each contender gives (build, open). The first makes the data and gives the build itself; the second gives
# name -> search, called with a query's number.


def our_dense(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Our engine with dense vectors."""
    from ultrarag.types import Embeddings

    queries = vectors(options.queries, options.dim, 9)

    def build() -> Callable[[], None]:
        data = vectors(size, options.dim, 0)
        return lambda: fill(folder / "dense", size, lambda rows: Embeddings(dense=data[rows]))

    def open_() -> dict[str, Callable[[int], Any]]:
        backend = opened(folder / "dense")
        return {
            "dense exact": lambda i: names(backend.search_dense(queries[i], K, exact=True)),
            "dense approximate": lambda i: names(backend.search_dense(queries[i], K)),
        }

    return build, open_


def our_sparse(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Our engine with lexical weights."""
    from ultrarag.types import Embeddings, Sparse

    queries = lexical(options.queries, 9)

    def build() -> Callable[[], None]:
        data = lexical(size, 0)
        part = lambda rows: Embeddings(sparse=Sparse(data.ids[rows], data.weights[rows]))  # noqa: E731
        return lambda: fill(folder / "sparse", size, part)

    def open_() -> dict[str, Callable[[int], Any]]:
        backend = opened(folder / "sparse")
        return {"sparse": lambda i: names(backend.search_sparse(queries.ids[i], queries.weights[i], K))}

    return build, open_


def our_bm25(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Our BM25."""
    from ultrarag.retrieve.bm25.index import BM25

    queries = texts(options.queries, 8, 9)

    def build() -> Callable[[], None]:
        data = texts(size, LENGTH, 0)

        def run() -> None:
            index = BM25.create(folder / "bm25")
            for start in range(0, size, 1000):
                part = data[start : start + 1000]
                index.upsert([f"p{start + i}" for i in range(len(part))], part, [{}] * len(part))
            index.close()

        return run

    def open_() -> dict[str, Callable[[int], Any]]:
        index = BM25.open(folder / "bm25")
        return {"BM25": lambda i: names(index.search(queries[i], K))}

    return build, open_


def our_hybrid(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Dense and BM25, 100 candidates each, and their min-max sum, over what those two have built."""
    from ultrarag.retrieve.bm25.index import BM25
    from ultrarag.retrieve.search.fusion import fuse

    queries, asked = vectors(options.queries, options.dim, 9), texts(options.queries, 8, 9)
    weights = {"dense": 1.0, "bm25": 1.0}

    def open_() -> dict[str, Callable[[int], Any]]:
        backend, words = opened(folder / "dense"), BM25.open(folder / "bm25")

        def search(i: int) -> list[str]:
            lists = {"dense": backend.search_dense(queries[i], 100), "bm25": words.search(asked[i], 100)}
            return [hit.id for hit in fuse(lists, K, weights)]

        return {"hybrid": search}

    def build() -> Callable[[], None]:
        missing = [make for name, make in (("dense", our_dense), ("bm25", our_bm25)) if not (folder / name).exists()]
        ready = [make(folder, size, options)[0]() for make in missing]
        return lambda: [part() for part in ready] and None

    return build, open_


def faiss_flat(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """faiss, exact."""
    return faiss_index(folder, size, options, "dense exact", lambda faiss: faiss.IndexFlatIP(options.dim))


def faiss_hnsw(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """faiss, a graph with the parameters of ours."""

    def make(faiss: Any) -> Any:
        index = faiss.IndexHNSWFlat(options.dim, HNSW_M, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = EF_CONSTRUCT, EF_SEARCH
        return index

    return faiss_index(folder, size, options, "dense approximate", make)


def faiss_index(folder: Path, size: int, options: argparse.Namespace, name: str, make: Any) -> tuple[Any, Any]:
    """A faiss index, saved as one file."""
    import faiss

    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    queries = vectors(options.queries, options.dim, 9)
    path = str(folder / f"{name}.faiss")

    def build() -> Callable[[], None]:
        data = vectors(size, options.dim, 0)

        def run() -> None:
            index = make(faiss)
            for start in range(0, size, 1000):
                index.add(data[start : start + 1000])
            faiss.write_index(index, path)

        return run

    def open_() -> dict[str, Callable[[int], Any]]:
        index = faiss.read_index(path)
        return {name: lambda i: [f"p{row}" for row in index.search(queries[i : i + 1], K)[1][0]]}

    return build, open_


def bm25s(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """bm25s; it has no updates: the whole corpus is indexed at once."""
    import bm25s as library

    queries = texts(options.queries, 8, 9)

    def build() -> Callable[[], None]:
        data = texts(size, LENGTH, 0)

        def run() -> None:
            index = library.BM25(method="lucene", k1=1.2, b=0.75)
            index.index(library.tokenize(data, stopwords=None, show_progress=False), show_progress=False)
            index.save(str(folder / "bm25s"))

        return run

    def open_() -> dict[str, Callable[[int], Any]]:
        index = library.BM25.load(str(folder / "bm25s"))

        def search(i: int) -> list[str]:
            tokens = library.tokenize([queries[i]], stopwords=None, return_ids=False, show_progress=False)
            return [f"p{row}" for row in index.retrieve(tokens, k=K, show_progress=False)[0][0]]

        return {"BM25": search}

    return build, open_


def lancedb(folder: Path, size: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """LanceDB: an IVF-HNSW index with 8-bit vectors, full-text search, and its own reciprocal rank fusion."""
    import lancedb as library
    import pyarrow as pa
    from lancedb.index import FTS, HnswSq

    queries, asked = vectors(options.queries, options.dim, 9), texts(options.queries, 8, 9)

    def build() -> Callable[[], None]:
        data, words = vectors(size, options.dim, 0), texts(size, LENGTH, 0)

        def run() -> None:
            column = pa.FixedSizeListArray.from_arrays(pa.array(data.ravel()), options.dim)
            rows = pa.table({"id": [f"p{row}" for row in range(size)], "text": words, "vector": column})
            table = library.connect(str(folder / "lance")).create_table("passages", rows)
            graph = HnswSq(distance_type="dot", m=HNSW_M, ef_construction=EF_CONSTRUCT)
            table.create_index("vector", config=graph)
            table.create_index("text", config=FTS())

        return run

    def open_() -> dict[str, Callable[[int], Any]]:
        table = library.connect(str(folder / "lance")).open_table("passages")

        def dense(i: int) -> list[str]:
            found = table.search(queries[i]).distance_type("dot").ef(EF_SEARCH).select(["id", "_distance"]).limit(K)
            return [row["id"] for row in found.to_list()]

        def hybrid(i: int) -> list[str]:
            found = table.search(query_type="hybrid").vector(queries[i]).text(asked[i]).select(["id"]).limit(K)
            return [row["id"] for row in found.to_list()]

        return {"dense approximate": dense, "hybrid": hybrid}

    return build, open_


CONTENDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "ultrarag dense": our_dense,
    "faiss flat": faiss_flat,
    "faiss hnsw": faiss_hnsw,
    "ultrarag sparse": our_sparse,
    "ultrarag bm25": our_bm25,
    "bm25s": bm25s,
    "ultrarag hybrid": our_hybrid,
    "lancedb": lancedb,
}


def fill(folder: Path, size: int, part: Callable[[slice], Any]) -> None:
    """Write Embeddings into a new engine, optimise and close it."""
    from ultrarag.retrieve.engines.registry import Schema, create

    backend = create(folder, Schema.of(part(slice(0, 1))))
    for start in range(0, size, 1000):
        rows = slice(start, min(start + 1000, size))
        backend.upsert([f"p{row}" for row in range(rows.start, rows.stop)], part(rows), [{}] * (rows.stop - rows.start))
    backend.optimize()
    backend.close()


def opened(folder: Path) -> Any:
    """Open the engine that `fill` wrote."""
    from ultrarag.retrieve.engines.registry import open_backend

    return open_backend(folder, verify=False)


def names(scored: list[tuple[str, float]]) -> list[str]:
    """The ids of a result."""
    return [id for id, _ in scored]
