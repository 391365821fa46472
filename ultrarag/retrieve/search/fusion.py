"""One ranking out of several heads': weighted sums or reciprocal ranks, and a reranker's order on top."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal, get_args

from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.retrieve.search.hits import Hits
from ultrarag.types import Hit, head_weights

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


Method = Literal["minmax", "raw", "rrf"]
#: (passage id, score)
Scored = tuple[str, float]
#: Called with a head and ids that its list lacks; returns their scores, NaN for a passage that is gone.
Complete = Callable[[str, Sequence[str]], Sequence[float]]

#: The constant of reciprocal rank fusion, as in its paper.
RRF_K = 60


@dataclass(frozen=True)
class Fused:
    """A candidate after fusion."""

    id: str
    score: float
    #: what each head that knows the candidate gave it, unchanged
    scores: Mapping[str, float]


def fuse(
    lists: Mapping[str, Sequence[Scored]],
    k: int,
    weights: Mapping[str, float] | None = None,
    method: Method = "minmax",
    complete: Complete | None = None,
) -> list[Fused]:
    """Return the k best candidates over all lists; equal scores come in the order of their ids.

    Args:
        lists: (id, score) per head, in any order, an id once a head.
        weights: one number of at least 0 per head. May be left out for a single head, and for "rrf" (1 each):
            the scales of heads differ from model to model, so that no default would be right.
        method: "minmax" maps each head's list of this query to 0..1 before weighting (all 1 where all are equal);
            a candidate that a list lacks counts as 0 there. "raw" weighs the scores as they are; what a list lacks
            is computed with `complete`, so a sum never depends on how deep a list was. "rrf" adds
            weight / (60 + rank), nothing where a list lacks the candidate.

    Raises:
        UsageError: for an unknown method or head, for weights that are missing or make no sense, and when "raw"
            lacks scores and `complete`.

    Source:
        Reciprocal rank fusion: Cormack, Clarke and Buettcher, 2009. Weighted sums of raw heads: bge-m3
        (Chen et al., 2024).
    """
    if method not in get_args(Method):
        known = get_args(Method)
        raise UsageError(f"no fusion method '{method}'{did_you_mean(method, known)}; known: {', '.join(known)}")
    weights = check_weights(lists, weights, required=method != "rrf")
    held = {head: dict(scored) for head, scored in lists.items() if weights[head] > 0}
    if method == "raw":
        held = _completed(held, complete)
    parts = {head: _contribution(method, scores) for head, scores in held.items()}
    return [
        Fused(id, total, {head: scores[id] for head, scores in held.items() if id in scores})
        for id, total in _best(_totals(parts, weights), k)
    ]


def _totals(parts: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """The weighted sum of each candidate's parts, rounded once, so that the order of the heads changes nothing."""
    terms: dict[str, list[float]] = {}
    for head, part in parts.items():
        weight = weights[head]
        for id, score in part.items():
            terms.setdefault(id, []).append(weight * score)
    return {id: values[0] if len(values) == 1 else math.fsum(values) for id, values in terms.items()}


def _best(totals: dict[str, float], k: int) -> list[Scored]:
    """The k best, equal ones in the order of their ids."""
    found: Iterable[Scored] = totals.items()
    if len(totals) > k:
        least = sorted(totals.values(), reverse=True)[k - 1]
        found = [(id, total) for id, total in found if total >= least]
    return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]


def check_weights(
    heads: Mapping[str, object] | Sequence[str], weights: Mapping[str, float] | None, required: bool = True
) -> dict[str, float]:
    """Return one weight per head; raise UsageError when they are missing, unknown, negative or all zero."""
    names = list(heads)
    if weights is None:
        if required and len(names) > 1:
            example = ", ".join(f"'{name}': 1" for name in names)
            raise UsageError(f"{len(names)} heads ({', '.join(names)}) need explicit weights, such as {{{example}}}")
        return dict.fromkeys(names, 1.0)
    for name, weight in head_weights(weights).items():
        if name not in names:
            raise UsageError(f"weights: no head '{name}'{did_you_mean(name, names)}; known: {', '.join(names)}")
        if weight < 0:
            raise UsageError(f"weights: '{name}' is {weight!r}; a weight is a number of at least 0")
    if missing := [name for name in names if name not in weights]:
        raise UsageError(f"weights: none for '{missing[0]}'; name every head (0 leaves it out)")
    if names and not any(weights.values()):
        raise UsageError("weights: all are 0; at least one head must count")
    return {name: float(weights[name]) for name in names}


