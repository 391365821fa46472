"""Searching: /v1/search, /v1/search_many, /v1/status, /health and /metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from ultrarag import __version__
from ultrarag.retrieve import Hits
from ultrarag.service.endpoint import Answer, Body, Call, Endpoint
from ultrarag.service.metrics import TEXT

if TYPE_CHECKING:
    from ultrarag.service.state import Service


class Options(Body):
    """How to search; docs/service.md says what each means."""

    k: int = Field(10, ge=1, description="hits of a query")
    weights: dict[str, float] | None = Field(None, description="weight of each head, such as {'dense': 1, 'bm25': 0.5}")
    heads: list[str] | None = Field(None, description="the heads to search; default: those with a weight, else all")
    filter: dict[str, Any] | None = Field(None, description="a condition on the metadata, such as {'lang': 'en'}")
    ids: list[str] | None = Field(None, description="search among these passages alone")
    min_scores: dict[str, float] | None = Field(None, description="leave out hits that a head scores lower")
    fusion: str | None = Field(None, description="weighted or rrf")
    normalize: str | None = Field(None, description="minmax or raw")
    candidates: int | None = Field(None, ge=1, description="hits asked of each head before fusion")
    exact: bool | None = Field(None, description="compare the dense vector with all passages")
    mmr: float | None = Field(None, ge=0, le=1, description="hits that differ: from 1 (like the query) to 0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `LiveIndex.search`."""
        return {name: getattr(self, name) for name in Options.model_fields}


class Logged(Body):
    log: bool = Field(False, description="remember the search, so that POST /v1/feedback can refer to it")
    client: str | None = Field(None, description="who asks, for the log; kept as a keyed hash")

    def logging(self) -> dict[str, Any]:
        """Keyword arguments of `LiveIndex.search` about the log."""
        return {"log": self.log, "client": self.client}


class SearchBody(Options, Logged):
    query: str = Field(description="an empty one finds nothing")
    texts: bool = Field(True, description="answer with the passages' texts and metadata, not with ids alone")


class SearchManyBody(Options, Logged):
    queries: list[str] = Field(min_length=1)
    texts: bool = True


class HitAnswer(Answer):
    id: str
    score: float
    scores: dict[str, float] = Field(description="the score of each head before fusion")
    text: str | None = None
    title: str | None = None
    metadata: dict[str, Any] | None = None


class SearchAnswer(Answer):
    query_id: str = Field(description="what feedback refers to")
    generation: int = Field(description="the generation that answered")
    fingerprint: str = Field(description="of its encoder")
    hits: list[HitAnswer]


class SearchManyAnswer(Answer):
    results: list[SearchAnswer] = Field(description="one of each query, in their order; all of one generation")


class ServiceAnswer(Answer):
    version: str
    uptime_seconds: float
    pending: dict[str, int] = Field(description="calls that run or wait")
    load: dict[str, Any] = Field(
        description="what this process answered in the last minute: searches, their wait, errors"
    )
    job: str | None = Field(description="the job that runs")
    reranker: str | None = Field(description="fingerprint of the reranker")


class StatusAnswer(Answer):
    index: dict[str, Any] = Field(description="what LiveIndex.status() says")
    service: ServiceAnswer
    watch: dict[str, Any] | None = Field(
        description="the live generation beside the previous one, for a day after a swap (docs/feedback.md)"
    )


class HealthAnswer(Answer):
    status: str


def shown(hits: Hits, texts: bool = True) -> dict[str, Any]:
    """The hits of a query, as JSON values."""
    return {
        "query_id": hits.query_id,
        "generation": hits.generation,
        "fingerprint": hits.fingerprint,
        "hits": [_hit(hit, texts) for hit in hits],
    }


def _hit(hit: Any, texts: bool) -> dict[str, Any]:
    found = {"id": hit.id, "score": float(hit.score), "scores": {name: float(s) for name, s in hit.scores.items()}}
    if texts:
        passage = hit.passage
        found |= {"text": passage.text, "title": passage.title, "metadata": dict(passage.metadata)}
    return found


async def search(call: Call) -> dict[str, Any]:
    found = await call.service.search([call.body.query], {**call.body.options(), **call.body.logging()})
    return shown(found[0], call.body.texts)


async def search_many(call: Call) -> dict[str, Any]:
    found = await call.service.search(call.body.queries, {**call.body.options(), **call.body.logging()})
    return {"results": [shown(hits, call.body.texts) for hits in found]}


async def status(call: Call) -> dict[str, Any]:
    service = call.service
    found, watch = await service.writes.run(_watched, service)
    running = service.jobs.running
    return {
        "index": found,
        "service": {
            "version": __version__,
            "uptime_seconds": round(time.time() - service.started, 3),
            "pending": {pool.name: pool.pending for pool in (service.searches, service.writes)},
            "load": service.load.last_minute(),
            "job": running.id if running else None,
            "reranker": service.reranker.fingerprint if service.reranker else None,
        },
        "watch": watch,
    }


def _watched(service: Service) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The index's status, and what is seen since a swap."""
    found = service.live.status()
    return found, service.watching.look(found)


async def health(call: Call) -> dict[str, str]:
    return {"status": "stopping" if call.service.stopping else "ok"}


async def metrics(call: Call) -> Response:
    text = await call.service.writes.run(call.service.metrics.text)
    return PlainTextResponse(text, media_type=TEXT)


ENDPOINTS = (
    Endpoint(
        "GET",
        "/health",
        health,
        "Whether the service runs; needs no token",
        "service",
        answer=HealthAnswer,
        open=True,
        errors=(),
    ),
    Endpoint(
        "GET", "/metrics", metrics, "Counters for Prometheus", "service", answer=str, media="text/plain", errors=()
    ),
    Endpoint("GET", "/v1/status", status, "The index and the service", answer=StatusAnswer, errors=()),
    Endpoint("POST", "/v1/search", search, "Search with one query", body=SearchBody, answer=SearchAnswer),
    Endpoint(
        "POST",
        "/v1/search_many",
        search_many,
        "Search with several queries on one generation",
        body=SearchManyBody,
        answer=SearchManyAnswer,
    ),
)
