"""A document compressor: documents in the order of a cross-encoder, or of the heads of a live index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Any

import numpy as np
from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr

from ultrarag.doors.langchain.index import loaded
from ultrarag.doors.langchain.retriever import FOUND
from ultrarag.errors import UsageError
from ultrarag.retrieve import Encoding, LiveIndex, rerank
from ultrarag.types import Hit, Passage


class UltraRAGReranker(BaseDocumentCompressor):
    """The best of some documents by a reranker, whose score each then has as `metadata["relevance_score"]`.

    A cross-encoder's scores go through the logistic function: from 0 to 1. Of a live index, its encoder compares
    the texts, whatever was swapped in.

    Example:
        >>> reranker = UltraRAGReranker(model=Encoder.load(reranker_path), top_n=3)
        >>> reranker.compress_documents(documents, "what is milvus?")
    """

    #: an Encoder, such as a cross-encoder; a checkpoint folder or hub name; or a LiveIndex
    model: Annotated[Any, BeforeValidator(loaded)]
    #: documents to keep; None for all
    top_n: int | None = Field(3, ge=1)
    #: of each head, for a model that has several, or for some of them
    weights: dict[str, float] | None = None
    #: of the reranker beside the scores of an UltraRAGRetriever, as in `ultrarag.retrieve.rerank`; None: it alone
    weight: float | None = Field(None, ge=0)

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    #: held by the one call that scores: several would share the same cores
    _turn: Any = PrivateAttr(default_factory=Lock)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best documents, best first; those given stay as they are."""
        hits = [
            Hit(str(place), self._own_score(place, one), Passage(str(place), one.page_content))
            for place, one in enumerate(documents)
        ]
        with self._scorer() as (scorer, options):
            ranked = rerank(scorer, query, hits, weight=self.weight, **options)
        return [_scored(documents[int(hit.id)], hit.score) for hit in ranked[: self.top_n]]

    def _own_score(self, place: int, document: Document) -> float:
        """What its retriever gave to a document, where that counts."""
        if self.weight is None:
            return 0.0
        if FOUND not in document.metadata:
            raise UsageError(
                f"weight: document {place} has no score of an UltraRAGRetriever beside which the reranker's could "
                f"count; leave weight out"
            )
        return float(document.metadata[FOUND]["score"])

    @contextmanager
    def _scorer(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """What scores pairs, and with which options."""
        if isinstance(self.model, LiveIndex):
            with self.model.encoding() as lent:
                yield _Lent(lent), {"weights": self.weights}
        else:
            squeezed = self.model.adapter.declared.pair_input and self.weight is None
            with self._turn:
                yield self.model, {"weights": self.weights, "normalize": squeezed, "progress": False}


@dataclass
class _Lent:
    """The encoder of a live index, as a reranker."""

    lent: Encoding

    def score(self, pairs: Sequence[tuple[str, str]], weights: dict[str, float] | None) -> np.ndarray:
        query = self.lent.encode([pairs[0][0]], "query")
        return self.lent.similarity(query, self.lent.encode([text for _, text in pairs]), weights)[0]


def _scored(document: Document, score: float) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, "relevance_score": score}})
