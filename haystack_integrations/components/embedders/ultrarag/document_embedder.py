"""UltraRAGDocumentEmbedder: the embeddings of documents."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from haystack_integrations.components.embedders.ultrarag.base import Embedder
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from haystack_integrations.document_stores.ultrarag.converters import listed, meta_values
from haystack_integrations.document_stores.ultrarag.loading import Device


@component
class UltraRAGDocumentEmbedder(Embedder):
    """
    Embeds documents as passages, for stores that do not embed themselves.

    An `UltraRAGDocumentStore` does, and needs none before its writer; what the encoder of its index has embedded here
    it does not encode again.

    Usage example:
    ```python
    from haystack import Document
    from haystack_integrations.components.embedders.ultrarag import UltraRAGDocumentEmbedder

    embedder = UltraRAGDocumentEmbedder("checkpoints/finetuned")
    embedder.run([Document(content="Milvus is a vector database.")])["documents"][0].embedding
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        document_store: UltraRAGDocumentStore | None = None,
        adapter: str | None = None,
        device: Device = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """
        Creates an embedder; the model is loaded when it is first used, or warmed up.

        :param model: A checkpoint of UltraRAG's, or any folder or name on the hub that an adapter reads.
        :param document_store: In place of a model: the store whose live encoder is used, also after a swap.
        :param adapter: The adapter that reads the model; default: the one that claims it.
        :param device: Where it runs.
        :param meta_fields_to_embed: Fields of `meta` whose values are embedded before the content.
        :param embedding_separator: What stands between them.
        :param trust_remote_code: Run Python code that comes with the model.
        :param model_kwargs: Others of `Encoder.load`, such as `precision` and `passage_max_length`.
        :raises ValueError: If there is neither a model nor a store, or both.
        """
        # not super(): @component puts another class into the place of this one
        Embedder.__init__(self, model, document_store, adapter, device, trust_remote_code, model_kwargs)
        self.meta_fields_to_embed = listed("meta_fields_to_embed", meta_fields_to_embed)
        self.embedding_separator = embedding_separator

    def to_dict(self) -> dict[str, Any]:
        """
        Serializes the component to a dictionary.
        """
        fields = {"meta_fields_to_embed": self.meta_fields_to_embed, "embedding_separator": self.embedding_separator}
        return default_to_dict(self, **self.parameters(), **fields)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UltraRAGDocumentEmbedder:
        """
        Deserializes the component from a dictionary.
        """
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """
        Embeds documents.

        :param documents: The documents; one without content is embedded as an empty text.
        :returns: `documents`, which are others than those given, each with its `embedding`; and `meta` with the
            `fingerprint` of the encoder (none where there were no documents).
        :raises TypeError: If they are no documents.
        """
        if not isinstance(documents, list) or not all(isinstance(document, Document) for document in documents):
            raise TypeError(
                "UltraRAGDocumentEmbedder expects a list of Documents: UltraRAGTextEmbedder is for a string"
            )
        vectors = self.vectors([self._text(document) for document in documents], "passage")
        embedded = [replace(document, embedding=vector) for document, vector in zip(documents, vectors, strict=True)]
        return {"documents": embedded, "meta": {"fingerprint": vectors[0].fingerprint if vectors else None}}

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """
        As `run`, in a thread.
        """
        return await asyncio.to_thread(self.run, documents)

    def _text(self, document: Document) -> str:
        before = meta_values(document.meta, self.meta_fields_to_embed)
        return self.embedding_separator.join([*before, document.content or ""])
