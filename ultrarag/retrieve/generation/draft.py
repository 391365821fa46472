"""Draft: a generation that is being built, with the passages before it, its vectors so far, and its progress."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ultrarag.encode import Encode
from ultrarag.encoder import Cuts
from ultrarag.io import sync_tree
from ultrarag.retrieve.engines import SCHEMA_FILE, Backend, Schema, create, open_backend, remove
from ultrarag.retrieve.generation.catalog import Generation, IndexLayout, Progress
from ultrarag.retrieve.generation.replay import GenerationVectors
from ultrarag.retrieve.generation.unencoded import Noted
from ultrarag.retrieve.passages import Store

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


class Draft:
    """What a build works on; only its process writes to it, and the store is only read."""

    def __init__(self, root: Path, generation: Generation, encoder: Encoder) -> None:
        """Open what an earlier start left, or begin anew where it had not committed anything."""
        self.layout, self.generation = IndexLayout(root), generation
        self.directory = self.layout.building(generation.id)
        self.store = Store.open(root, read_only=True)
        found = Progress.read(self.directory)
        #: whether an earlier start committed something
        self.begun = found is not None
        self.progress = found or Progress(applied=generation.base_seq)
        self.backend = self._vectors(encoder)
        #: texts that were longer than the encoder takes
        self.cuts = Cuts()

    def vectors(self, encode: Encode) -> GenerationVectors:
        """The vectors so far as what passages are put into; the progress notes those that cannot be encoded."""
        return GenerationVectors(self.backend, encode, Noted(self.progress.unencoded))

    def total(self) -> int:
        """The number of passages to encode, as far as it is known."""
        return max(self.store.count(), self.progress.held)

    def note(self) -> None:
        """Write down how far the build has come."""
        self.progress.total = self.total()
        self.progress.write(self.directory)

    def commit(self, finished: bool = False) -> None:
        """Make the vectors durable, then the note of how far they go."""
        self.backend.flush()
        self.progress.finished = finished
        self.note()

    def publish(self) -> None:
        """Close everything, and give the directory its final name."""
        self.backend.close()
        self.store.close()
        sync_tree(self.directory)
        os.rename(self.directory, self.layout.final(self.generation.id))

    def _vectors(self, encoder: Encoder) -> Backend:
        directory = self.layout.vectors(self.directory)
        if not self.begun:
            remove(directory)
        if not (directory / SCHEMA_FILE).exists():
            return create_vectors(encoder, self.generation, directory)
        return open_backend(directory, self.generation.fingerprint)


def create_vectors(encoder: Encoder, generation: Generation, directory: Path) -> Backend:
    """Create the empty vector engine of a generation."""
    probe = encoder.encode(["dimension"], "passage", heads=generation.heads, progress=False)
    return create(directory, Schema.of(probe, generation.fingerprint), generation.backend)
