"""One index of ten million passages on one machine: build, open, search, write, a crash, swap, rollback.

    python benchmarks/ten_million.py --folder kept/ten-million
    python benchmarks/ten_million.py --passages 100000 --output kept/small.json

10,000,000 x 384 through LiveIndex with the engine ivf and BM25: made-up vectors, texts, ids and metadata
(`ten_million_data.py`); the passages that a swap looks at have the vectors of all-MiniLM-L6-v2. Each stage is a process
of its own. What is done is kept, with the index, in --folder (22 GB for ten million; 60 GB with `mapped`), and a second
call goes on. Stages, in this order, each of which needs those before it:

  build   all passages with their vectors by `add`; the exact best of every query are found meanwhile (apart: "data")
  search  `read_status` and `open` of a closed index; searches by vectors, by words and by both, with and without a
          filter that a hundredth passes
  write   a hundredth upserted, a hundredth deleted, and the searches of vectors again
  crash   a process that upserts is killed with SIGKILL; the next one opens, and looks for all that was acknowledged
  shared  a generation that shares the vectors is built, swapped in and rolled back
  mapped  the same with one that has vectors of its own, mapped from those stored (only where --stages names it)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import origin
from steps import resident
from ten_million_data import DIM, Corpus

RESULT = Path(__file__).parent / "results" / "ten_million.json"
STAGES = ("build", "search", "write", "crash", "shared", "mapped")
GIB = 1 << 30


def main() -> None:
    """Run the stages that are asked for and not done yet; write what is known after each."""
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.work:
        work(options)
        return
    if options.folder is None:
        with tempfile.TemporaryDirectory() as place:
            options.folder = Path(place)
            run(options)
    else:
        run(options)


def run(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "stages.json"
    report = json.loads(kept.read_text()) if kept.exists() else {}
    for stage in options.stages:
        if stage in report.get("stages", {}):
            continue
        found = staged(stage, options)
        packages = ("torch", "numpy", "faiss-cpu")
        known = report.get("stages", {})
        report = {**origin(1, packages), "passages": options.passages, "dim": DIM}
        report["stages"] = {**known, stage: found}
        kept.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{stage}: {json.dumps(found)}", file=sys.stderr, flush=True)
    print(render(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=10_000_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES[:-1]), metavar="STAGE")
    parser.add_argument("--folder", type=Path, help="keeps the index and what is done (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def staged(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a stage found, in a process of its own."""
    words = ["--passages", options.passages, "--queries", options.queries, "--folder", options.folder, "--work", stage]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(options: argparse.Namespace) -> None:
    """One stage, in this process; its last line of output is JSON."""
    import ten_million_stages as stages

    with Memory() as memory:
        before, wall = os.times(), time.perf_counter()
        found = getattr(stages, options.work)(stages.Place(options.folder, Corpus(options.passages), options.queries))
        after, seconds = os.times(), time.perf_counter() - wall
    found = {
        **found,
        "wall seconds": round(seconds, 1),
        "processor seconds": round(sum(after[:4]) - sum(before[:4]), 1),
        **memory.peaks(),
        "disk GB": disk(options.folder / "index"),
        "load average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(found))


class Memory:
    """The most that this process held while the block ran, looked at ten times a second."""

    def __init__(self) -> None:
        self._most = {"RssAnon": 0, "RssFile": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def peaks(self) -> dict[str, float]:
        """GiB: of its own, mapped from files, and the two together at one moment."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "memory, GiB": round(self._most["RssAnon"] / GIB, 2),
            "mapped from files, GiB": round(self._most["RssFile"] / GIB, 2),
            "resident at most, GiB": round(peak / GIB, 2),
        }

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for name, held in resident().items():
                self._most[name] = max(self._most[name], held)


def disk(folder: Path) -> dict[str, float]:
    """GB of the index, and of its parts."""
    parts: dict[str, float] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            below = path.relative_to(folder).parts
            name = {"generations": "vectors", "bm25": "words"}.get(below[0], "passages and log")
            parts[name] = parts.get(name, 0.0) + path.stat().st_blocks * 512 / 1e9
    return {name: round(size, 2) for name, size in sorted({**parts, "all": sum(parts.values())}.items())}


#: What the page shows of each stage: (the words, its unit, where it stands).
ROWS: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("build, core minutes", "", lambda s: s["build"]["core minutes"]),
    ("build, microseconds of a processor a passage", "", lambda s: s["build"]["processor microseconds a passage"]),
    ("build, resident at most", "GiB", lambda s: s["build"]["resident at most, GiB"]),
    ("disk", "GB", lambda s: s["build"]["disk GB"]["all"]),
    ("`status` by another process", "ms", lambda s: s["search"]["status ms"]),
    ("open after a close (checksums of all files)", "s", lambda s: s["search"]["open seconds"]),
    ("open after a kill", "s", lambda s: s["crash"]["open seconds"]),
    ("search, resident at most", "GiB", lambda s: s["search"]["resident at most, GiB"]),
]


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    stages = report["stages"]
    lines = [
        f"# {report['passages']:,} passages of {report['dim']} dimensions",
        "",
        f"{report['machine']}, {report['date']}; the processor's time of a search is of all threads.",
        *(["", report["note"]] if "note" in report else []),
        "",
        "| what | found |",
        "|---|---|",
    ]
    for words, unit, find in ROWS:
        try:
            lines.append(f"| {words} | {find(stages)} {unit} |")
        except KeyError:
            continue
    searches = {(stage, kind): row for stage in stages for kind, row in stages[stage].get("searches", {}).items()}
    lines += ["", "| search | after | p50 / p99 ms | processor ms | recall@10 |", "|---|---|---|---|---|"]
    for (stage, kind), row in searches.items():
        lines.append(
            f"| {kind} | {stage} | {row['p50 ms']} / {row['p99 ms']} | {row['processor p50 ms']} "
            f"| {row.get('recall@10', '')} |"
        )
    lines += ["", "| stage | wall s | processor s | memory GiB | mapped GiB | load |", "|---|---|---|---|---|---|"]
    for stage, row in stages.items():
        lines.append(
            f"| {stage} | {row['wall seconds']} | {row['processor seconds']} | {row['memory, GiB']} "
            f"| {row['mapped from files, GiB']} | {row['load average']} |"
        )
    lines += ["", "| stage | step | found |", "|---|---|---|"]
    for stage, row in stages.items():
        lines += [f"| {stage} | {step} | {found} |" for step, found in row.get("steps", {}).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
