"""Cuts: how many texts were longer than a model takes."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("ultrarag")


class Cuts:
    """Adds up how many texts were longer than a model takes; any thread may add."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        #: (texts or pairs, limit in tokens) -> (cut, all)
        self._found: dict[tuple[str, int | None], tuple[int, int]] = {}

    def add(self, cut: int, total: int, what: str, limit: int | None) -> None:
        """Count `total` texts or pairs, of which `cut` were cut."""
        with self._mutex:
            before = self._found.get((what, limit), (0, 0))
            self._found[what, limit] = (before[0] + cut, before[1] + total)

    def take(self) -> dict[tuple[str, int | None], tuple[int, int]]:
        """Return what was counted since the last time: (what, limit in tokens) -> (cut, all)."""
        with self._mutex:
            found, self._found = self._found, {}
        return found

    def tell(self) -> None:
        """Log what was cut since the last time, if anything was."""
        for (what, limit), (cut, total) in self.take().items():
            if cut:
                logger.warning("%d of %d %s were longer than %s tokens and were cut", cut, total, what, limit)
