"""A user who keeps searching, to see whether anything fails while a model is exchanged."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrarag.retrieve import LiveIndex

#: Seconds between an answer and the next query.
PAUSE = 0.1


class Visitor:
    """Searches in a thread of its own from the beginning of a `with` block to its end."""

    def __init__(self, live: LiveIndex, queries: Sequence[str], options: dict[str, Any]) -> None:
        self._live, self._queries, self._options = live, queries, options
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._search, name="visitor", daemon=True)
        #: seconds of each search that was answered
        self.seconds: list[float] = []
        #: one message for each that failed or found nothing
        self.failures: list[str] = []

    def __enter__(self) -> Visitor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def __str__(self) -> str:
        total = len(self.seconds) + len(self.failures)
        told = f"{total} searches, {len(self.failures)} failed"
        if self.failures:
            return f"{told}; the first: {self.failures[0]}"
        if not self.seconds:
            return told
        middle, slowest = (1000 * sorted(self.seconds)[place] for place in (len(self.seconds) // 2, -1))
        return f"{told}; half were answered within {middle:.0f} ms, the slowest in {slowest:.0f} ms"

    def _search(self) -> None:
        for query in cycle(self._queries):
            if self._stop.is_set():
                return
            started = time.perf_counter()
            try:
                hits = self._live.search(query, k=10, **self._options)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            else:
                if hits:
                    self.seconds.append(time.perf_counter() - started)
                else:
                    self.failures.append(f"no hits for {query!r}")
            self._stop.wait(PAUSE)