def _completed(held: dict[str, dict[str, float]], complete: Complete | None) -> dict[str, dict[str, float]]:
    """Give every candidate a score of every head, and drop those that no longer exist."""
    union = sorted({id for scores in held.values() for id in scores})
    full = {head: dict(scores) for head, scores in held.items()}
    for head, scores in full.items():
        missing = [id for id in union if id not in scores]
        if missing and complete is None:
            raise UsageError(
                f"raw fusion: '{head}' has no score for '{missing[0]}' ({len(missing)} in all); pass `complete` to "
                f"compute them, or use 'minmax' or 'rrf'"
            )
        if missing and complete is not None:
            scores.update(zip(missing, map(float, complete(head, missing)), strict=True))
    gone = {id for scores in full.values() for id, score in scores.items() if math.isnan(score)}
    return {head: {id: s for id, s in scores.items() if id not in gone} for head, scores in full.items()}


def _contribution(method: Method, scores: dict[str, float]) -> dict[str, float]:
    if method == "raw" or not scores:
        return scores
    if method == "rrf":
        order = sorted(scores, key=lambda id: (-scores[id], id))
        return {id: 1 / (RRF_K + rank) for rank, id in enumerate(order, start=1)}
    low, high = min(scores.values()), max(scores.values())
    return {id: (score - low) / (high - low) if high > low else 1.0 for id, score in scores.items()}


def rerank(
    encoder: Encoder, query: str, hits: Sequence[Hit], *, weight: float | None = None, **options: Any
) -> list[Hit]:
    """Return the hits in the order of `encoder.score`, whose score becomes theirs; equal scores keep their order.

    `Hits` stay `Hits`, of the same query.

    Args:
        encoder: a cross-encoder, or any other with its `weights` among the options.
        hits: as `LiveIndex.search` returned them; 50 to 100 are usual. Their former score is kept in `scores`
            under "retrieval".
        weight: of the reranker's scores beside the hits' own, each brought to mean 0 and spread 1 over the hits; their
            sum becomes the score, and the reranker's is kept in `scores` under "reranker". Default: the reranker alone.
            A small reranker is often better so (benchmarks/rerank.py: 0.814 alone, 0.767 reranked, 0.836 with 0.5).
        options: of `Encoder.score`.

    Raises:
        DataError: when the encoder gives a score that is not a number.
        UsageError: for a weight below 0.
    """
    if weight is not None and not weight >= 0:
        raise UsageError(f"weight is {weight}; it must be 0 or more")
    if not hits:
        return hits.with_hits([]) if isinstance(hits, Hits) else []
    scores = [float(score) for score in encoder.score([(query, hit.passage.content) for hit in hits], **options)]
    for hit, score in zip(hits, scores, strict=True):
        if score != score:
            raise DataError(f"the reranker's score of passage '{hit.id}' is not a number")
    totals = scores if weight is None else _summed([hit.score for hit in hits], scores, weight)
    more: list[dict[str, float]] = [{}] * len(hits) if weight is None else [{"reranker": score} for score in scores]
    ordered = sorted(zip(hits, totals, more, strict=True), key=lambda item: -item[1])
    reranked = [
        replace(hit, score=total, scores={**hit.scores, "retrieval": hit.score, **extra})
        for hit, total, extra in ordered
    ]
    return hits.with_hits(reranked) if isinstance(hits, Hits) else reranked


def _summed(own: Sequence[float], scores: Sequence[float], weight: float) -> list[float]:
    return [a + weight * b for a, b in zip(_spread(own), _spread(scores), strict=True)]


def _spread(values: Sequence[float]) -> list[float]:
    """Values with mean 0 and standard deviation 1; all 0 where they are equal."""
    middle, spread = fmean(values), pstdev(values)
    return [(value - middle) / spread if spread > 0 else 0.0 for value in values]
