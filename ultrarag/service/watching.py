"""Watching: how searches and what people do with them have changed since the last swap, for a day after it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from ultrarag.errors import UltraragError
from ultrarag.retrieve import LiveIndex
from ultrarag.service.load import Load

logger = logging.getLogger("ultrarag.service")

#: Seconds after which the feedback is read again: many may ask.
AGAIN = 30.0


class Watching:
    """Joins `LiveIndex.watch` and the load of this process; it only tells, and people roll back."""

    def __init__(self, live: LiveIndex, load: Load) -> None:
        """Look when it is asked."""
        self._live, self._load, self._mutex = live, load, threading.Lock()
        self._of: tuple[Any, ...] | None = None
        self._looked = 0.0
        self._found: dict[str, Any] | None = None

    def look(self, status: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `Watch.to_dict` has, with the load of both generations; None where no swap is watched.

        Args:
            status: of the index, as it is now.
        """
        live, previous = status["live"], status["previous"]
        if live is None or previous is None or status["live_since"] is None:
            return None
        found = self._compared((live["id"], previous["id"], status["live_since"]))
        if found is None:
            return None
        return {**found, "load": {"old": self._load.of(found["previous"]), "new": self._load.of(found["live"])}}

    def _compared(self, of: tuple[Any, ...]) -> dict[str, Any] | None:
        with self._mutex:
            if of == self._of and time.monotonic() - self._looked < AGAIN:
                return self._found
            before = self._found if of == self._of else None
            self._of, self._looked, self._found = of, time.monotonic(), self._compare()
            if self._found and self._found["worse"] and self._found["worse"] != (before or {}).get("worse"):
                logger.warning(
                    "generation %d is worse than generation %d since the swap: %s; POST /v1/rollback brings it back",
                    *of[:2],
                    ", ".join(self._found["worse"]),
                )
            return self._found

    def _compare(self) -> dict[str, Any] | None:
        try:
            found = self._live.watch()
        except UltraragError as error:  # a damaged log keeps nobody from the status
            logger.warning("the swap is not watched: %s", error)
            return None
        return None if found is None else found.to_dict()
