"""Search, build and memory of the index beside its peers, and searches during a build and at the flip.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/live_index.py                          # 10,000 and 100,000 vectors of 384 dimensions
    python benchmarks/live_index.py --sizes 1000000 --output million.md

Synthetic vectors: unit-length sums of one of 200 cluster centres and noise in 32 directions, which is closer to text
embeddings than isotropic noise; texts of 60 words whose frequencies follow Zipf's law; lexical weights of 60 of 30,000
token ids. Every contender runs in a process of its own, one query at a time. The second part is a real LiveIndex with a
real model: one thread searches while a generation is built, swapped in and rolled back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from live_index_contenders import CONTENDERS, FILES, K, vectors
from live_index_searching import during_a_build
from machine import processor_name

PAGE = Path(__file__).parent / "results" / "live_index.md"


def main(arguments: list[str] | None = None) -> None:
    """Run everything, print the page, and write it with its JSON."""
    options = parse(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threads = os.environ["OMP_NUM_THREADS"]
    report: dict[str, Any] = {
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {threads} thread(s) per contender",
        "load_average_before": round(os.getloadavg()[0], 1),
        "dim": options.dim,
        "queries": options.queries,
        "versions": versions(),
        "note": options.note,
        "search": [],
    }
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            for name in options.only or CONTENDERS:
                report["search"].append(in_child(name, size, Path(place), options))
                write(report, options.output)
    if options.live:
        report["live"] = during_a_build(options)
    print(write(report, options.output))


def write(report: dict[str, Any], output: Path) -> str:
    """Write what was measured so far, and return the page."""
    report["load_average_after"] = round(os.getloadavg()[0], 1)
    page = render(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return page


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000], help="passages")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="run only these")
    parser.add_argument("--live", type=int, default=2000, help="passages of the live index; 0: leave that part out")
    parser.add_argument("--model", help="folder or hub name for it (default: the small model of the tests)")
    parser.add_argument("--note", help="what a reader of the page should know, such as what else ran")
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args(arguments)


def in_child(name: str, size: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build one contender in a process, and search it in a fresh one, so that its memory is that of searching."""
    row: dict[str, Any] = {"contender": name, "passages": size}
    for work in (build, search):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row |= pool.submit(work, name, size, folder, options).result()
    print(f"{name} at {size}: {row}", file=sys.stderr, flush=True)
    return row


def build(name: str, size: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build one contender; nothing is timed where the parts of a hybrid were built before."""
    stood = all((folder / file).exists() for file in FILES[name])
    run = CONTENDERS[name](folder, size, options)[0]()
    return {"build": None if stood else timed(run)}


def search(name: str, size: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Open and search one contender; latencies of each kind of search, and the recall of the approximate ones."""
    open_ = CONTENDERS[name](folder, size, options)[1]
    before, started = resident(), time.perf_counter()
    searches = open_()
    row: dict[str, Any] = {"open_seconds": time.perf_counter() - started}
    row["search"] = {kind: latency(one, options.queries) for kind, one in searches.items()}
    row["disk_bytes_per_passage"] = sum(on_disk(folder / file) for file in FILES[name]) / size
    row["memory_bytes_per_passage"] = max(0, resident() - before) / size
    row["load_average"] = round(os.getloadavg()[0], 1)
    if "dense approximate" in searches:
        row["recall"] = recall(searches["dense approximate"], size, options)
    return row


def timed(build: Callable[[], Any]) -> dict[str, float]:
    """Run a build; its wall and processor seconds, those of child processes included."""
    wall, spent = time.perf_counter(), processor_seconds()
    build()
    return {"seconds": time.perf_counter() - wall, "processor_seconds": processor_seconds() - spent}


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def latency(search: Callable[[int], Any], count: int) -> dict[str, float]:
    """Milliseconds per query after a warm-up, and processor milliseconds."""
    for number in range(min(20, count)):
        search(number)
    times, processor = [], time.process_time()
    for number in range(count):
        started = time.perf_counter()
        search(number)
        times.append(1000 * (time.perf_counter() - started))
    spent = 1000 * (time.process_time() - processor) / count
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99)), "processor": spent}


