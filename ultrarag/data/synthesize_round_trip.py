"""RoundTrip: whether a query finds the passage that it was written for, among all passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.data.output import identity
from ultrarag.retrieve.mining.miner import checked_weights
from ultrarag.retrieve.mining.pool import MiningSources, read_pool
from ultrarag.retrieve.mining.prepare import prepare
from ultrarag.retrieve.mining.search import BM25_HEAD, Asked, MiningSearch, candidate_heads

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


class RoundTrip:
    """Searches all passages of a file; use it as a context."""

    def __init__(
        self, folder: Path, source: Path, encoder: Encoder | None, weights: Mapping[str, float] | None, k: int
    ) -> None:
        """Encode the passages into `folder`, or take up what is there."""
        self.k = k
        chosen = checked_weights(weights, encoder)
        heads = (*chosen, *candidate_heads(tuple(chosen), encoder))
        vectors = tuple(head for head in heads if head != BM25_HEAD)
        sources = MiningSources(lambda: (), lambda: (passage.content for passage in read_pool(source)))
        known = {"input": identity(source), "model": encoder.fingerprint if encoder else None, "heads": heads}
        self.prepared = prepare(folder, sources, encoder, vectors, BM25_HEAD in heads, known)
        parts = self.prepared.vectors, self.prepared.words
        self.search = MiningSearch(chosen, self.prepared.texts.pool, encoder, *parts)

    def __enter__(self) -> RoundTrip:
        return self

    def __exit__(self, *exception: object) -> None:
        self.search.cuts.tell()
        self.prepared.close()

    def keeps(self, asked: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each (query, passage) whether the passage is among the first k hits."""
        if not asked:
            return []
        nothing = np.zeros(0, np.int64)
        found = self.search.find([Asked(query, None, nothing) for query, _ in asked], self.k)
        wanted = self.prepared.texts.find([passage for _, passage in asked])
        return [bool((one.numbers == number).any()) for one, number in zip(found, wanted, strict=True)]
