"""Passages that a generation's encoder cannot encode: kept and found by their words, without vectors, and listed.

One such passage must not stop the others: whatever follows the log leaves it out, says so, and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from ultrarag.retrieve.passages import Store

logger = logging.getLogger("ultrarag")


class Notes(Protocol):
    """Where it is written down which passages have no vectors."""

    def all(self) -> Mapping[str, str]:
        """Id -> reason."""
        ...

    def note(self, failed: Mapping[str, str], settled: Sequence[str]) -> None:
        """Enter passages that failed, and strike out those that were encoded or deleted."""
        ...


class Unencoded:
    """Such passages of one generation, as the index's database lists them."""

    def __init__(self, store: Store, generation: int) -> None:
        self._store, self._generation = store, generation
        self._held = store.unencoded(generation)

    def all(self) -> Mapping[str, str]:
        """See `Notes.all`."""
        return self._held

    def note(self, failed: Mapping[str, str], settled: Sequence[str]) -> None:
        """See `Notes.note`; what is new is also logged as a warning."""
        gone = [id for id in settled if id in self._held]
        if not failed and not gone:
            return
        self._store.note_unencoded(self._generation, failed, gone)
        for id in sorted(failed.keys() - self._held.keys()):
            logger.warning(
                "passage %r has no vectors in generation %d: %s; only its words can be searched; `ultrarag index "
                "retry` encodes it again, delete removes it",
                id,
                self._generation,
                failed[id],
            )
        self._held = {id: reason for id, reason in self._held.items() if id not in gone} | dict(failed)


class Noted:
    """Such passages of a build, for its parent to enter in the database."""

    def __init__(self, held: dict[str, str]) -> None:
        """`held` is kept up to date."""
        self._held = held

    def all(self) -> Mapping[str, str]:
        """See `Notes.all`."""
        return self._held

    def note(self, failed: Mapping[str, str], settled: Sequence[str]) -> None:
        """See `Notes.note`."""
        for id in settled:
            self._held.pop(id, None)
        self._held.update(failed)
