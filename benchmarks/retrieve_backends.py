"""Write rate, latency and recall of every vector engine on synthetic vectors.

    python benchmarks/retrieve_backends.py --n 10000 --dim 384 --output benchmarks/results/retrieve_backends.json

Vectors are unit-length sums of one of 200 cluster centres and noise in 32 directions, which is closer to text
embeddings than isotropic noise; queries come from the same distribution. Lexical weights: 60 of 30,000 token ids.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ultrarag.retrieve.engines.registry import BACKENDS, Schema, create, open_backend
from ultrarag.types import Embeddings, Sparse

VOCABULARY, TOKENS, TOKEN_DIM, CANDIDATES = 30_000, 60, 64, 100


def main() -> None:
    """Run both engines and print, or write, one JSON document."""
    args = _arguments()
    if args.graph_from_kb is not None:
        from ultrarag.retrieve.engines.qdrant import embedded as qdrant_points

        qdrant_points.HNSW_FROM_KB = args.graph_from_kb
    rng = np.random.default_rng(args.seed)
    stored, queries = _embeddings(rng, args.n, args.dim), _embeddings(rng, args.queries, args.dim)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[0], 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        **{name: value for name, value in vars(args).items() if name != "output"},
        "backends": {name: _measure(name, args.n, stored, queries) for name in args.backends},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"{text}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000, help="passages")
    parser.add_argument("--dim", type=int, default=384, help="width of the dense vectors")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--graph-from-kb", type=int, help="build the graph from this size on, to see it at small --n")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


def _embeddings(rng: np.random.Generator, count: int, dim: int) -> Embeddings:
    basis = np.random.default_rng(1).normal(size=(200 + 32, dim))
    dense = basis[rng.integers(200, size=count)] + 0.35 * rng.normal(size=(count, 32)) @ basis[200:]
    ids = np.sort(rng.integers(VOCABULARY // TOKENS, size=(count, TOKENS)) + np.arange(TOKENS) * (VOCABULARY // TOKENS))
    return Embeddings(
        dense=(dense / np.linalg.norm(dense, axis=1, keepdims=True)).astype(np.float32),
        sparse=Sparse(ids, rng.random((count, TOKENS)).astype(np.float32) + 0.01),
        colbert=rng.normal(size=(count, 16, TOKEN_DIM)).astype(np.float32),
        mask=np.ones((count, 16), np.int64),
    )


def _measure(name: str, n: int, stored: Embeddings, queries: Embeddings) -> dict[str, float]:
    ids = [f"passage/{i}" for i in range(n)]
    metadata = [{"tenth": i % 10, "n": i} for i in range(n)]
    with tempfile.TemporaryDirectory() as directory:
        backend = create(Path(directory, "index"), Schema.of(stored), name)
        started = time.perf_counter()
        for start in range(0, n, 1000):
            part = slice(start, start + 1000)
            backend.upsert(ids[part], stored[part], metadata[part])
        result = {"upsert_per_s": n / (time.perf_counter() - started)}
        result["flush_s"] = _seconds(backend.flush)
        result["optimize_s"] = _seconds(backend.optimize)
        dense, sparse = queries.dense, queries.sparse
        searches: dict[str, Callable[[int], object]] = {
            "dense_exact": lambda i: backend.search_dense(dense[i], 10, exact=True),
            "dense": lambda i: backend.search_dense(dense[i], 10),
            "dense_filtered": lambda i: backend.search_dense(dense[i], 10, {"tenth": 3}),
            "sparse": lambda i: backend.search_sparse(sparse.ids[i], sparse.weights[i], 10),
            f"maxsim_{CANDIDATES}": lambda i: backend.maxsim(queries.colbert[i], ids[:CANDIDATES]),
        }
        for search, run in searches.items():
            result[f"{search}_p50_ms"], result[f"{search}_p99_ms"] = _latency(run, len(queries))
        for suffix, filter in (("", None), ("_filtered", {"tenth": 3})):
            found, exact = (
                [{id for id, _ in backend.search_dense(query, 10, filter, flag)} for query in dense]
                for flag in (False, True)
            )
            result[f"recall_at_10{suffix}"] = np.mean([len(a & b) / 10 for a, b in zip(found, exact, strict=True)])
        result["close_s"] = _seconds(backend.close)
        started = time.perf_counter()
        again = open_backend(Path(directory, "index"))
        result["open_s"] = time.perf_counter() - started
        again.close()
        result["bytes_per_passage"] = _bytes(Path(directory)) / n
    return {key: round(float(value), 4) for key, value in result.items()}


def _bytes(directory: Path) -> int:
    """Bytes on disk; the engine's files are mostly holes."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _latency(run: Callable[[int], object], count: int) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds, after a warm-up."""
    run(0)
    times = [1000 * _seconds(lambda i=i: run(i)) for i in range(count)]  # type: ignore[misc]
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


if __name__ == "__main__":
    main()
