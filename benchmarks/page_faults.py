"""Encoding with and without the memory of freed layers kept: processor seconds, page faults, peak memory.

    python benchmarks/page_faults.py --data path/to/scifact [--texts 200] [--rounds 3] [--output FILE]

Each run is a process of its own, with one thread, in turn; in the runs "as the C library does" the encoder is loaded
without `keep_freed_memory`. Of each run the best of three encodings counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from encode import mixed_lengths, read_corpus, small_model
from machine import in_turn, origin

RESULTS = Path(__file__).parent / "results" / "page_faults.json"
KEPT, PLAIN = "kept", "as the C library does"


def main() -> None:
    options = parse()
    if options.run:
        print(json.dumps(encoded(options)))
        return
    work = {precision: in_rounds(precision, options) for precision in ("fp32", "bf16")}
    report = {**origin(1), "texts": options.texts, "median of the rounds": work}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder in BEIR's layout, whose passages are encoded")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_rounds(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """The medians of what the rounds measure, and of the ratios of their seconds."""
    found: dict[str, list[dict[str, float]]] = {KEPT: [], PLAIN: []}
    for number in range(options.rounds):
        for name in in_turn((KEPT, PLAIN), number):
            found[name].append(in_process(precision, name, options))
    ratios = [kept["seconds"] / plain["seconds"] for kept, plain in zip(found[KEPT], found[PLAIN], strict=True)]
    return {
        **{name: {key: round(median(one[key] for one in runs), 3) for key in runs[0]} for name, runs in found.items()},
        "seconds, kept to not": round(median(ratios), 3),
    }


def in_process(precision: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    """What one process measures."""
    command = [sys.executable, __file__, "--run", precision, name, "--texts", str(options.texts)]
    command += ["--data", str(options.data)] if options.data else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout)
    print(precision, name, found, file=sys.stderr)
    return found


def encoded(options: argparse.Namespace) -> dict[str, float]:
    """Encode some texts three times."""
    from ultrarag import Encoder
    from ultrarag.encoder import forward

    precision, name = options.run
    if name == PLAIN:
        forward.keep_freed_memory = lambda: None  # type: ignore[assignment]
    encoder = Encoder.load(small_model(), "bge", device="cpu", engine="torch", precision=precision)
    texts = mixed_lengths(read_corpus(options.data), options.texts)
    encoder.encode(texts, "passage")
    runs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF)
        encoder.encode(texts, "passage")
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        runs.append({"seconds": seconds, "page faults": after.ru_minflt - before.ru_minflt})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {**min(runs, key=lambda run: run["seconds"]), "peak MiB": peak}


if __name__ == "__main__":
    main()
