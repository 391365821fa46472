"""A retriever over a live index: hybrid, and its documents say which generation found them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ultrarag.doors import opened
from ultrarag.doors.langchain.documents import document
from ultrarag.doors.langchain.index import search_options
from ultrarag.errors import UsageError
from ultrarag.retrieve import Hits, LiveIndex

#: The key of a document's metadata under which it says how it was found.
FOUND = "ultrarag"


class UltraRAGRetriever(BaseRetriever):
    """Documents of a live index, best first; after a swap, those that its new generation finds.

    A document's `metadata["ultrarag"]` says how it was found: `score`, `scores` of each head, the `generation` that
    answered with its `fingerprint`, and the `query_id` that feedback refers to. What `invoke` is given beside the query
    counts for that call: `retriever.invoke("what is milvus?", k=2, filter={"lang": "en"})`.

    Example:
        >>> retriever = UltraRAGRetriever(index="kb", weights={"dense": 1, "bm25": 0.5})
        >>> retriever.invoke("what is milvus?")[0].metadata["ultrarag"]["generation"]
        1
    """

    #: a LiveIndex, or the path of one, which is opened to be shared; `retriever.index.close()` closes it
    index: Annotated[LiveIndex, BeforeValidator(opened)]
    k: int = Field(4, ge=1)
    #: of each head ("dense", "sparse", "colbert", "bm25"); default: the dense head alone
    weights: dict[str, float] | None = None
    #: a condition on the metadata, such as {"lang": "en"}
    filter: dict[str, Any] | None = None
    #: other options of `LiveIndex.search`, such as `fusion`, `min_scores`, `mmr` and `log`
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is: by the path of its index, which must be there where it is loaded."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What stands for the index."""
        return {"index": str(self.index.path.resolve())}

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if twice := {"k", "weights", "filter"} & set(self.search_kwargs):
            name = min(twice)
            raise UsageError(f"search_kwargs has {name!r}, which is a field: UltraRAGRetriever(..., {name}=...)")
        return self

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        return {**super()._get_ls_params(**kwargs), "ls_vector_store_provider": "ultrarag"}

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return _found(self.index.search(query, **self._options(kwargs)))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return _found(await self.index.asearch(query, **self._options(kwargs)))

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        own = {"k": self.k, "weights": self.weights, "filter": self.filter}
        return search_options(self.index, self.search_kwargs, own, asked)


def _found(hits: Hits) -> list[Document]:
    answered = {"generation": hits.generation, "fingerprint": hits.fingerprint, "query_id": hits.query_id}
    documents = [document(hit.passage) for hit in hits]
    for made, hit in zip(documents, hits, strict=True):
        made.metadata[FOUND] = {"score": hit.score, "scores": dict(hit.scores), **answered}
    return documents
