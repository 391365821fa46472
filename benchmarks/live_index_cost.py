"""What building a generation costs beyond encoding its passages; for `live_index.py`, or alone:

    python benchmarks/live_index_cost.py --passages 1000 --rounds 3

Each round runs both, one after the other, each in a process of its own with one thread and low priority: the index's
own build, and a program that only loads the checkpoint and encodes the same passages. Start and loading are in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from live_index_contenders import LENGTH, texts
from live_index_searching import changed_copy, small_model

ENCODE = """
import json, os, sys
os.nice(10)
import torch
torch.set_num_threads(1)
from ultrarag import Encoder
encoder = Encoder.load(sys.argv[1], device="cpu")
texts = json.load(open(sys.argv[2], encoding="utf-8"))
assert len(encoder.encode(texts, "passage", progress=False)) == len(texts)
"""


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    options = parser.parse_args()
    print(json.dumps(build_cost(options.passages, options.rounds, options.model or small_model()), indent=2))


def build_cost(passages: int, rounds: int, model: str) -> dict[str, Any]:
    """Wall and processor seconds of both in every round, and the median of their ratios."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex
    from ultrarag.testing.tiny import tiny_bert

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = changed_copy(model, folder / "checkpoint")
        words = texts(passages, LENGTH, 0)
        (folder / "texts.json").write_text(json.dumps(words), encoding="utf-8")
        tiny_bert(folder / "tiny")  # what the live generation is does not matter here: make it cheap
        with LiveIndex.create(folder / "index", Encoder.load(folder / "tiny", "bge", device="cpu")) as live:
            live.add({"id": f"p{row}", "text": text} for row, text in enumerate(words))
            words_ = [sys.executable, "-c", ENCODE, str(checkpoint), str(folder / "texts.json")]
            both: dict[str, Callable[[], Any]] = {
                "build": lambda: live.discard(live.build(checkpoint, threads=1)),
                "encode": lambda: subprocess.run(words_, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}),
            }
            found = [{name: timed(run) for name, run in both.items()} for _ in range(rounds)]
    ratio = {
        key: statistics.median(one["build"][key] / one["encode"][key] for one in found) for key in ("wall", "processor")
    }
    return {"passages": passages, "rounds": found, "build_to_encode": ratio}


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Wall seconds, and the processor seconds of the child processes."""
    before, started = os.times(), time.perf_counter()
    run()
    after, wall = os.times(), time.perf_counter() - started
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "processor": spent}


if __name__ == "__main__":
    main()
