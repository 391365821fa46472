"""Pipelines: UltraRAG's POST /search, as its `retriever_deploy_search` asks; a swap behind it changes no pipeline."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ultrarag.service.endpoint import Answer, Call, Endpoint, Lenient


class PipelineBody(Lenient):
    query_list: list[str] = Field(min_length=1)
    top_k: int | None = Field(None, ge=1, description="default: 5")
    query_instruction: str | None = Field(None, description="stands before every query, as in UltraRAG's own retriever")


class PipelineAnswer(Answer):
    ret_psg: list[list[str]] = Field(description="the texts found for each query, best first")


async def search(call: Call) -> dict[str, Any]:
    body = call.body
    queries = [f"{body.query_instruction or ''}{query}" for query in body.query_list]
    found = await call.service.search(queries, {"k": body.top_k or 5})
    return {"ret_psg": [[hit.passage.content for hit in hits] for hits in found]}


ENDPOINTS = (
    Endpoint(
        "POST",
        "/search",
        search,
        "Search for an UltraRAG pipeline (retriever_deploy_search)",
        "ultrarag v3",
        body=PipelineBody,
        answer=PipelineAnswer,
    ),
)
