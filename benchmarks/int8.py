"""int8 beside float32 and sentence-transformers: a batch, one query and memory, and what was measured of the ranking.

    ultrarag checkpoint quantise MODEL --adapter bge --eval_data path/to/scifact --output scifact
    python benchmarks/int8.py --checkpoint scifact --data path/to/scifact --quality scifact medquad

All contenders run in one process, in an order that rotates. Reported are seconds of the processor, with one thread: the
best of the rounds for a batch, the median of a query. They are the steadier number where others use the machine too.
`--memory` has each contender run the batch once more in a process of its own, and reports the most that each held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from encode import mixed_lengths, read_corpus
from machine import in_turn, origin
from steps import peak

from ultrarag.io.durable import write_json

PAGE = Path(__file__).parent / "results" / "int8.md"
QUERY = "what is the effect of vitamin d on bone loss"
PEER, FLOAT, INT8 = "sentence-transformers", "ultrarag, torch, float32", "ultrarag, int8"
PACKAGES = ("torch", "transformers", "sentence-transformers", "openvino", "nncf")
#: what ours is called, and how it is loaded
OURS: dict[str, dict[str, str]] = {
    FLOAT: {"engine": "torch"},
    "ultrarag, openvino, float32": {"engine": "openvino"},
    "ultrarag, torch, bf16": {"engine": "torch", "precision": "bf16"},
    INT8: {"precision": "int8"},
}
#: texts, kind -> unit vectors
Contender = Callable[[list[str], str], np.ndarray]


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    texts = mixed_lengths(read_corpus(options.data), options.texts)
    if options.worker:
        contender(options.worker, options.checkpoint)(texts, "passage")
        print(peak())
        return
    contenders = {name: contender(name, options.checkpoint) for name in (PEER, *OURS)}
    report = {
        **origin(1, PACKAGES),
        "texts": len(texts),
        "batch": batches(contenders, texts, options.rounds),
        "query": queries(contenders, options.queries),
        "memory": {name: memory(name, options) for name in contenders} if options.memory else {},
        "quality": [pair for folder in options.quality for pair in measured(folder)],
    }
    page = render(report)
    print(page)
    options.output.write_text(page, encoding="utf-8")
    write_json(options.output.with_suffix(".json"), report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a quantised checkpoint")
    parser.add_argument("--data", type=Path, help="BEIR folder, or its corpus.jsonl (default: made-up texts)")
    parser.add_argument("--quality", nargs="*", default=[], metavar="CHECKPOINT", help="whose records are shown")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory", action="store_true", help="also measure memory, each in a process of its own")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args()


def contender(name: str, checkpoint: str) -> Contender:
    """What encodes as passages or queries."""
    if name != PEER:
        from ultrarag import Encoder

        encoder = Encoder.load(checkpoint, device="cpu", **OURS[name])
        return lambda texts, kind: encoder.encode(texts, kind, progress=False).dense  # type: ignore[arg-type]
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(checkpoint, device="cpu")
    return lambda texts, kind: np.asarray(peer.encode(texts, normalize_embeddings=True, show_progress_bar=False))


def batches(contenders: dict[str, Contender], texts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """The best seconds of the processor of each, and how near its vectors are to the peer's."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, np.ndarray] = {}
    for number in range(rounds):
        for name in in_turn(list(contenders), number):
            began = time.process_time()
            found[name] = contenders[name](texts, "passage")
            spent[name].append(time.process_time() - began)
    return compared({name: min(seconds) for name, seconds in spent.items()}, found)


def queries(contenders: dict[str, Contender], count: int) -> dict[str, dict[str, float]]:
    """The median seconds of the processor of one query each, called in turn."""
    found = {name: run([QUERY], "query") for name, run in contenders.items()}
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, run in contenders.items():
            began = time.process_time()
            run([QUERY], "query")
            spent[name].append(time.process_time() - began)
    return compared({name: statistics.median(seconds) for name, seconds in spent.items()}, found)


def compared(seconds: dict[str, float], found: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    cosines = {name: (vectors * found[PEER]).sum(-1) for name, vectors in found.items()}
    return {
        name: {
            "seconds": value,
            "to sentence-transformers": seconds[PEER] / value,
            "to torch, float32": seconds[FLOAT] / value,
            "mean cosine": float(cosines[name].mean()),
            "least cosine": float(cosines[name].min()),
        }
        for name, value in seconds.items()
    }


def memory(name: str, options: argparse.Namespace) -> float:
    """The most MiB that a process held which loads one contender and runs the batch."""
    words = ["--checkpoint", options.checkpoint, "--texts", str(options.texts), "--worker", name]
    words += ["--data", str(options.data)] if options.data else []
    found = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1])


def measured(checkpoint: str) -> list[dict[str, Any]]:
    """What was recorded when a checkpoint was quantised."""
    record = json.loads((Path(checkpoint) / "int8" / "quantised.json").read_text(encoding="utf-8"))
    return [{"set": Path(checkpoint).name, **pair} for pair in record["measured"]]


def render(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["# int8", "", f"{report['machine']}, {report['date']}, {versions}; load {report['load_average']}."]
    lines += ["", report["note"]] if report.get("note") else []
    for what, label in (("batch", f"{report['texts']} texts of mixed length"), ("query", "one query of 12 tokens")):
        lines += ["", f"## {label}, seconds of the processor", ""]
        lines += ["| | seconds | to sentence-transformers | to torch, float32 | mean cosine | least |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, row in report[what].items():
            ratios = f"{row['to sentence-transformers']:.2f}x | {row['to torch, float32']:.2f}x"
            cosines = f"{row['mean cosine']:.5f} | {row['least cosine']:.5f}"
            lines.append(f"| {name} | {row['seconds']:.4f} | {ratios} | {cosines} |")
    if report["memory"]:
        lines += ["", "## Peak memory of a process, MiB", "", "| | MiB |", "|---|---|"]
        lines += [f"| {name} | {held:.0f} |" for name, held in report["memory"].items()]
    if report["quality"]:
        lines += ["", "## Ranking", "", "| set | passages | queries | float32 | found | 95 % interval | p | judged |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for pair in report["quality"]:
            values = f"{pair['float32']:.4f} | {pair['found']:.4f} | {pair['low']:+.4f} to {pair['high']:+.4f}"
            sides = f"{pair['set']} | {pair['passages']} | {pair['queries']}"
            lines.append(f"| {sides} | {values} | {pair['p_value']:.3f} | {pair['judged']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
