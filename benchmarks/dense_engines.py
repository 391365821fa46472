"""Engines for dense vectors side by side: build rate, memory, disk, latency, recall with and without filters, updates.

    python benchmarks/dense_engines.py --size 100000 --vectors clustered
    python benchmarks/dense_engines.py --size 100000 --vectors real --data path/to/data/sets --folder kept/vectors

Each contender builds in one process and searches in another, with one thread. Rates and latencies are of processor
time, so that other work on the machine counts less. Every candidate is scored anew with float16 vectors from the
disk, by the library where it does so itself. Of the efforts that a contender lists, the first with a recall@10 of
0.97 counts (the last where none has it), for the search and for each filter by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dense_contenders import CONTENDERS, Contender, labels
from dense_vectors import prepare
from machine import origin
from steps import installed, latency, measured, on_disk, one_thread, resident

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("qdrant-edge-py", "faiss-cpu", "usearch", "turbovec", "zvec", "numpy")
K, WANTED, CHANGED = 10, 0.97, 1000
FILTERS = {"no filter": "", "1 %": "hundredth", "10 %": "tenth"}


def main() -> None:
    options = parse()
    one_thread()
    if options.work:
        work(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure the contenders that are asked for, and write what is known of all."""
    files = prepare(options.vectors, options.folder, options.size, options.dim, options.queries, options.data)
    truth(*files, options.folder / f"{options.vectors}-{options.size}-truth.npz")
    path = options.output or RESULTS / f"dense_engines_{options.vectors}_{options.size}.json"
    for name in options.contenders or CONTENDERS:
        found = {**measured(__file__, name, options), "load average": round(os.getloadavg()[0], 1)}
        report = json.loads(path.read_text()) if path.exists() else {"contenders": {}}
        report = {
            **origin(1, ("numpy",)),
            "versions": {**report.get("versions", {}), **installed(PACKAGES)},
            **{key: getattr(options, key) for key in ("size", "dim", "vectors", "queries")},
            "contenders": {**report["contenders"], name: found},
        }
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(render(report), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", choices=["real", "clustered"], default="clustered")
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--data", type=Path, help="folder of data sets in BEIR's layout, for real vectors")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "dense-vectors"), help="keeps vectors"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a contender may build")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("STEP", "NAME", "PLACE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def passing(label: str, size: int) -> np.ndarray:
    """Which rows pass the filter LABEL = 3, (size,) bool; all without a label."""
    if not label:
        return np.ones(size, bool)
    mixed = np.arange(size, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32) // np.uint64(7)
    assert all(int(mixed[row]) % 10 == labels(row)["tenth"] for row in range(0, size, max(1, size // 7)))
    return mixed % np.uint64(10 if label == "tenth" else 100) == 3


def truth(passages: Path, asked: Path, path: Path) -> None:
    """Write the exact best rows of every query, with each filter."""
    if path.exists():
        return
    vectors, queries = np.load(passages, mmap_mode="r"), np.load(asked)
    kept = {name: passing(label, len(vectors)) for name, label in FILTERS.items()}
    best: dict[str, Any] = {name: ([], []) for name in FILTERS}
    for start in range(0, len(vectors), 50_000):
        scores = queries @ np.asarray(vectors[start : start + 50_000]).T
        for name, (values, rows) in best.items():
            only = np.flatnonzero(kept[name][start : start + 50_000])
            order = np.argpartition(-scores[:, only], K, axis=1)[:, :K]
            rows.append(only[order] + start)
            values.append(np.take_along_axis(scores[:, only], order, 1))
    found = {}
    for name, (values, rows) in best.items():
        order = np.argsort(-np.concatenate(values, 1), axis=1, kind="stable")[:, :K]
        found[name] = np.take_along_axis(np.concatenate(rows, 1), order, 1)
    np.savez(path, **found)


def work(options: argparse.Namespace) -> None:
    """One step of one contender, in this process."""
    step, name, place = options.work
    folder = Path(place, "index")
    folder.mkdir(exist_ok=True)
    vectors = np.load(options.folder / f"{options.vectors}-{options.size}.npy", mmap_mode="r")
    contender = CONTENDERS[name](folder, options.dim)
    print(json.dumps(build(contender, vectors) if step == "build" else search(contender, vectors, options)))


def build(contender: Contender, vectors: np.ndarray) -> dict[str, Any]:
    before = sum(os.times()[:4])  # qdrant-edge builds its graph in a child process
    if not contender.rescores:
        half = np.lib.format.open_memmap(contender.folder / "half.npy", "w+", np.float16, vectors.shape)
        half[:] = vectors
        half.flush()
    contender.build(vectors)
    spent = sum(os.times()[:4]) - before
    return {
        "vectors per core second": round(len(vectors) / spent),
        "disk, bytes a passage": round(on_disk(contender.folder) / len(vectors)),
        "peak of the build, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def search(contender: Contender, vectors: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    queries = np.load(options.folder / f"{options.vectors}-queries-{options.queries}.npy")
    best = np.load(options.folder / f"{options.vectors}-{options.size}-truth.npz")
    before = resident()
    started = time.process_time()
    contender.open()
    found: dict[str, Any] = {"open, processor seconds": round(time.process_time() - started, 2)}
    half = None if contender.rescores else np.load(contender.folder / "half.npy", mmap_mode="r")
    for name, label in FILTERS.items():
        kept = passing(label, len(vectors))
        found[name] = first_enough(contender, half, queries, best[name], kept, label)
        if not label:
            grown = {kind: (held - before[kind]) / len(vectors) for kind, held in resident().items()}
            found["memory, bytes a passage"] = round(grown["RssAnon"])
            found["mapped from files, bytes a passage"] = round(grown["RssFile"])
    return found | updates(contender, vectors, len(vectors))


def first_enough(
    contender: Contender, half: Any, queries: np.ndarray, best: np.ndarray, kept: np.ndarray, label: str
) -> dict[str, Any]:
    """Recall and latency at the first effort that is enough."""
    found: dict[str, Any] = {}
    for effort in contender.efforts:
        count = K * contender.oversampling

        def run(query: np.ndarray, effort: int = effort, count: int = count) -> np.ndarray:
            if label:
                rows = contender.filtered(query, count, effort, kept, label)
            else:
                rows = contender.search(query, count, effort)
            return rows[:K] if half is None else rescored(half, query, rows)

        run(queries[0])
        spent, rows = zip(*(timed(run, query) for query in queries), strict=True)
        recall = np.mean([len(np.intersect1d(one, other)) / K for one, other in zip(rows, best, strict=True)])
        found = {
            "effort": effort,
            "recall@10": round(float(recall), 4),
            **latency(spent),
        }
        if recall >= WANTED:
            break
    return found


def rescored(half: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The K best of the candidates, by their vectors on the disk."""
    scores = np.asarray(half[rows], np.float32) @ query
    return rows[np.argsort(-scores)[:K]]


def timed(run: Callable[[np.ndarray], np.ndarray], query: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds of the processor, of all threads."""
    started = time.process_time()
    rows = run(query)
    return time.process_time() - started, rows


def updates(contender: Contender, vectors: np.ndarray, size: int) -> dict[str, Any]:
    """Rates of adding and of deleting, and whether the next search knows of both."""
    some = np.asarray(vectors[:CHANGED], np.float32)
    started = time.process_time()
    contender.add(size, some)
    added = time.process_time()
    contender.delete(np.arange(CHANGED))
    deleted = time.process_time()
    rows = contender.search(some[0], 10 * K, contender.efforts[-1])
    return {
        "added per core second": round(CHANGED / max(added - started, 1e-6)),
        "deleted per core second": round(CHANGED / max(deleted - added, 1e-6)),
        "the next search knows": bool(size in rows and 0 not in rows),
    }


def render(report: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# Dense engines: {report['size']:,} x {report['dim']}, {report['vectors']} vectors",
        "",
        f"{report['machine']}, {report['date']}, {packages}. Processor time; {report['queries']} queries.",
        "",
        "| | vectors/core s | memory, B | mapped, B | disk, B | p50 / p99 ms | recall@10 (effort) | 1 %: p50, recall | "
        "10 %: p50, recall | added, deleted per core s | load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {row(found)} |" for name, found in report["contenders"].items()]
    return "\n".join(lines) + "\n"


def row(found: dict[str, Any]) -> str:
    if "no filter" not in found:
        why = " ".join(found["failed"].split())[-200:].replace("|", "/")
        return f"{found.get('vectors per core second', '-')} | failed: {why}" + " |" * 8
    plain, some, more = (found[name] for name in FILTERS)
    seen = "" if found["the next search knows"] else " (not seen)"
    cells = [
        found["vectors per core second"],
        found["memory, bytes a passage"],
        found["mapped from files, bytes a passage"],
        found["disk, bytes a passage"],
        f"{plain['p50 ms']} / {plain['p99 ms']}",
        f"{plain['recall@10']} ({plain['effort']})",
        *(f"{one['p50 ms']}, {one['recall@10']} ({one['effort']})" for one in (some, more)),
        f"{found['added per core second']}, {found['deleted per core second']}{seen}",
        found["load average"],
    ]
    return " | ".join(map(str, cells))


if __name__ == "__main__":
    main()
