"""One ranking out of several heads': a weighted sum of their scores, or reciprocal rank fusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.types import head_weights

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
    fused = [
        Fused(
            id,
            math.fsum(weights[head] * part[id] for head, part in parts.items() if id in part),
            {head: scores[id] for head, scores in held.items() if id in scores},
        )
        for id in dict.fromkeys(id for scores in held.values() for id in scores)
    ]
    return sorted(fused, key=lambda hit: (-hit.score, hit.id))[:k]


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
