"""Load: how many searches a process answers and how long they wait, in the last minute and by generation; no texts."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Seconds that `last_minute` looks back.
MINUTE = 60.0
#: Requests of a minute that are remembered at most.
MOST = 100_000
#: Each bucket of a generation's waits is so much wider than the one before it: a percentile is within 5 % of it.
STEP = 1.1
#: Generations that are remembered.
GENERATIONS = 8


@dataclass
class _Answers:
    """What one generation answered."""

    #: number of the bucket -> requests
    waits: Counter[int] = field(default_factory=Counter)
    errors: int = 0


class Load:
    """Requests to search, of one process since it started; any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none."""
        self._clock, self._mutex = clock, threading.Lock()
        #: (when it was answered, seconds that it took, queries; 0: it failed)
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=MOST)
        self._generations: dict[int, _Answers] = {}
        self._latest: int | None = None

    def answered(self, generation: int, queries: int, seconds: float) -> None:
        """Count a request that a generation answered."""
        with self._mutex:
            self._add((self._clock(), seconds, queries))
            self._latest = generation
            self._of(generation).waits[math.ceil(math.log(max(seconds, 1e-6), STEP))] += 1

    def failed(self, seconds: float) -> None:
        """Count a request that failed by no fault of its own; it is counted with the generation that answered last."""
        with self._mutex:
            self._add((self._clock(), seconds, 0))
            if self._latest is not None:
                self._of(self._latest).errors += 1

    def last_minute(self) -> dict[str, Any]:
        """Searches a second, the median and 99th percentile of their wait in seconds (None: there were none), errors.

        A search is one query; those of one request wait together.
        """
        with self._mutex:
            self._forget()
            recent = list(self._recent)
        waits = sorted(seconds for _, seconds, queries in recent if queries)
        return {
            "searches_per_second": round(sum(queries for _, _, queries in recent) / MINUTE, 3),
            "p50_seconds": _percentile(waits, 0.5),
            "p99_seconds": _percentile(waits, 0.99),
            "errors": len(recent) - len(waits),
        }

    def of(self, generation: int) -> dict[str, Any]:
        """The same of a generation, for as long as this process has answered by it: requests in place of a rate."""
        with self._mutex:
            found = self._generations.get(generation, _Answers())
            waits, errors = sorted(found.waits.items()), found.errors
        return {
            "requests": sum(count for _, count in waits),
            "p50_seconds": _bucket(waits, 0.5),
            "p99_seconds": _bucket(waits, 0.99),
            "errors": errors,
        }

    def _add(self, entry: tuple[float, float, int]) -> None:
        self._forget()
        self._recent.append(entry)

    def _forget(self) -> None:
        oldest = self._clock() - MINUTE
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()

    def _of(self, generation: int) -> _Answers:
        if generation not in self._generations and len(self._generations) >= GENERATIONS:
            del self._generations[min(self._generations)]
        return self._generations.setdefault(generation, _Answers())


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6) if ordered else None


def _bucket(waits: Sequence[tuple[int, int]], share: float) -> float | None:
    """The middle of the bucket that a percentile is in."""
    total, seen = sum(count for _, count in waits), 0
    for number, count in waits:
        seen += count
        if seen > share * total or seen == total:
            return round(float(STEP ** (number - 0.5)), 6)
    return None
