"""What the retrievers have in common: a store, which of its documents, how many, and the form of an answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from haystack.document_stores.types import FilterPolicy, apply_filter_policy

from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore
from haystack_integrations.document_stores.ultrarag.filters import translate

if TYPE_CHECKING:
    from ultrarag.retrieve import Hits

#: Arguments of a search that a retriever has itself, by their names there: an option would not count.
OWN = {"k": "top_k", "filter": "filters", "ids": "filters (of the field 'id')", "weights": "weights", "heads": "heads"}


class Retriever:
    """A retriever over the live index of a store."""

    def __init__(
        self,
        document_store: UltraRAGDocumentStore,
        filters: dict[str, Any] | None,
        top_k: int,
        filter_policy: str | FilterPolicy,
        return_embedding: bool,
        search_options: dict[str, Any] | None,
    ) -> None:
        if not isinstance(document_store, UltraRAGDocumentStore):
            raise ValueError(f"document_store must be an UltraRAGDocumentStore, not {type(document_store).__name__}")
        self.document_store = document_store
        self.filters, self.top_k = filters, _positive(top_k)
        named = filter_policy if isinstance(filter_policy, FilterPolicy) else FilterPolicy.from_str(filter_policy)
        self.filter_policy = named
        self.return_embedding, self.search_options = return_embedding, search_options or {}
        for name in self.search_options:
            if name in OWN:
                raise ValueError(f"search_options has {name!r}: give the retriever itself {OWN[name]}")

    def parameters(self) -> dict[str, Any]:
        """Those of `__init__`, to be serialized."""
        return {
            "document_store": self.document_store,
            "filters": self.filters,
            "top_k": self.top_k,
            "filter_policy": self.filter_policy.value,
            "return_embedding": self.return_embedding,
            "search_options": self.search_options,
        }

    def warm_up(self) -> None:
        """
        Opens the index, and loads its encoder.
        """
        _ = self.document_store.live

    async def warm_up_async(self) -> None:
        """
        As `warm_up`, while the loop goes on.
        """
        await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """
        Closes the store's handle of the index; another run opens it again.
        """
        self.document_store.close()

    async def close_async(self) -> None:
        """
        As `close`.
        """
        await self.document_store.close_async()

    def asked(self, filters: dict[str, Any] | None, top_k: int | None) -> dict[str, Any]:
        """What a run asks of the index."""
        chosen = apply_filter_policy(self.filter_policy, self.filters, filters)
        k = self.top_k if top_k is None else _positive(top_k)
        return {**self.search_options, **translate(chosen).options(), "k": k}

    def answer(self, hits: Hits) -> dict[str, Any]:
        """The outputs of a run."""
        meta = {"generation": hits.generation, "fingerprint": hits.fingerprint, "query_id": hits.query_id}
        scores = [dict(hit.scores) for hit in hits]
        documents = self.document_store.documents_of(hits, self.return_embedding)
        return {"documents": documents, "meta": {**meta, "scores": scores}}


def _positive(top_k: int) -> int:
    if not isinstance(top_k, int) or top_k <= 0:
        raise ValueError(f"top_k must be greater than 0, and is {top_k!r}")
    return top_k
