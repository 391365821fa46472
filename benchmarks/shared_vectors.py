"""Building, swapping and rolling back a generation that shares vectors, over a million passages that are searched.

    python benchmarks/shared_vectors.py [--passages 1000000] [--rounds 5]

A real encoder (all-MiniLM-L6-v2, 384 dimensions) and one with another query side; synthetic vectors, but for the
passages that a swap looks at, which have the encoder's own. The engine is the embedded one without its graph, which
would take an hour to build and plays no part: every search compares with all vectors. Two threads search throughout; in
each round a passage is written between the swap and the rollback.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from live_index_contenders import texts, vectors
from live_index_searching import Searching, small_model
from machine import origin

RESULT = Path(__file__).parent / "results" / "shared_vectors.json"
#: Passages stored at a time.
BLOCK = 10_000
#: Words of a passage: enough to tell them apart.
LENGTH = 8


def main(arguments: list[str] | None = None) -> int:
    """Fill the index, run the rounds, write the result; fails where a search failed."""
    asked = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as place:
        folder = asked.folder or Path(place)
        found = measure(folder, asked) if asked.rounds else prepare(folder, asked).close()
    if not asked.rounds:
        return 0
    report = {**origin(), "passages": asked.passages, "engine": asked.engine, **found}
    report["load_average_after"] = round(os.getloadavg()[0], 1)
    asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return int(bool(report["searches failed"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="qdrant-edge")
    parser.add_argument("--folder", type=Path, help="keep the index here (3 GB a million), and use what is there")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Rounds of build, swap, write and rollback, with searches running."""
    child = folder / "child"
    with prepare(folder, asked) as live:
        queries = texts(50, LENGTH, 9)
        threads = [Searching(live, queries[start::2], heads=["dense"]) for start in range(2)]
        for thread in threads:
            thread.start()
        began = time.perf_counter()
        try:
            rounds = [one_round(live, child, number) for number in range(asked.rounds)]
        finally:
            for thread in threads:
                thread.stop()
        took = [1000 * seconds for thread in threads for _, seconds, _ in thread.seen]
        used = {fingerprint for thread in threads for _, _, fingerprint in thread.seen}
        return {
            **{name: _spread([found[name] for found in rounds]) for name in rounds[0]},
            "passages encoded by builds": 0,
            "searches": len(took),
            "searches failed": [what for thread in threads for what in thread.failed],
            "live encoders that searches saw": len(used),
            "search ms": {"p50": round(float(np.median(took)), 1), "max": round(max(took), 1)},
            "seconds of all rounds": round(time.perf_counter() - began, 1),
        }


def prepare(folder: Path, asked: argparse.Namespace) -> Any:
    """The index, filled, and the other encoder beside it; as an earlier run left them."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    if (folder / "filled").exists():
        return LiveIndex.open(folder / "kb", device="cpu")
    encoder = Encoder.load(small_model(), "bge", device="cpu")
    with_another_query_side(encoder).save(folder / "child")
    live = LiveIndex.create(folder / "kb", encoder, backend=asked.engine, bm25=False)
    fill(live, asked.passages)
    (folder / "filled").touch()
    return live


def with_another_query_side(encoder: Any) -> Any:
    """An encoder of the same passage side, whose query side has one weight changed."""
    import torch

    from ultrarag import Encoder

    query = encoder.around(copy.deepcopy(encoder.model))
    with torch.no_grad():
        next(iter(query.model.parameters()))[0].add_(0.01)
    return Encoder.of_sides(encoder, query)


def fill(live: Any, count: int) -> None:
    """Passages and vectors straight into store and engine, as a finished build would have left them."""
    from ultrarag.retrieve.passages import records
    from ultrarag.retrieve.swap import SAMPLE
    from ultrarag.types import Embeddings, Passage

    core, step = live._core, min(BLOCK, count)
    words = texts(step, LENGTH, 0)
    for start in range(0, count, step):
        rows = range(start, min(count, start + step))
        passages = [Passage(f"p{row}", f"{row} {words[row - start]}") for row in rows]
        core.store.write(records(passages))
        dense = vectors(len(passages), live.encoder.dim, start)
        core.live.backend.upsert([p.id for p in passages], Embeddings(dense=dense), [{} for _ in passages])
        print(f"{rows.stop} of {count} passages", file=sys.stderr, flush=True)
    last = core.store.last_seq()
    seen = {p.id: p for size in (8, SAMPLE) for p in core.store.sample(size, last)}.values()
    own = live.encoder.encode([p.content for p in seen], heads=core.live.heads, progress=False)
    core.live.backend.upsert([p.id for p in seen], own, [{} for _ in seen])
    core.vectors.applied = last
    core.flush()


def one_round(live: Any, child: Path, number: int) -> dict[str, float]:
    """Seconds of each step; what writers waited at the flip; what of it was processor time of this thread."""
    found: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        started, spent = time.perf_counter(), time.thread_time()
        result = act()
        found[f"{name} seconds"] = time.perf_counter() - started
        found[f"{name} processor seconds"] = time.thread_time() - spent
        return result

    generation = timed("build", lambda: live.build(child))
    if generation.encodes:
        raise SystemExit(f"generation {generation.id} shares no vectors")
    time.sleep(1)
    flip = timed("swap", lambda: live.swap(generation))
    found["writers waited ms at the swap"] = 1000 * flip.seconds
    timed("add of one passage", lambda: live.add([{"id": f"new{number}", "text": f"written in round {number}"}]))
    flip = timed("rollback", live.rollback)
    found["writers waited ms at the rollback"] = 1000 * flip.seconds
    if live.vectors([f"new{number}"]).dense.shape[0] != 1 or threading.active_count() < 3:
        raise SystemExit("the written passage has no vector, or the searches have ended")
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(float(np.median(values)), 3), "longest": round(max(values), 3)}


if __name__ == "__main__":
    sys.exit(main())
