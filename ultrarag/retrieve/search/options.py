"""How to search: what callers may ask, and what it comes to for the heads that an index has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.retrieve.ranking import check_ids, check_k
from ultrarag.retrieve.search.filters import Filter, Node, parse
from ultrarag.retrieve.search.fusion import Method, check_weights
from ultrarag.types import head_weights

Fusion = Literal["weighted", "rrf"]
Normalize = Literal["minmax", "raw"]
#: The retriever that needs no encoder.
BM25_HEAD = "bm25"
#: The head by which hits are told apart.
DENSE_HEAD = "dense"
#: Where candidates come from for ColBERT alone, the first that the index has; without either it compares with all.
SOURCES = ("dense", "sparse")


@dataclass(frozen=True)
class SearchOptions:
    """How to search; see `LiveIndex.search` for what each means."""

    k: int = 10
    weights: Mapping[str, float] | None = None
    filter: Filter = None
    fusion: Fusion = "weighted"
    normalize: Normalize = "minmax"
    heads: Sequence[str] | None = None
    candidates: int | None = None
    exact: bool = False
    ids: Sequence[str] | None = None
    min_scores: Mapping[str, float] | None = None
    mmr: float | None = None

    @staticmethod
    def of(values: Mapping[str, Any]) -> SearchOptions:
        """Check the names of keyword arguments."""
        known = SearchOptions.__dataclass_fields__
        for name in values:
            if name not in known:
                raise UsageError(
                    f"search has no argument '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
        return SearchOptions(**values)


@dataclass(frozen=True)
class SearchPlan:
    """Search options, checked against what an index has."""

    k: int
    #: what counts in the score
    heads: tuple[str, ...]
    weights: dict[str, float]
    method: Method
    #: hits asked of each head
    depth: int
    #: gives ColBERT its candidates when nothing else that counts does
    source: str | None
    filter: Node | None
    exact: bool
    #: the passages that are compared; None for all
    ids: tuple[str, ...] | None
    #: what a hit must have at least from a head
    min_scores: dict[str, float]
    #: the weight of relevance where hits are to be unlike each other, None where not
    mmr: float | None = None
    #: also rank, of `ids`, those that a word search or a lexical one would not find
    every: bool = False

    @property
    def encoded(self) -> tuple[str, ...]:
        """The heads for which the query must be encoded."""
        wanted = (*self.heads, self.source, *([] if self.mmr is None else [DENSE_HEAD]))
        return tuple(head for head in dict.fromkeys(wanted) if head and head != BM25_HEAD)


def plan(options: SearchOptions, stored: Sequence[str], bm25: bool) -> SearchPlan:
    """Check options against the heads that are stored; UsageError says what cannot be, and what can."""
    known = (*stored, BM25_HEAD) if bm25 else tuple(stored)
    heads = _heads(options, tuple(stored), known)
    asked = _method(options)
    method: Method = "raw" if len(heads) == 1 else asked
    weights = check_weights(heads, _chosen(options.weights, heads), method != "rrf")
    if len(heads) == 1:
        weights = dict.fromkeys(heads, 1.0)  # its own scores, whatever it weighs
    heads = tuple(head for head in heads if weights[head] > 0)
    k = check_k(options.k)
    depth = check_k(options.candidates) if options.candidates is not None else max(4 * k, 100)
    source = next((name for name in SOURCES if name in known), None) if heads == ("colbert",) else None
    mmr = _mmr(options.mmr, known)
    single = len(heads) == 1 and source is None and mmr is None
    kept = {head: weights[head] for head in heads}
    return SearchPlan(
        k=k,
        heads=heads,
        weights=kept,
        method=method,
        depth=k if single else max(k, depth),
        source=source,
        filter=parse(options.filter),
        exact=options.exact,
        ids=_given(options.ids),
        min_scores=_least(options.min_scores, heads),
        mmr=mmr,
    )


def _given(ids: Sequence[str] | None) -> tuple[str, ...] | None:
    if ids is None:
        return None
    if isinstance(ids, str):
        raise UsageError("ids takes several; put one alone into a list")
    wanted = tuple(dict.fromkeys(ids))
    check_ids(wanted)
    return wanted


def _mmr(weight: float | None, known: Sequence[str]) -> float | None:
    if weight is None:
        return None
    if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 <= weight <= 1:
        raise UsageError(f"mmr is {weight!r}; it is a number from 0 (unlike each other) to 1 (like the query)")
    if DENSE_HEAD not in known:
        raise UsageError(f"mmr compares dense vectors, and the index has {', '.join(known)}")
    return float(weight)


def _least(min_scores: Mapping[str, float] | None, heads: tuple[str, ...]) -> dict[str, float]:
    """What a hit must have at least, by head; a head that is not searched gives no scores."""
    if min_scores is None:
        return {}
    if not isinstance(min_scores, Mapping):
        raise UsageError(f"min_scores is {min_scores!r}; it maps heads to numbers, such as {{'{heads[0]}': 0.3}}")
    for head, least in min_scores.items():
        if head not in heads:
            raise UsageError(
                f"min_scores: head '{head}' is not searched{did_you_mean(head, heads)}; searched: {', '.join(heads)}"
            )
        if not isinstance(least, Real) or isinstance(least, bool) or not math.isfinite(least):
            raise UsageError(f"min_scores: '{head}' is {least!r}; it must be a finite number")
    return {head: float(least) for head, least in min_scores.items()}


def _heads(options: SearchOptions, stored: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The heads named, else those that have a weight, else all that the encoder has."""
    named = [options.heads] if isinstance(options.heads, str) else options.heads
    if named is None and options.weights is None:
        named = stored
    elif named is None:
        named = [head for head, weight in head_weights(options.weights).items() if weight != 0]
        if not named:
            raise UsageError("weights: all are 0; at least one head must count")
    for head in named:
        if head not in known:
            raise UsageError(f"the index has no head '{head}'{did_you_mean(head, known)}; it has {', '.join(known)}")
    if not named:
        raise UsageError(f"heads names none; the index has {', '.join(known)}")
    return tuple(dict.fromkeys(named))


def _chosen(weights: Mapping[str, float] | None, heads: tuple[str, ...]) -> Mapping[str, float] | None:
    """Leave out the weights of 0 for heads that are not searched."""
    if weights is None:
        return None
    return {head: weight for head, weight in head_weights(weights).items() if head in heads or weight != 0}


def _method(options: SearchOptions) -> Method:
    if options.fusion not in get_args(Fusion):
        raise UsageError(f"fusion is '{options.fusion}'; it must be one of {', '.join(get_args(Fusion))}")
    if options.normalize not in get_args(Normalize):
        raise UsageError(f"normalize is '{options.normalize}'; it must be one of {', '.join(get_args(Normalize))}")
    return "rrf" if options.fusion == "rrf" else options.normalize
