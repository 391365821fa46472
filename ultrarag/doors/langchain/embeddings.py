"""Embeddings: an encoder, or that of a live index whatever is swapped, as LangChain calls it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.embeddings import Embeddings as LangChainEmbeddings

from ultrarag.doors.langchain.index import DENSE, loaded
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex
from ultrarag.types import Embeddings, Kind

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder, SharedEncoder


class Vector(list[float]):
    """A dense vector that knows which encoder made it, so that a store can refuse one of another model."""

    fingerprint: str

    def __init__(self, values: Sequence[float], fingerprint: str) -> None:
        super().__init__(values)
        self.fingerprint = fingerprint

    def __reduce__(self) -> Any:
        return Vector, (list(self), self.fingerprint)


class UltraRAGEmbeddings(LangChainEmbeddings):
    """The dense vectors of an encoder; texts of many threads and tasks are encoded together.

    Example:
        >>> embeddings = UltraRAGEmbeddings(model_path, adapter="bge")
        >>> len(embeddings.embed_query("what is milvus?"))
        384
    """

    def __init__(self, model: Encoder | LiveIndex | str | os.PathLike[str], **load: Any) -> None:
        """Use an encoder, load one, or ask that of a live index, also after a swap.

        Args:
            model: an Encoder, a checkpoint folder or hub name, or a LiveIndex.
            load: arguments of `Encoder.load`, such as `adapter` and `device`, for a folder or a name.

        Raises:
            UsageError: the model has no dense vectors.
        """
        self.model: Encoder | LiveIndex = loaded(model, **load)
        if DENSE not in self._heads():
            raise UsageError(f"embeddings are dense vectors, and the model has {', '.join(self._heads())}")

    def __repr__(self) -> str:
        shown = self.model if isinstance(self.model, LiveIndex) else f"Encoder {self.fingerprint[:12]}"
        return f"UltraRAGEmbeddings({shown})"

    @property
    def encoder(self) -> Encoder:
        """The encoder: of a live index, that of its searches now."""
        return self.model.encoder if isinstance(self.model, LiveIndex) else self.model

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return self.model.fingerprint

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The texts' vectors as passages, in their order."""
        return list(self._embed(texts, "passage"))

    def embed_query(self, text: str) -> list[float]:
        """A text's vector as a query."""
        return self._embed([text], "query")[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents`, for async programs."""
        if isinstance(self.model, LiveIndex):
            return await self.model.arun(self.embed_documents, texts)
        return await super().aembed_documents(texts)

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query`, for async programs."""
        if isinstance(self.model, LiveIndex):
            return await self.model.arun(self.embed_query, text)
        return await super().aembed_query(text)

    def _heads(self) -> tuple[str, ...]:
        if not isinstance(self.model, LiveIndex):
            return self.model.heads
        with self.model.encoding() as lent:
            return lent.heads

    def _embed(self, texts: Sequence[str], kind: Kind) -> list[Vector]:
        if not texts:
            return []
        if not isinstance(self.model, LiveIndex):
            return _vectors(self._shared.encode(texts, kind, heads=(DENSE,)), self.model, kind)
        with self.model.encoding() as lent:
            return _vectors(lent.encode(texts, kind), lent.encoder, kind)

    @cached_property
    def _shared(self) -> SharedEncoder:
        from ultrarag.encoder import SharedEncoder

        return SharedEncoder(self.encoder)


def _vectors(embeddings: Embeddings, encoder: Encoder, kind: Kind) -> list[Vector]:
    made_by = encoder.fingerprint if kind == "query" else encoder.passage_fingerprint
    return [Vector(row, made_by) for row in np.asarray(embeddings.dense).tolist()]
