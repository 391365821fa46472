"""Whether the memory of a process that searches from many threads stops growing.

    python benchmarks/memory.py [--threads 32] [--seconds 120] [--passages 1000] [--engine qdrant-edge]

Threads search a small index without a pause, each query another number of words (every shape of a batch is new to
torch once), with dense vectors and BM25. Sampled are the resident set, what the allocator has given out and what it
keeps for itself (mallinfo2 of glibc), and the connections to the passages that wait for the next reader.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import origin

RESULT = Path(__file__).parent / "results" / "memory.json"
MIB = 1 << 20
#: Of its last third: growth below this share of the whole counts as none.
FLAT = 0.02


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    """See mallinfo2(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def allocator() -> dict[str, int]:
    """Bytes that glibc has given out, and that it keeps for the next request; nothing of another C library."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return {}
    ask.restype = _Mallinfo2
    found = ask()
    return {"given_out": found.uordblks + found.hblkhd, "kept": found.fordblks}


def sample(live: Any, started: float, searches: int) -> dict[str, float]:
    """What the process holds now; sizes in MiB."""
    sizes = {"resident": resident(), **allocator()}
    found = {name: round(size / MIB, 1) for name, size in sizes.items()}
    idle = len(live._core.store.database._idle)
    return {"second": round(time.monotonic() - started, 1), "searches": searches, **found, "idle_connections": idle}


def measure(live: Any, words: Sequence[str], options: argparse.Namespace) -> list[dict[str, float]]:
    """Samples from before the first search to the end."""
    over, counts = threading.Event(), [0] * options.threads

    def search(number: int) -> None:
        chance = random.Random(number)
        while not over.is_set():
            query = " ".join(chance.choices(words, k=chance.randint(1, 60)))
            live.search(query, weights={"dense": 1.0, "bm25": 1.0})
            counts[number] += 1

    threads = [threading.Thread(target=search, args=(number,)) for number in range(options.threads)]
    started = time.monotonic()
    samples = [sample(live, started, 0)]
    for thread in threads:
        thread.start()
    while time.monotonic() - started < options.seconds:
        time.sleep(options.every)
        samples.append(sample(live, started, sum(counts)))
    over.set()
    for thread in threads:
        thread.join()
    return samples


def growth(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Growth of the resident set in MiB, by thirds of the time: a curve that flattens grows least in the last."""
    ends = [samples[len(samples) * part // 3 - (part == 3)]["resident"] for part in range(4)]
    return {name: round(b - a, 1) for name, a, b in zip(("first", "second", "last"), ends, ends[1:], strict=False)}


def report(samples: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    """What is written down."""
    third, whole = growth(samples), samples[-1]["resident"]
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    return {
        **origin(packages=("torch", "transformers")),
        "asked": asked,
        "growth_by_thirds": third,
        "flat": third["last"] <= FLAT * whole,
        "samples": samples,
    }


#: With the same words at commit b4022c3, where each thread ran the model itself: MiB after so many seconds.
BEFORE = {0: 672.5, 25: 957.7, 50: 995.5, 75: 1008.9}


def render(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    samples, asked = report["samples"], report["asked"]
    chosen = [*samples[:: max(1, len(samples) // 6)], samples[-1]]
    rows = [f"| {s['second']:.0f} s | {s['searches']} | {s['resident']} | {s.get('given_out', '')} |" for s in chosen]
    growth = ", ".join(f"{name} {size}" for name, size in report["growth_by_thirds"].items())
    before = ", ".join(f"{size} after {second} s" for second, size in BEFORE.items())
    return "\n".join(
        [
            f"{asked['threads']} threads, {asked['passages']} passages, {asked['engine']}; the machine was shared "
            f"(load {report['load_average']}).",
            "",
            "| after | searches | resident, MiB | given out by the allocator, MiB |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Growth by thirds, MiB: {growth}. Before one thread ran the model: {before}, and still growing: each "
            f"thread that ran it kept 5 to 9 MiB of buffers.",
        ]
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the index, search it, and report."""
    from live_index_searching import small_model

    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    chance = random.Random(0)
    words = [f"word{number}" for number in range(2000)]
    encoder = Encoder.load(options.model or small_model(), options.adapter, device="cpu")
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveIndex.create(Path(folder) / "kb", encoder, backend=options.engine) as live,
    ):
        live.add({"id": str(n), "text": " ".join(chance.choices(words, k=20))} for n in range(options.passages))
        return report(measure(live, words, options), options)


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every", type=float, default=5, help="seconds between two samples")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--engine", default="qdrant-edge")
    parser.add_argument("--model", help="default: the small real model")
    parser.add_argument("--adapter", default="bge")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    found = run(options)
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for row in found["samples"]:
        print(row)
    print(found["growth_by_thirds"], "flat" if found["flat"] else "still growing")


if __name__ == "__main__":
    sys.exit(main())
