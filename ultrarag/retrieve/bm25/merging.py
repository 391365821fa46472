"""When segments are merged: many of about one size become one, beside searches and writes; when it is quiet, more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from ultrarag.retrieve.bm25.part import Part
from ultrarag.retrieve.bm25.store import BATCH_ROWS, Bm25File

logger = logging.getLogger(__name__)
#: Segments of about one size that become one: an entry is written again for each such factor of the index's size.
FAN = 8
#: A segment with more dead rows than this share is written anew without them.
MOST_DEAD = 0.25
#: Seconds without a write after which more is merged than is due, for the sake of searches.
IDLE = 2.0
#: Then each segment is at least so many times as large as all smaller ones together.
RATIO = 4
#: Seconds until a merge that failed, of a full disk perhaps, is tried again.
PAUSE = 60.0


def due(parts: Sequence[Part]) -> list[Part]:
    """Parts that should become one; none when all is well."""
    levels: dict[int, list[Part]] = {}
    for part in parts:
        if part.segment.rows - part.count > MOST_DEAD * part.segment.rows:
            return [part]
        levels.setdefault((part.count.bit_length() - 1) // 3, []).append(part)
    return next((level for _, level in sorted(levels.items()) if len(level) >= FAN), [])


def loose(parts: Sequence[Part]) -> list[Part]:
    """Parts that are worth merging while nothing else is to be done; none when the rest is large beside them."""
    ordered = sorted(parts, key=lambda part: part.count)
    smaller, most = 0, 0
    for place, part in enumerate(ordered):
        if place and part.count < RATIO * smaller:
            most = place + 1
        smaller += part.count
    return ordered[:most]


class Stopped(Exception):
    """A merge was given up; nothing has changed."""


class Merger:
    """Merges what is due: at once while it is small, else in a thread of its own."""

    def __init__(self, store: Bm25File) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._not_before = self._written = 0.0

    def tend(self) -> None:
        """Look whether a merge is due; called by whoever writes."""
        self._written = time.monotonic()
        while parts := due(self._store.parts):
            if self._busy() or sum(part.segment.rows for part in parts) > BATCH_ROWS:
                break
            self._store.merge(parts)
        if parts or loose(self._store.parts):
            self._start()

    def stop(self) -> None:
        """Give up the merge that is under way; `tend` begins it again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._stop.clear()

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start(self) -> None:
        if not self._busy() and time.monotonic() >= self._not_before:
            self._thread = threading.Thread(target=self._run, name="ultrarag-bm25-merge", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                parts = due(self._store.parts)
                if not parts:
                    left = self._written + IDLE - time.monotonic()
                    if left > 0:
                        self._stop.wait(min(left, 0.5))
                        continue
                    parts = loose(self._store.parts)
                if not parts:
                    return
                self._store.merge(parts, self._check)
        except Stopped:
            pass
        except Exception as error:  # the index is whole without it
            self._not_before = time.monotonic() + PAUSE
            logger.warning("BM25: segments were not merged, searches become slower until they are: %s", error)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped
