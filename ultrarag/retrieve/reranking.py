"""Reranking: the best hits of a search, ordered anew by a model that reads query and passage together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ultrarag.errors import DataError
from ultrarag.types import Hit

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


def rerank(encoder: Encoder, query: str, hits: Sequence[Hit], **options: Any) -> list[Hit]:
    """Return the hits in the order of `encoder.score`, whose score becomes theirs; equal scores keep their order.

    Args:
        encoder: a cross-encoder, or any other with its `weights` among the options.
        hits: as `LiveIndex.search` returned them; 50 to 100 are usual. Their former score is kept in `scores`
            under "retrieval".
        options: of `Encoder.score`.

    Raises:
        DataError: when the encoder gives a score that is not a number.
    """
    if not hits:
        return []
    scores = [float(score) for score in encoder.score([(query, hit.passage.content) for hit in hits], **options)]
    for hit, score in zip(hits, scores, strict=True):
        if score != score:
            raise DataError(f"the reranker's score of passage '{hit.id}' is not a number")
    ordered = sorted(zip(hits, scores, strict=True), key=lambda pair: -pair[1])
    return [replace(hit, score=score, scores={**hit.scores, "retrieval": hit.score}) for hit, score in ordered]
