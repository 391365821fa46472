"""Embedding: LlamaIndex's embedding model over the encoder of a live index, or over one alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding, mean_agg
from llama_index.core.bridge.pydantic import ConfigDict, PrivateAttr, SerializationInfo, model_serializer

from ultrarag.doors import Source, opened
from ultrarag.doors.llamaindex.made import made
from ultrarag.encoder import Encoder
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve import LiveIndex
from ultrarag.types import Embeddings, Kind


class UltraRAGEmbedding(BaseEmbedding):
    """The dense vectors of a live index's encoder, which follow its swaps; or those of an encoder alone.

    Args:
        source: a `LiveIndex`, or the folder of one.
        encoder: instead: an `Encoder`, or a checkpoint, such as what a fine-tune wrote.

    Example:
        >>> embed_model = UltraRAGEmbedding(live)
        >>> len(embed_model.get_query_embedding("what is milvus?"))
        384
    """

    model_config = ConfigDict(extra="forbid")
    #: of the index, or of the checkpoint; it makes this again from `to_dict`
    path: str | None = None
    checkpoint: str | None = None
    _live: LiveIndex | None = PrivateAttr(default=None)
    _encoder: Encoder | None = PrivateAttr(default=None)

    def __init__(
        self,
        source: Source | None = None,
        *,
        encoder: Encoder | str | os.PathLike[str] | None = None,
        embed_batch_size: int = 64,
        **options: Any,
    ) -> None:
        source = options.pop("path", None) if source is None else source
        encoder = options.pop("checkpoint", None) if encoder is None else encoder
        options.pop("checkpoint", None)
        if (source is None) == (encoder is None):
            raise UsageError("UltraRAGEmbedding is made over a live index, or over an encoder (encoder=...): name one")
        if options.get("embeddings_cache") is not None:
            raise UsageError(
                "embeddings_cache finds vectors by their text alone: it would go on giving the former model's after a "
                "swap, and a passage's vector for a query of the same words; leave it out"
            )
        name = str(source.path if isinstance(source, LiveIndex) else source or encoder)
        options.setdefault("model_name", "encoder" if isinstance(encoder, Encoder) else name)
        super().__init__(embed_batch_size=embed_batch_size, **options)
        if source is not None:
            self._live = _index(source)
            self.path = str(self._live.path)
        else:
            self._encoder = encoder if isinstance(encoder, Encoder) else Encoder.load(encoder)
            self.checkpoint = None if isinstance(encoder, Encoder) else str(encoder)

    @classmethod
    def class_name(cls) -> str:
        return "UltraRAGEmbedding"

    @property
    def fingerprint(self) -> str:
        """Of the encoder that encodes now."""
        return self._live.fingerprint if self._live is not None else self._one.fingerprint

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: Any, info: SerializationInfo) -> dict[str, Any]:
        """With the fingerprint: the key of an ingestion cache is made of it, whose vectors are then never stale."""
        return {**handler(self), "class_name": self.class_name(), "fingerprint": self.fingerprint}

    def to_payload(self) -> dict[str, Any]:
        return {**super().to_payload(), "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> UltraRAGEmbedding:
        """What `to_dict` gave, with the index that lies there now, or the checkpoint."""
        return super().from_dict({name: value for name, value in data.items() if name != "fingerprint"}, **kwargs)

    def __reduce__(self) -> Any:
        if self.checkpoint is None:
            raise UsageError(
                "an embedding over an open index, or over an encoder in memory, stays in its process: run the pipeline "
                "without num_workers, or give it UltraRAGEmbedding(encoder=FOLDER)"
            )
        return type(self).from_dict, (self.to_dict(),)

    def close(self) -> None:
        """Close the index, or this handle of it."""
        if self._live is not None:
            self._live.close()

    @property
    def _one(self) -> Encoder:
        assert self._encoder is not None
        return self._encoder

    def _encode(self, texts: list[str], kind: Kind) -> tuple[list[Embedding], str]:
        """The vectors, and the fingerprint of the encoder that made all of them."""
        if self._live is None:
            vectors, fingerprint = _dense(self._one.encode(texts, kind, progress=False)), self._one.fingerprint
        else:
            with self._live.encoding() as lent:
                vectors, fingerprint = _dense(lent.encode(texts, kind)), lent.fingerprint
        for text, vector in zip(texts, vectors, strict=True):
            made.remember(vector, fingerprint, kind, (text,))
        return vectors, fingerprint

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encode([query], "query")[0][0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encode(texts, "passage")[0] if texts else []

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await self._away(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await self._away(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._away(self._get_text_embeddings, texts)

    def get_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """One vector of several texts (HyDE's made-up answers), all encoded by one encoder: by default their mean."""
        if len(queries) == 1 and agg_fn is None:
            return self.get_query_embedding(queries[0])
        vectors, fingerprint = self._encode(queries, "query")
        if agg_fn is not None:
            return agg_fn(vectors)
        mean = mean_agg(vectors)
        made.remember(mean, fingerprint, "query", tuple(queries))
        return mean

    async def aget_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        return await self._away(self.get_agg_embedding_from_queries, queries, agg_fn)

    async def _away(self, function: Callable[..., Any], *args: Any) -> Any:
        """In a thread: the index's own where there is one."""
        if self._live is None:
            return await asyncio.to_thread(function, *args)
        return await self._live.arun(function, *args)


def _index(source: Source) -> LiveIndex:
    try:
        return opened(source)
    except IndexStateError as error:
        if isinstance(source, LiveIndex) or (Path(source) / "passages.sqlite").exists():
            raise
        raise IndexStateError(f"{error}; for a model alone: UltraRAGEmbedding(encoder={str(source)!r})") from error


def _dense(embeddings: Embeddings) -> list[Embedding]:
    if embeddings.dense is None:
        raise UsageError("this model has no dense vectors, which LlamaIndex's embeddings are: use UltraRAGRetriever")
    return np.asarray(embeddings.dense, dtype=np.float64).tolist()
