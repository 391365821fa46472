"""UltraRAGRanker: documents in the order in which a reranker sees them."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from haystack import Document, component, default_from_dict, default_to_dict

from haystack_integrations.document_stores.ultrarag.converters import listed, meta_values
from haystack_integrations.document_stores.ultrarag.loading import Device, load_encoder
from ultrarag.retrieve import rerank
from ultrarag.types import Hit, Passage

if TYPE_CHECKING:
    from ultrarag import Encoder


@component
class UltraRAGRanker:
    """
    Ranks documents by a cross-encoder of UltraRAG's, or by any encoder's comparison of query and document.

    Usage example:
    ```python
    from haystack import Document
    from haystack_integrations.components.rankers.ultrarag import UltraRAGRanker

    ranker = UltraRAGRanker("BAAI/bge-reranker-v2-m3", top_k=3)
    ranker.run("what is milvus?", [Document(content="Milvus is a vector database."), Document(content="An opera.")])
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        adapter: str | None = None,
        top_k: int = 10,
        weight: float | None = None,
        score_threshold: float | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        device: Device = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        score_options: dict[str, Any] | None = None,
    ) -> None:
        """
        Creates a ranker; the model is loaded when it is first used, or warmed up.

        :param model: A checkpoint of UltraRAG's, or any folder or name on the hub that an adapter reads.
        :param adapter: The adapter that reads the model; default: the one that claims it.
        :param top_k: How many documents are returned at most.
        :param weight: Of the ranker's scores beside those that the documents come with, each brought to mean 0 and
            spread 1; their sum is the new score. Default: the ranker alone.
        :param score_threshold: Only documents with a new score of at least this.
        :param meta_fields_to_embed: Fields of `meta` whose values are read before the content.
        :param embedding_separator: What stands between them.
        :param device: Where it runs.
        :param trust_remote_code: Run Python code that comes with the model.
        :param model_kwargs: Others of `Encoder.load`, such as `precision`.
        :param score_options: Of `Encoder.score`, such as `{"normalize": True}` for a cross-encoder's scores from 0 to
            1, and `{"weights": {"colbert": 1}}` for a model with several heads.
        :raises ValueError: If `top_k` is not positive.
        """
        if top_k <= 0:
            raise ValueError(f"top_k must be greater than 0, and is {top_k}")
        self.model, self.adapter, self.top_k = str(model), adapter, top_k
        self.weight, self.score_threshold = weight, score_threshold
        self.meta_fields_to_embed = listed("meta_fields_to_embed", meta_fields_to_embed)
        self.embedding_separator = embedding_separator
        self.device, self.trust_remote_code = device, trust_remote_code
        self.model_kwargs, self.score_options = model_kwargs or {}, score_options or {}
        self._ranking = threading.Lock()
        self._encoder: Encoder | None = None

    def to_dict(self) -> dict[str, Any]:
        """
        Serializes the component to a dictionary.
        """
        return default_to_dict(
            self,
            model=self.model,
            adapter=self.adapter,
            top_k=self.top_k,
            weight=self.weight,
            score_threshold=self.score_threshold,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            model_kwargs=self.model_kwargs,
            score_options=self.score_options,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UltraRAGRanker:
        """
        Deserializes the component from a dictionary.
        """
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """
        Loads the model.
        """
        with self._ranking:
            self._loaded()

    async def warm_up_async(self) -> None:
        """
        As `warm_up`, while the loop goes on.
        """
        await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """
        Lets go of the model; another run loads it again.
        """
        with self._ranking:
            self._encoder = None

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """
        Ranks documents.

        :param query: The text of the query.
        :param documents: The documents; one without content is read as an empty text.
        :param top_k: In place of that of the component.
        :param score_threshold: In place of that of the component.
        :returns: `documents`, best first, with their new scores; those given stay as they are.
        :raises ValueError: If `top_k` is not positive.
        """
        most = self.top_k if top_k is None else top_k
        if most <= 0:
            raise ValueError(f"top_k must be greater than 0, and is {most}")
        least = self.score_threshold if score_threshold is None else score_threshold
        by_number = [Hit(str(n), d.score or 0.0, Passage(str(n), self._text(d))) for n, d in enumerate(documents)]
        with self._ranking:  # one forward at a time, whoever asks
            ranked = rerank(self._loaded(), query, by_number, weight=self.weight, **self.score_options)
        found = [hit for hit in ranked if least is None or hit.score >= least][:most]
        return {"documents": [replace(documents[int(hit.id)], score=hit.score) for hit in found]}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """
        As `run`, in a thread.
        """
        return await asyncio.to_thread(self.run, query, documents, top_k, score_threshold)

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            options = {"trust_remote_code": self.trust_remote_code, **self.model_kwargs}
            self._encoder = load_encoder(self.model, self.adapter, self.device, **options)
        return self._encoder

    def _text(self, document: Document) -> str:
        before = meta_values(document.meta, self.meta_fields_to_embed)
        return self.embedding_separator.join([*before, document.content or ""])