def recall(search: Callable[[int], list[str]], size: int, options: argparse.Namespace) -> float:
    """The share of the true ten nearest that an approximate search finds."""
    from ultrarag.evaluation.metrics import top_k

    _, rows = top_k(vectors(options.queries, options.dim, 9), vectors(size, options.dim, 0), K)
    shares = [len({f"p{row}" for row in wanted} & set(search(i))) / K for i, wanted in enumerate(rows)]
    return float(np.mean(shares))


def resident() -> int:
    """The process's resident memory in bytes, mapped files included (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def on_disk(place: Path) -> int:
    """Bytes that a file or a folder occupies; engines preallocate files that are mostly holes."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files)


def versions() -> dict[str, str]:
    """Of the engines."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("qdrant-edge-py", "numpy", "faiss-cpu", "bm25s", "lancedb"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Live index",
        "",
        f"{report['machine']}; load average {report['load_average_before']} before and "
        f"{report['load_average_after']} after (where other work ran, read the processor times, and compare "
        "rows of one run). "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ". Written by `benchmarks/live_index.py`.",
        *(["", report["note"]] if report.get("note") else []),
        "",
        f"## Search and build, {report['dim']} dimensions, one query at a time, {report['queries']} queries, "
        "the 10 best",
        "",
        "Memory is the growth of the resident set by opening and searching in a fresh process, mapped files included. "
        "Build is all of it: "
        "writing, the graph, and closing durably; the hybrid's is that of its parts. ultrarag's 10,000 are below the "
        "size from which a graph pays.",
        "",
        "| passages | contender | search | p50 ms | p99 ms | processor ms | recall@10 | build, passages/s "
        "| by processor s | disk, bytes/passage | memory, bytes/passage |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line for row in report["search"] for line in search_lines(row)]
    if live := report.get("live"):
        lines += live_lines(live)
    return "\n".join(lines) + "\n"


def search_lines(row: dict[str, Any]) -> list[str]:
    """A line per kind of search."""
    lines = []
    built = row["build"]
    rates = [f"{row['passages'] / built[key]:.0f}" if built else "" for key in ("seconds", "processor_seconds")]
    for kind, times in row["search"].items():
        found = f"{row['recall']:.4f}" if kind == "dense approximate" else ""
        lines.append(
            f"| {row['passages']} | {row['contender']} | {kind} | {times['p50']:.2f} | {times['p99']:.2f} "
            f"| {times['processor']:.2f} | {found} | {rates[0]} | {rates[1]} | {row['disk_bytes_per_passage']:.0f} "
            f"| {row['memory_bytes_per_passage']:.0f} |"
        )
    return lines


def live_lines(live: dict[str, Any]) -> list[str]:
    """The phases of the live index."""
    ratio = {name: f"{row['p99_build_to_idle']:.2f}" for name, row in live["searches"].items()}
    failed = sum(len(row["failed"]) for row in live["searches"].values())
    lines = [
        "",
        f"## Searches while a generation is built and swapped, {live['passages']} passages, all-MiniLM-L6-v2",
        "",
        "Two threads search, with 20 ms between: one all the way (the query's encoding, dense and BM25, fusion, the "
        "passages), one with BM25 alone, which no encoding hides; the builder has one thread. p99 during the build is "
        + ", ".join(f"{number} times the idle one ({name})" for name, number in ratio.items())
        + f"; {failed} searches failed. *At the flip* is the longer of the last search before it and the first after "
        "it, in ms; so is how long writers waited. Before that, swap and rollback load an encoder and check vectors.",
        "",
        "| searches | phase | seconds | searches | p50 ms | p99 ms | longest ms | at the flip | writers waited |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {kind} | {name} | {row['seconds']:.1f} | {row['searches']} | {row['p50']:.1f} | {row['p99']:.1f} "
        f"| {row['longest']:.1f} | {row['at_the_flip']:.1f} | {row['writers_waited_ms']:.1f} |"
        for kind, found in live["searches"].items()
        for name, row in found["phases"].items()
    ]


if __name__ == "__main__":
    main()
