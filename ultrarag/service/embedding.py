"""Embedding: OpenAI's /v1/embeddings and /v1/models, with the encoder's fingerprint as the model."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ultrarag.errors import UsageError
from ultrarag.service.endpoint import Answer, Call, Endpoint, Lenient
from ultrarag.service.faults import Fault
from ultrarag.service.state import FEWEST_OF_FINGERPRINT, Service
from ultrarag.types import Kind

#: What clients call the two kinds of texts: Cohere, Jina, Voyage, and ours.
KINDS: dict[str, Kind] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "passage": "passage",
    "document": "passage",
    "search_document": "passage",
    "retrieval.passage": "passage",
    "text": "passage",
}


@dataclass(frozen=True)
class Encoded:
    """Texts, encoded by the live generation."""

    #: (texts, dim) float32
    dense: np.ndarray
    fingerprint: str
    generation: int
    #: read by the encoder
    tokens: int
    #: texts that were longer than the encoder takes
    cut: int


class EmbeddingsBody(Lenient):
    input: str | list[str] | list[int] | list[list[int]] = Field(description="a text, or several")
    model: str = Field("", description="the live encoder's fingerprint, 12 digits of it or more; or 'default'")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="only what the model has")
    input_type: str | None = Field(None, description="query or passage (the default): which side of the model reads it")
    user: str | None = None


class EmbeddingAnswer(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="numbers, or base64 of little-endian float32")


class UsageAnswer(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(Answer):
    object: Literal["list"]
    data: list[EmbeddingAnswer]
    model: str = Field(description="the fingerprint of the encoder that made them")
    usage: UsageAnswer


class ModelAnswer(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(Answer):
    object: Literal["list"]
    data: list[ModelAnswer]


def kind_of_input(name: str | None) -> Kind:
    """Which side of the model reads a text, by a client's word for it."""
    if name is None or name == "":
        return "passage"
    if name.lower() not in KINDS:
        raise UsageError(f"input_type is '{name[:50]}'; it must be one of {', '.join(KINDS)}")
    return KINDS[name.lower()]


def encoded(service: Service, texts: Sequence[str], kind: Kind, model: str = "") -> Encoded:
    """Encode texts for a client, by one generation; empty ones are texts too."""
    with service.live.encoding() as lent:
        service.check_model(model, lent.fingerprint)
        if "dense" not in lent.heads:
            raise UsageError(f"the live model has no dense vectors; it has {', '.join(lent.heads)}")
        read = lent.tokenize(texts, kind)
        dense = np.asarray(lent.encode(texts, kind).dense, np.float32)
        return Encoded(dense, lent.fingerprint, lent.generation, sum(map(len, read.ids)), read.truncated)


def check_dimensions(asked: int | None, held: int) -> None:
    """Refuse vectors of another length: those of the index could not be compared with them."""
    if asked is not None and asked != held:
        raise UsageError(f"dimensions is {asked}, and the live model's vectors have {held}: leave it out")


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise UsageError("'input' holds no text")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(
            "'input' holds token ids, which are another tokenizer's: send texts (langchain-openai: "
            "OpenAIEmbeddings(check_embedding_ctx_length=False))"
        )
    return texts


async def embeddings(call: Call) -> dict[str, Any]:
    service, body = call.service, call.body
    texts, kind = _texts(body.input), kind_of_input(body.input_type)
    service.check_most("texts", len(texts), service.settings.limits.texts)
    found = await service.searches.run(encoded, service, texts, kind, body.model)
    check_dimensions(body.dimensions, found.dense.shape[1])
    service.metrics.embedded.labels("embedded").inc(len(texts))
    rows = [_base64(row) for row in found.dense] if body.encoding_format == "base64" else found.dense.tolist()
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)],
        "model": found.fingerprint,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def _model(id: str, created: float) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": int(created), "owned_by": "ultrarag"}


def _fingerprints(service: Service) -> list[str]:
    return [service.live.fingerprint, *([service.reranker.fingerprint] if service.reranker else [])]


def _known(service: Service) -> list[str]:
    return [*_fingerprints(service), "default", *service.settings.model_names]


async def models(call: Call) -> dict[str, Any]:
    started = call.service.started
    return {"object": "list", "data": [_model(id, started) for id in _known(call.service)]}


async def model(call: Call) -> dict[str, Any]:
    id, known = call.path["id"], _known(call.service)
    if len(id) >= FEWEST_OF_FINGERPRINT:
        id = next((name for name in _fingerprints(call.service) if name.startswith(id.lower())), id)
    if id not in known:
        raise Fault(404, f"there is no model '{id[:100]}'; known: {', '.join(known)}")
    return _model(id, call.service.started)


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings,
        "Embed texts with the live encoder",
        "openai",
        body=EmbeddingsBody,
        answer=EmbeddingsAnswer,
        errors=(400, 404, 409),
    ),
    Endpoint(
        "GET", "/v1/models", models, "The models that requests may name", "openai", answer=ModelsAnswer, errors=()
    ),
    Endpoint("GET", "/v1/models/{id}", model, "One model", "openai", answer=ModelAnswer, errors=(404,)),
)
