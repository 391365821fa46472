"""When segments are merged: many of about one size become one, beside searches and writes."""

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


class Stopped(Exception):
    """A merge was given up; nothing has changed."""


class Merger:
    """Merges what is due: at once while it is small, else in a thread of its own."""

    def __init__(self, store: Bm25File) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._not_before = 0.0

    def tend(self) -> None:
        """Look whether a merge is due; called by whoever writes."""
        while parts := due(self._store.parts):
            if sum(part.segment.rows for part in parts) > 2 * BATCH_ROWS:
                return self._start()
            if self._busy():  # it may be at the same ones
                return None
            self._store.merge(parts)
        return None

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
            while parts := due(self._store.parts):
                self._store.merge(parts, self._check)
        except Stopped:
            pass
        except Exception as error:  # the index is whole without it
            self._not_before = time.monotonic() + PAUSE
            logger.warning("BM25: segments were not merged, searches become slower until they are: %s", error)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped
