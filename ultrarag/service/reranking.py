"""Reranking: /v1/rerank (Jina, Cohere v1, vLLM), /v2/rerank (Cohere) and /rerank, which TEI's clients ask too."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from ultrarag.errors import UsageError
from ultrarag.service.endpoint import Answer, Call, Endpoint, Lenient


class Document(Lenient):
    """A text in an object, as Jina and Cohere v1 also send."""

    text: str


class RerankBody(Lenient):
    query: str = Field(min_length=1)
    documents: list[str | Document] = Field(min_length=1)
    model: str = Field("", description="the fingerprint of the reranker, or of the live encoder without one")
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None


class AnyRerankBody(RerankBody):
    documents: list[str | Document] | None = None  # type: ignore[assignment]
    texts: list[str] | None = Field(None, description="as text-embeddings-inference's clients call the documents")
    raw_scores: bool = Field(False, description="a cross-encoder's logits, in place of 0 to 1")
    return_text: bool = False

    @model_validator(mode="after")
    def _either(self) -> AnyRerankBody:
        if (self.documents is None) == (self.texts is None) or not (self.documents or self.texts):
            raise ValueError("give the documents' texts, as 'documents' or as 'texts', and at least one")
        return self


class DocumentAnswer(Answer):
    text: str


class RankedAnswer(Answer):
    index: int = Field(description="the document's place in the request")
    relevance_score: float
    document: DocumentAnswer | None = None


class RerankUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class RerankAnswer(Answer):
    id: str
    model: str
    results: list[RankedAnswer]
    usage: RerankUsage
    meta: dict[str, Any]


class TeiRankedAnswer(Answer):
    index: int
    score: float
    text: str | None = None


def _texts(documents: list[str | Document]) -> list[str]:
    return [document if isinstance(document, str) else document.text for document in documents]


async def _ranked(
    call: Call, query: str, texts: list[str], raw: bool = False
) -> tuple[list[tuple[int, float]], str, int]:
    """(place, score) of each text, best first; who scored; the tokens that were read."""
    service = call.service
    service.check_most("documents", len(texts), service.settings.limits.texts)
    if not query.strip():
        raise UsageError("'query' is empty")
    scores, model, read = await service.searches.run(
        service.relevance, query, texts, getattr(call.body, "model", ""), raw
    )
    service.metrics.embedded.labels("reranked").inc(len(texts))
    order = sorted(range(len(texts)), key=lambda place: (-float(scores[place]), place))
    return [(place, float(scores[place])) for place in order], model, read


async def _rerank(call: Call, with_documents: bool) -> dict[str, Any]:
    body = call.body
    texts = _texts(body.documents)
    found, model, read = await _ranked(call, body.query, texts)
    shown = with_documents if body.return_documents is None else body.return_documents
    results: list[dict[str, Any]] = []
    for place, score in found[: body.top_n]:
        entry: dict[str, Any] = {"index": place, "relevance_score": score}
        results.append({**entry, "document": {"text": texts[place]}} if shown else entry)
    return {
        "id": str(uuid.uuid4()),
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": read, "total_tokens": read},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }


async def rerank(call: Call) -> dict[str, Any]:
    return await _rerank(call, with_documents=True)  # UltraRAG's reranker reads them without asking


async def rerank_v2(call: Call) -> dict[str, Any]:
    return await _rerank(call, with_documents=False)


async def rerank_any(call: Call) -> Any:
    if call.body.documents is not None:
        return await rerank(call)
    call.request.scope["ultrarag.shape"] = "tei"
    body, texts = call.body, call.body.texts
    found, _, _ = await _ranked(call, body.query, texts, body.raw_scores)
    return [{"index": n, "score": s, **({"text": texts[n]} if body.return_text else {})} for n, s in found]


_OWN = Endpoint(
    "POST",
    "/v1/rerank",
    rerank,
    "Order documents by their relevance for a query",
    "jina",
    body=RerankBody,
    answer=RerankAnswer,
    errors=(400, 404, 409),
    shape="cohere",
)
ENDPOINTS = (
    _OWN,
    replace(_OWN, path="/v2/rerank", run=rerank_v2, summary="The same, as Cohere's clients ask", tag="cohere"),
    replace(
        _OWN,
        path="/rerank",
        run=rerank_any,
        summary="The same for clients of TEI (texts) and of Jina (documents)",
        tag="tei",
        body=AnyRerankBody,
        answer=RerankAnswer | list[TeiRankedAnswer],
        shape="tei",
    ),
)
