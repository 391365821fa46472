"""UltraRAGEmbeddingRetriever: from the embedding of a query to documents, where one encoder made both."""

from __future__ import annotations

import asyncio
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.document_stores.types import FilterPolicy

from haystack_integrations.components.retrievers.ultrarag.base import Retriever
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from haystack_integrations.document_stores.ultrarag.converters import fingerprint_of
from haystack_integrations.document_stores.ultrarag.vectors import dense
from ultrarag.errors import FingerprintError


@component
class UltraRAGEmbeddingRetriever(Retriever):
    """
    Retrieves the documents whose dense vectors are nearest to the embedding of a query.

    The embedding must be the live encoder's: that of an `UltraRAGTextEmbedder` says so itself, for a plain list
    `fingerprint` does. One that was made before a swap is refused after it. `UltraRAGRetriever` encodes the text
    itself, and has no such moment.

    Usage example:
    ```python
    from haystack import Pipeline
    from haystack_integrations.components.embedders.ultrarag import UltraRAGTextEmbedder
    from haystack_integrations.components.retrievers.ultrarag import UltraRAGEmbeddingRetriever
    from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore

    store = UltraRAGDocumentStore("kb")
    pipeline = Pipeline()
    pipeline.add_component("embedder", UltraRAGTextEmbedder(document_store=store))
    pipeline.add_component("retriever", UltraRAGEmbeddingRetriever(store))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.run({"embedder": {"text": "what is milvus?"}})
    ```
    """

    def __init__(
        self,
        document_store: UltraRAGDocumentStore,
        *,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        filter_policy: str | FilterPolicy = FilterPolicy.REPLACE,
        return_embedding: bool = False,
        search_options: dict[str, Any] | None = None,
    ) -> None:
        """
        Creates a retriever.

        :param document_store: The store.
        :param filters: Which documents are searched.
        :param top_k: How many are returned at most.
        :param filter_policy: Whether the filters of a run replace these, or are merged with them.
        :param return_embedding: Whether documents have the vectors that the index stores.
        :param search_options: Of `LiveIndex.search_embeddings`, such as `exact` and `min_scores`.
        :raises ValueError: If the store is another one, or `top_k` is not positive.
        """
        # not super(): @component puts another class into the place of this one
        Retriever.__init__(self, document_store, filters, top_k, filter_policy, return_embedding, search_options)

    def to_dict(self) -> dict[str, Any]:
        """
        Serializes the component to a dictionary.
        """
        return default_to_dict(self, **self.parameters())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UltraRAGEmbeddingRetriever:
        """
        Deserializes the component from a dictionary.
        """
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        fingerprint: str | None = None,
    ) -> dict[str, Any]:
        """
        Retrieves documents.

        :param query_embedding: Of the query.
        :param filters: By the filter policy, in place of those of the component or with them.
        :param top_k: In place of that of the component.
        :param fingerprint: Of the encoder that made it, where the embedding does not say so.
        :returns: `documents`, best first, and `meta`, as of `UltraRAGRetriever`.
        :raises FingerprintError: If the embedding is another encoder's, or says not whose it is.
        """
        made_by = fingerprint or fingerprint_of(query_embedding)
        if made_by is None:
            raise FingerprintError(
                "the query embedding is a plain list, which says not what encoder made it: connect an "
                "UltraRAGTextEmbedder, or give the encoder's fingerprint as the input 'fingerprint'"
            )
        asked = self.asked(filters, top_k)
        return self.answer(self.document_store.live.search_embeddings(dense([query_embedding]), made_by, **asked)[0])

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(
        self,
        query_embedding: list[float],
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        fingerprint: str | None = None,
    ) -> dict[str, Any]:
        """
        As `run`, in a thread.
        """
        return await asyncio.to_thread(self.run, query_embedding, filters, top_k, fingerprint)
