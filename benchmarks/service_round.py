"""A round of benchmarks/service.py: clients that search a service while others add, delete and refresh."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

#: Seconds between two writes.
EVERY = 2.0
#: Seconds around a swap that are told apart, at most.
WINDOW = 60.0


@dataclass
class Seen:
    """What the clients of a round met."""

    #: (when it was asked, seconds until it was answered)
    waits: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    #: generation -> fingerprints that came with it
    generations: dict[int, set[str]] = field(default_factory=dict)
    #: when a generation first answered
    first: dict[int, float] = field(default_factory=dict)
    #: when the round began and ended (time.monotonic)
    span: tuple[float, float] = (0.0, 0.0)
    #: the live generation at the end
    live: int = 0
    #: passages that were acknowledged and are not there, and those that were deleted and are
    wrong: int = 0
    added: int = 0
    deleted: int = 0
    #: (when it began, when it ended) of each refresh
    refreshes: list[tuple[float, float]] = field(default_factory=list)
    #: processor seconds of the clients (this process), of the service, and of its children that have ended
    processor: dict[str, float] = field(default_factory=dict)
    #: (when, bytes)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def refreshing(self, when: float) -> bool:
        """Whether a refresh was under way."""
        return any(begin <= when <= end for begin, end in self.refreshes)


def processor_seconds(pid: int) -> dict[str, float]:
    """Of the clients, which are this process, of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = (sum(map(int, fields[at : at + 2])) / os.sysconf("SC_CLK_TCK") for at in (11, 13))
    return {"clients": time.process_time(), "service": own, "its refresh": children}


class Round:
    """Clients that search at once, while others add, delete and refresh."""

    def __init__(
        self,
        url: str,
        pid: int,
        clients: int,
        asked: argparse.Namespace,
        queries: list[str],
        more: list[dict[str, Any]],
        place: int,
    ) -> None:
        self.url, self.pid, self.clients, self.asked, self.place = url, pid, clients, asked, place
        self.queries, self.more = queries, more
        self.seen, self.stop = Seen(), asyncio.Event()

    async def run(self) -> Seen:
        """All of it."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(base_url=self.url, timeout=120, limits=limits) as self.client:
            began, used = time.monotonic(), processor_seconds(self.pid)
            work = [asyncio.create_task(self.search(number)) for number in range(self.clients)]
            work += [asyncio.create_task(self.write()), asyncio.create_task(self.watch())]
            half = min(WINDOW, self.asked.seconds) / 2
            end = began + self.asked.seconds
            await asyncio.sleep(half / 2)  # for what it is without a refresh
            await self.refresh()
            while self.asked.pause is not None and time.monotonic() + self.asked.pause + half < end:
                await asyncio.sleep(self.asked.pause)
                await self.refresh()
            await asyncio.sleep(max(half, end - time.monotonic()))
            ended = time.monotonic()
            self.stop.set()
            await asyncio.gather(*work)
            self.seen.processor = {who: now - used[who] for who, now in processor_seconds(self.pid).items()}
            status = (await self.client.get("/v1/status")).json()
            self.seen.live = status["index"]["live"]["id"]
            self.seen.wrong = await self.missing()
        self.seen.span = began, ended
        return self.seen

    async def search(self, first: int) -> None:
        """One client: the next query when the last is answered."""
        number, seen = first, self.seen
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                body = {"query": self.queries[number % len(self.queries)], "k": 10}
                answer = await self.client.post("/v1/search", json=body)
                ended = time.monotonic()
                if answer.status_code == 200:
                    found = answer.json()
                    seen.generations.setdefault(found["generation"], set()).add(found["fingerprint"])
                    seen.first.setdefault(found["generation"], ended)
                    seen.waits.append((began, ended - began))
                else:
                    seen.errors.append(f"{answer.status_code} {answer.text[:200]}")
            except httpx2.HTTPError as error:
                seen.errors.append(repr(error))
            number += 1

    def named(self, number: int) -> dict[str, Any]:
        """The passage that is added as the n-th of a round: texts come again under other ids."""
        return {**self.more[number % len(self.more)], "id": f"added-{self.place}-{number}"}

    async def write(self) -> None:
        """Add some passages every two seconds, and delete the oldest of them beyond those that are kept."""
        seen, batch = self.seen, self.asked.batch
        while not self.stop.is_set():
            passages = [self.named(seen.added + n) for n in range(batch)]
            if await self.done("POST", "/v1/passages", {"passages": passages}):
                seen.added += batch
            if seen.added - seen.deleted > self.asked.kept:
                ids = [self.named(seen.deleted + n)["id"] for n in range(batch)]
                if await self.done("DELETE", "/v1/passages", {"ids": ids}):
                    seen.deleted += batch
            await asyncio.sleep(EVERY)

    async def done(self, method: str, path: str, body: dict[str, Any]) -> bool:
        """Whether a request was answered with 200; what else came of it is among the errors."""
        try:
            answer = await self.client.request(method, path, json=body)
        except httpx2.HTTPError as error:
            self.seen.errors.append(f"{method} {path}: {error!r}")
            return False
        if answer.status_code != 200:
            self.seen.errors.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return bool(answer.status_code == 200)

    async def missing(self) -> int:
        """Passages that were acknowledged and are not there, and those that were deleted and are."""
        count, batch = 0, self.asked.batch
        for start in range(0, self.seen.added, batch):
            ids = [self.named(number)["id"] for number in range(start, start + batch)]
            answer = await self.client.get("/v1/passages", params={"ids": ids, "limit": batch})
            found = len(answer.json()["passages"])
            count += found if start < self.seen.deleted else batch - found
        return count

    async def refresh(self) -> None:
        """Refresh and wait until it is live; its checkpoint is deleted then."""
        arguments: dict[str, Any] = {"max_steps": self.asked.steps, "per_device_train_batch_size": 8}
        arguments |= {"seed": self.place + len(self.seen.refreshes), "allow_seen_data": True}
        body = {"train_data": ["train.jsonl"], "gate": False, "effort": self.asked.effort, "arguments": arguments}
        began, answer = time.monotonic(), await self.client.post("/v1/refresh", json=body)
        if answer.status_code != 202:
            raise SystemExit(f"refresh: {answer.status_code} {answer.text[:300]}")
        path = f"/v1/jobs/{answer.json()['id']}"
        while (job := (await self.client.get(path)).json())["state"] == "running":
            await asyncio.sleep(0.5)
        self.seen.refreshes.append((began, time.monotonic()))
        if job["state"] != "done":
            self.seen.errors.append(f"refresh: {job['state']}: {job['error']}")
        await self.done("DELETE", path, {})

    async def watch(self) -> None:
        """The memory of the service, every second; its builder and its fine-tune are processes of their own."""
        while not self.stop.is_set():
            fields = Path(f"/proc/{self.pid}/statm").read_text().split()
            self.seen.memory.append((time.monotonic(), int(fields[1]) * os.sysconf("SC_PAGE_SIZE")))
            await asyncio.sleep(1.0)
