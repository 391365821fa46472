"""The encoder of an embedder: one that it loads itself, or the live one of a store."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore, Vector
from haystack_integrations.document_stores.ultrarag.loading import Device, load_encoder

if TYPE_CHECKING:
    from ultrarag.encoder import SharedEncoder
    from ultrarag.types import Embeddings, Kind


class Embedder:
    """Texts become vectors that say whose they are; any thread may ask, and what comes together is encoded together."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None,
        document_store: UltraRAGDocumentStore | None,
        adapter: str | None,
        device: Device,
        trust_remote_code: bool,
        model_kwargs: dict[str, Any] | None,
    ) -> None:
        if (model is None) == (document_store is None):
            raise ValueError(
                f"{type(self).__name__} needs either a model, or the document_store whose live encoder it is to use"
            )
        self.model = None if model is None else str(model)
        self.document_store, self.adapter, self.device = document_store, adapter, device
        self.trust_remote_code, self.model_kwargs = trust_remote_code, model_kwargs or {}
        self._loading = threading.Lock()
        self._loaded: SharedEncoder | None = None

    def parameters(self) -> dict[str, Any]:
        """Those of `__init__`, to be serialized."""
        return {
            "model": self.model,
            "document_store": self.document_store,
            "adapter": self.adapter,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "model_kwargs": self.model_kwargs,
        }

    def warm_up(self) -> None:
        """
        Loads the model, or opens the index.
        """
        if self.document_store is not None:
            _ = self.document_store.live
        else:
            self._encoder()

    async def warm_up_async(self) -> None:
        """
        As `warm_up`, while the loop goes on.
        """
        await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """
        Lets go of the model, or of the store's handle of the index; another run takes it again.
        """
        with self._loading:
            loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()
        if self.document_store is not None:
            self.document_store.close()

    def vectors(self, texts: Sequence[str], kind: Kind) -> list[Vector]:
        """The dense vectors of texts, under the fingerprint by which an index knows whose they are."""
        if not texts:
            return []
        if self.document_store is not None:
            with self.document_store.live.encoding() as lent:
                return _vectors(lent.encode(texts, kind), lent.encoder, kind)
        shared = self._encoder()
        return _vectors(shared.encode(texts, kind, heads=["dense"]), shared.encoder, kind)

    def _encoder(self) -> SharedEncoder:
        from ultrarag.encoder import SharedEncoder  # with torch: only where a model is loaded

        with self._loading:
            if self._loaded is None:
                options = {"trust_remote_code": self.trust_remote_code, **self.model_kwargs}
                self._loaded = SharedEncoder(load_encoder(self.model or "", self.adapter, self.device, **options))
            return self._loaded


def _vectors(embeddings: Embeddings, encoder: Any, kind: Kind) -> list[Vector]:
    if embeddings.dense is None:
        raise ValueError("the encoder makes no dense vectors, and an embedding is one: search by the text instead")
    made_by = encoder.fingerprint if kind == "query" else encoder.passage_fingerprint
    return [Vector.of(row, made_by) for row in embeddings.dense.tolist()]
