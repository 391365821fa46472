"""The thread that keeps a process in step with a shared index: its mirror, its words, and its live pair."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager
from typing import Protocol

from ultrarag.errors import UltraragError
from ultrarag.retrieve.shared.link import Link

#: Seconds between two looks at the shared state. A flip is followed after this, and the loading of the encoder.
POLL = 1.0

logger = logging.getLogger("ultrarag")


class Followed(Protocol):
    """The index of this process: `ultrarag.retrieve.core.Core`, which imports this file."""

    def leading(self) -> AbstractContextManager[None]:
        """Be the one process that writes, for a block."""
        ...

    def keep_up(self) -> None:
        """Apply what the mirror learned."""
        ...


class Watcher:
    """Looks at the shared state again and again, until it is stopped."""

    def __init__(self, core: Followed, link: Link) -> None:
        self._core, self._link = core, link
        #: what went wrong at the last look; "" if nothing
        self.error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ultrarag-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the look that it is at."""
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Follow what other processes wrote and swapped; while this one writes, show that it is alive."""
        if self._link.unsure and not self._link.users:
            with self._core.leading():
                pass
        if self._link.lease.held:
            self._link.rest()
        elif self._link.follow():
            self._core.keep_up()

    def _run(self) -> None:
        while not self._stop.wait(min(POLL, self._link.lease.seconds / 9)):
            try:
                self.look()
            except (UltraragError, OSError, RuntimeError) as error:
                if str(error) != self.error:
                    logger.warning("the shared index cannot be followed, searches answer from what is known: %s", error)
                self.error = str(error)
            else:
                self.error = ""
