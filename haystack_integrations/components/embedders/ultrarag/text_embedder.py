"""UltraRAGTextEmbedder: the embedding of a query."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from haystack import component, default_from_dict, default_to_dict

from haystack_integrations.components.embedders.ultrarag.base import Embedder
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from haystack_integrations.document_stores.ultrarag.loading import Device


@component
class UltraRAGTextEmbedder(Embedder):
    """
    Embeds a text as a query, for an `UltraRAGEmbeddingRetriever` or the retriever of any other store.

    Usage example:
    ```python
    from haystack_integrations.components.embedders.ultrarag import UltraRAGTextEmbedder

    embedder = UltraRAGTextEmbedder("checkpoints/finetuned")
    embedder.run("what is milvus?")["embedding"]
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        document_store: UltraRAGDocumentStore | None = None,
        adapter: str | None = None,
        device: Device = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """
        Creates an embedder; the model is loaded when it is first used, or warmed up.

        :param model: A checkpoint of UltraRAG's, or any folder or name on the hub that an adapter reads.
        :param document_store: In place of a model: the store whose live encoder is used, also after a swap.
        :param adapter: The adapter that reads the model; default: the one that claims it.
        :param device: Where it runs.
        :param trust_remote_code: Run Python code that comes with the model.
        :param model_kwargs: Others of `Encoder.load`, such as `precision` and `query_instruction`.
        :raises ValueError: If there is neither a model nor a store, or both.
        """
        # not super(): @component puts another class into the place of this one
        Embedder.__init__(self, model, document_store, adapter, device, trust_remote_code, model_kwargs)

    def to_dict(self) -> dict[str, Any]:
        """
        Serializes the component to a dictionary.
        """
        return default_to_dict(self, **self.parameters())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UltraRAGTextEmbedder:
        """
        Deserializes the component from a dictionary.
        """
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """
        Embeds a text.

        :param text: The query; the model's instruction for queries is put before it.
        :returns: `embedding`, and `meta` with the `fingerprint` of its encoder.
        :raises TypeError: If it is no string.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"UltraRAGTextEmbedder expects a string, not {type(text).__name__}: Documents are for an "
                f"UltraRAGDocumentEmbedder"
            )
        (embedding,) = self.vectors([text], "query")
        return {"embedding": embedding, "meta": {"fingerprint": embedding.fingerprint}}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """
        As `run`, in a thread; texts that come at the same time are embedded together.
        """
        return await asyncio.to_thread(self.run, text)
