"""UltraRAGRetriever: from the text of a query to documents, by whatever heads the index has."""

from __future__ import annotations

import asyncio
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.document_stores.types import FilterPolicy

from haystack_integrations.components.retrievers.ultrarag.base import Retriever
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from haystack_integrations.document_stores.ultrarag.converters import listed
from ultrarag.doors import default_heads


@component
class UltraRAGRetriever(Retriever):
    """
    Retrieves the documents that a query finds in a live index: by dense vectors, lexical weights, ColBERT, BM25, or
    several of them fused.

    The query is encoded by the live encoder, so a swap or a refresh needs no change here; `meta` says which generation
    answered.

    Usage example:
    ```python
    from haystack_integrations.components.retrievers.ultrarag import UltraRAGRetriever
    from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore

    store = UltraRAGDocumentStore("kb")
    retriever = UltraRAGRetriever(store, weights={"dense": 1, "bm25": 0.5}, top_k=5)
    retriever.run("what is milvus?", filters={"field": "meta.lang", "operator": "==", "value": "en"})
    ```
    """

    def __init__(
        self,
        document_store: UltraRAGDocumentStore,
        *,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        weights: dict[str, float] | None = None,
        heads: list[str] | None = None,
        filter_policy: str | FilterPolicy = FilterPolicy.REPLACE,
        return_embedding: bool = False,
        search_options: dict[str, Any] | None = None,
    ) -> None:
        """
        Creates a retriever.

        :param document_store: The store.
        :param filters: Which documents are searched.
        :param top_k: How many are returned at most.
        :param weights: The weight of each head, such as `{"dense": 1, "bm25": 0.5}`; heads named here are searched.
        :param heads: The heads that are searched, such as `["bm25"]`; default: those with a weight, else the dense one
            where it is stored. Several need weights, or `search_options={"fusion": "rrf"}`.
        :param filter_policy: Whether the filters of a run replace these, or are merged with them.
        :param return_embedding: Whether documents have the vectors that the index stores.
        :param search_options: Others of `LiveIndex.search`: `fusion`, `normalize`, `candidates`, `exact`, `min_scores`
            (such as `{"dense": 0.3}`; a fused score has no absolute meaning), and `log` and `client`, with which the
            search is remembered: `store.live.feedback` takes its `query_id`.
        :raises ValueError: If the store is another one, or `top_k` is not positive.
        """
        # not super(): @component puts another class into the place of this one
        Retriever.__init__(self, document_store, filters, top_k, filter_policy, return_embedding, search_options)
        self.weights, self.heads = weights, None if heads is None else listed("heads", heads)

    def to_dict(self) -> dict[str, Any]:
        """
        Serializes the component to a dictionary.
        """
        return default_to_dict(self, **self.parameters(), weights=self.weights, heads=self.heads)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UltraRAGRetriever:
        """
        Deserializes the component from a dictionary.
        """
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        weights: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """
        Retrieves documents.

        :param query: The text; an empty one finds nothing.
        :param filters: By the filter policy, in place of those of the component or with them.
        :param top_k: In place of that of the component.
        :param weights: In place of those of the component.
        :returns: `documents`, best first, and `meta`: `generation` and `fingerprint` of who answered, `query_id`, and
            in `scores` what each head gave to each document.
        :raises FilterError: If a filter is malformed.
        """
        return self.answer(self.document_store.live.search(query, **self._asked(filters, top_k, weights)))

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        weights: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """
        As `run`; queries that come at the same time are encoded together.
        """
        await self.warm_up_async()
        hits = await self.document_store.live.asearch(query, **self._asked(filters, top_k, weights))
        return await asyncio.to_thread(self.answer, hits)

    def _asked(self, filters: Any, top_k: int | None, weights: dict[str, float] | None) -> dict[str, Any]:
        chosen, heads = self.weights if weights is None else weights, self.heads
        if chosen is None and heads is None:
            heads = default_heads(self.document_store.live)
        return {**self.asked(filters, top_k), "weights": chosen, "heads": heads}
