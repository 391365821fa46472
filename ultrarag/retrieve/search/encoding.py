"""Encoding: the encoder that searches use, lent to encode texts between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.errors import UsageError
from ultrarag.types import KINDS, Embeddings, Kind, Tokens

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.retrieve.generation import Serving


class Encoding:
    """The encoder of one generation; it stays the same, and takes turns with searches and writes."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        #: number of the generation
        self.generation = serving.generation.id
        #: of its encoder: what is made here can be searched with `LiveIndex.search_embeddings` under it
        self.fingerprint = serving.fingerprint

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that are stored, which are those that are encoded."""
        return self._serving.heads

    @property
    def encoder(self) -> Encoder:
        """What it is: to ask for its settings, not to encode with, which would pass over the searches."""
        return self._serving.encoder

    def encode(self, texts: Sequence[str], kind: Kind = "passage") -> Embeddings:
        """Return the texts' embeddings as numpy arrays, a row each, with the heads that are stored.

        Args:
            kind: "query" or "passage"; a "text" of a symmetric task is read as a passage is.

        Raises:
            UsageError: there is no text, or the kind is unknown.
        """
        if kind not in KINDS:
            raise UsageError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        if not texts:
            raise UsageError("there is no text to encode")
        if kind == "query":
            return self._serving.encode_queries(texts, self.heads)
        return self._serving.encode_passages(texts)

    def tokenize(self, texts: Sequence[str], kind: Kind = "passage") -> Tokens:
        """The token ids that the encoder would see; `truncated` counts the texts that are longer than it takes."""
        return self.encoder.tokenize(texts, "query" if kind == "query" else "passage")

    def similarity(
        self, query: Embeddings, passage: Embeddings, weights: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """The weighted sum of the heads' scores, (queries, passages) float32.

        Args:
            weights: default: the dense head alone where it is stored, else the first one that is.
        """
        chosen = {"dense" if "dense" in self.heads else self.heads[0]: 1.0} if weights is None else dict(weights)
        return self.encoder.similarity(query, passage, chosen)
