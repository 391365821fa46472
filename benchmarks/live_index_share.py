"""A build, and `add`, beside searches that never pause: how much longer each takes than alone.

    python benchmarks/live_index_share.py [--rounds 3] [--searchers 2 8] [--passages 600] [--adds 60]

The index holds made-up texts under the small real model; each searcher is a thread that asks one query after the other
(dense and BM25). Each round measures, in turn: the searches alone, a build alone, the build beside the searchers,
`add` alone, and `add` beside them. A ratio is the median of the rounds'. What runs beside it on the machine slows all
of them: see the load average. Results: results/live_index_share.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from live_index_contenders import LENGTH, texts
from live_index_searching import changed_copy, small_model
from machine import origin

RESULT = Path(__file__).parent / "results" / "live_index_share.json"


class Searcher(threading.Thread):
    """Asks one query after the other without a pause, until it is stopped."""

    def __init__(self, live: Any, queries: list[str]) -> None:
        super().__init__(daemon=True)
        self.live, self.queries = live, queries
        #: when each search began, and how long it took
        self.seen: list[tuple[float, float]] = []
        self.failed: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            started = time.perf_counter()
            try:
                query = self.queries[len(self.seen) % len(self.queries)]
                self.live.search(query, k=10, weights={"dense": 1.0, "bm25": 1.0})
            except Exception as error:
                self.failed.append(repr(error))
            self.seen.append((started, time.perf_counter() - started))

    def stop(self) -> None:
        """End the thread after the search that it is at."""
        self._over.set()
        self.join()


@contextmanager
def searching(live: Any, number: int) -> Iterator[list[Searcher]]:
    """Search from so many threads; they have warmed up when the block begins."""
    threads = [Searcher(live, texts(100, 8, seed)) for seed in range(number)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        yield threads
    finally:
        for thread in threads:
            thread.stop()


def beside(live: Any, number: int, act: Callable[[], Any]) -> dict[str, float]:
    """Do something beside so many searchers; the seconds that it took, and how the searches fared meanwhile."""
    with searching(live, number) as threads:
        started = time.perf_counter()
        act()
        ended = time.perf_counter()
    found = {"seconds": ended - started}
    if number:
        if failed := [error for thread in threads for error in thread.failed]:
            raise SystemExit(f"{len(failed)} searches failed: {failed[0]}")
        times = [1000 * took for one in threads for at, took in one.seen if at < ended and at + took > started]
        found |= {"searches_per_second": len(times) / found["seconds"], "longest_ms": max(times)}
        found |= {f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 99)}
    return found


def one_round(live: Any, checkpoint: Path, searchers: list[int], adds: list[str]) -> dict[str, dict[str, float]]:
    """Everything once; what was added is deleted, and what was built discarded."""
    rows = [{"id": f"new{number}", "text": text} for number, text in enumerate(adds)]

    def build() -> None:
        live.discard(live.build(checkpoint, threads=1, progress=False))

    found = {}
    for number in [0, *searchers]:
        name = f"beside {number} searchers" if number else "alone"
        if number:
            found[f"searches, {number} threads"] = beside(live, number, lambda: time.sleep(4))
        found[f"build {name}"] = beside(live, number, build)
        found[f"add {name}"] = beside(live, number, lambda: live.add(rows))
        live.delete([row["id"] for row in rows])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one index."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    model = options.model or small_model()
    words = texts(options.passages + options.rounds * options.adds, LENGTH, 0)
    with tempfile.TemporaryDirectory() as place:
        checkpoint = changed_copy(model, Path(place) / "checkpoint")
        encoder = Encoder.load(model, "bge", device="cpu", passage_max_length=128)
        with LiveIndex.create(Path(place) / "index", encoder) as live:
            live.add({"id": f"p{row}", "text": text} for row, text in enumerate(words[: options.passages]))
            new = [words[options.passages + n * options.adds :][: options.adds] for n in range(options.rounds)]
            rounds = [one_round(live, checkpoint, options.searchers, adds) for adds in new]
    return {"rounds": rounds, **{f"{n} searchers": ratios(rounds, n) for n in options.searchers}}


def ratios(rounds: list[dict[str, dict[str, float]]], number: int) -> dict[str, float]:
    """What the searchers cost a build and `add`, and what these cost the searches: medians of the rounds' ratios."""

    def of(name: str, key: str, other: str) -> float:
        return statistics.median(one[name][key] / one[other][key] for one in rounds)

    alone = f"searches, {number} threads"
    found = {}
    for act in ("build", "add"):
        name = f"{act} beside {number} searchers"
        found[f"{act}: time to alone"] = of(name, "seconds", f"{act} alone")
        found[f"{act}: searches per second to without"] = of(name, "searches_per_second", alone)
        found[f"{act}: p99 of a search to without"] = of(name, "p99_ms", alone)
    return found


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--searchers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--passages", type=int, default=600, help="that a build encodes")
    parser.add_argument("--adds", type=int, default=60, help="passages of one `add`")
    parser.add_argument("--model", help="folder or hub name (default: the small model of the tests)")
    parser.add_argument("--note", help="what a reader of the result should know, such as what else ran")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    noted = {"note": options.note} if options.note else {}
    report = {**origin(), **noted, "passages": options.passages, "adds": options.adds, **measure(options)}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
