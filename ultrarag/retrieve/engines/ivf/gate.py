"""Many searches at a time, or one writer: a writer waits for the searches inside, and lets no new one in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """What readers share and a writer has for itself; a thread goes through once at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers, self._writer = 0, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Be inside with other readers."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writer)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be inside alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writer)
            self._writer = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._readers == 0)
            yield
        finally:
            with self._changed:
                self._writer = False
                self._changed.notify_all()
