"""TEI: /embed, /similarity and /info, as text-embeddings-inference answers them (/rerank is in `reranking`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from ultrarag import __version__
from ultrarag.encoder.engines import family
from ultrarag.errors import UsageError
from ultrarag.service.embedding import Encoded, check_dimensions, encoded, kind_of_input
from ultrarag.service.endpoint import Answer, Call, Endpoint, Lenient
from ultrarag.service.faults import Fault
from ultrarag.service.state import Service

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


class EmbedBody(Lenient):
    inputs: str | list[str]
    normalize: bool | None = Field(None, description="unit length; default: as the model does")
    truncate: bool | None = Field(None, description="false: refuse a text that is longer than the model takes")
    prompt_name: str | None = Field(None, description="query or passage (the default)")
    dimensions: int | None = None


class SimilarityInput(Lenient):
    source_sentence: str
    sentences: list[str] = Field(min_length=1)


class SimilarityBody(Lenient):
    inputs: SimilarityInput


class InfoAnswer(Answer):
    model_id: str
    model_sha: str = Field(description="the live encoder's fingerprint")
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int | None
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str


async def _encoded(call: Call, texts: list[str], kind: str | None) -> Encoded:
    service = call.service
    if not texts:
        raise UsageError("'inputs' holds no text")
    service.check_most("inputs", len(texts), service.settings.limits.texts)
    found = await service.searches.run(encoded, service, texts, kind_of_input(kind))
    service.metrics.embedded.labels("embedded").inc(len(texts))
    return found


async def embed(call: Call) -> list[list[float]]:
    body = call.body
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    found = await _encoded(call, texts, body.prompt_name)
    check_dimensions(body.dimensions, found.dense.shape[1])
    if body.truncate is False and found.cut:
        raise Fault(413, f"{found.cut} of {len(texts)} inputs are longer than the model takes; truncate=true cuts them")
    return _normalized(call.service, found.dense, body.normalize).tolist()


def _normalized(service: Service, dense: np.ndarray, wanted: bool | None) -> np.ndarray:
    if wanted:
        return dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    if wanted is False and service.live.encoder.settings.normalize:
        raise UsageError("normalize=false: the live model gives vectors of unit length, and no others; leave it out")
    return dense


async def similarity(call: Call) -> list[float]:
    asked = call.body.inputs
    dense = (await _encoded(call, [asked.source_sentence, *asked.sentences], None)).dense
    unit = dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    return (unit[1:] @ unit[0]).tolist()


async def info(call: Call) -> dict[str, Any]:
    service = call.service
    encoder, limits = service.live.encoder, service.settings.limits
    return {
        "model_id": (*service.settings.model_names, "default")[0],
        "model_sha": service.live.fingerprint,
        "model_dtype": _DTYPES.get(family(encoder.precision), "float32"),
        "model_type": {"embedding": {"pooling": encoder.settings.pooling or "unknown"}},
        "max_concurrent_requests": limits.waiting,
        "max_input_length": encoder.max_length("passage"),
        "max_batch_tokens": 16384,
        "max_client_batch_size": limits.texts,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
    }


ENDPOINTS = (
    Endpoint(
        "POST",
        "/embed",
        embed,
        "Embed texts, as text-embeddings-inference does",
        "tei",
        body=EmbedBody,
        answer=list[list[float]],
        errors=(400, 413),
        shape="tei",
    ),
    Endpoint(
        "POST",
        "/similarity",
        similarity,
        "Cosine similarity of sentences to one",
        "tei",
        body=SimilarityBody,
        answer=list[float],
        shape="tei",
    ),
    Endpoint("GET", "/info", info, "What the live model is", "tei", answer=InfoAnswer, errors=(), shape="tei"),
)
