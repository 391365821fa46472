"""The tools of UltraRAG's server `reranker`, with its names and signatures, answered by the service."""

from __future__ import annotations

from typing import Any

from ultrarag.doors.ultrarag_v3.backend import Backend
from ultrarag.doors.ultrarag_v3.wiring import tool
from ultrarag.errors import UsageError


class Reranker:
    """One pipeline's reranker: the service's cross-encoder, or the live encoder where it has none."""

    def __init__(self) -> None:
        self._given: Backend | None = None
        self._model = ""

    @tool()
    def reranker_init(
        self,
        model_name_or_path: str,
        backend_configs: dict[str, Any],
        batch_size: int,
        gpu_ids: str | int | None = None,
        backend: str = "infinity",
    ) -> None:
        """Name the service that scores, and the fingerprint of its model if another one is to be refused."""
        found = Backend.of(backend, backend_configs)
        found.ask("GET", "/v1/models")
        self._given, self._model = found, model_name_or_path

    @tool({"query_list": "q_ls", "passages_list": "ret_psg"}, "rerank_psg")
    def reranker_rerank(
        self, query_list: list[str], passages_list: list[list[str]], top_k: int = 5, query_instruction: str = ""
    ) -> dict[str, list[Any]]:
        """The best `top_k` passages of each query's, best first."""
        if len(query_list) != len(passages_list):
            raise UsageError(
                f"query_list has {len(query_list)} queries and passages_list {len(passages_list)} lists of passages: "
                "there must be one for each"
            )
        pairs = zip(query_list, passages_list, strict=True)
        return {"rerank_psg": [self._best(f"{query_instruction}{query}", texts, top_k) for query, texts in pairs]}

    def _best(self, query: str, texts: list[str], top_k: int) -> list[str]:
        if self._given is None:
            raise UsageError("no service is named yet: the pipeline must call reranker_init first")
        if not texts:
            return []
        body = {"model": self._model, "query": query, "documents": texts, "top_n": top_k, "return_documents": False}
        return [texts[found["index"]] for found in self._given.ask("POST", "/v1/rerank", body)["results"]]
