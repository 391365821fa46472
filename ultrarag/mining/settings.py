"""MiningSettings: how hard negatives are found, filtered and drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.types import head_weights

Fusion = Literal["raw", "minmax"]
Sampling = Literal["random", "hardest"]
Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class MiningSettings:
    """How hard negatives are found, filtered and drawn.

    A score is the weighted sum of heads' scores. "The positive's score" is that of the row's lowest positive: a
    negative has to be worse than each of them.

    Raises:
        UsageError: when a value cannot be used.
    """

    #: weight per head (dense, sparse, colbert, bm25); None: the dense head, or the only one
    weights: Mapping[str, float] | None = None
    #: "raw" sums scores as they are; "minmax" maps each head's to 0..1 over a query's candidates and positives first
    fusion: Fusion = "raw"
    #: ranks from which negatives are drawn, the first included and the last not; rank 0 is the best hit
    range: tuple[int, int] = (10, 210)
    #: negatives per row
    negatives: int = 15
    #: drawn from the range at random, or from its top
    sampling: Sampling = "random"
    #: a negative scores at least this much less than the positive
    margin: float | None = None
    #: a negative scores at most this share of the positive's score (TopK-PercPos; 0.95 is usual)
    max_share: float | None = None
    #: a text that shares this much of its 3-word sequences with a positive (Jaccard) is no negative; None: not compared
    near_duplicate: float | None = 0.8
    #: a reranker's score above this is no negative
    veto_above: float | None = None
    #: a negative's reranker score is at least this much less than the positive's
    veto_margin: float | None = None
    #: rows with too few negatives get random texts of the pool, which nothing has judged
    fill_random: bool = False
    #: write the scores (the reranker's where there is one) as pos_scores and neg_scores
    write_scores: bool = False
    #: of the vectors on disk; float16 halves them
    vectors: Precision = "float32"
    seed: int = 42

    def __post_init__(self) -> None:
        self._check_choices()
        if self.weights is not None:
            head_weights(self.weights)
        low, high = self.range
        if not 0 <= low < high:
            raise UsageError(f"range is {low}-{high}; it is FIRST-LAST with 0 <= FIRST < LAST, such as 10-210")
        if self.negatives < 1:
            raise UsageError(f"negatives is {self.negatives}; it must be at least 1")
        for name in ("margin", "veto_above", "veto_margin"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise UsageError(f"{name} is {value}; it must be a finite number")
        for name in ("max_share", "near_duplicate"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise UsageError(f"{name} is {value}; it must be above 0 and at most 1")
        if self.fill_random and self.write_scores:
            raise UsageError("fill_random adds texts without a score: leave out one of fill_random and write_scores")

    def _check_choices(self) -> None:
        for name, kind in (("fusion", Fusion), ("sampling", Sampling), ("vectors", Precision)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise UsageError(f"{name} is '{value}'; it must be {' or '.join(known)}{did_you_mean(value, known)}")

    def limit(self, positive: float) -> float:
        """The highest score that a negative may have beside a positive with this score."""
        limits = [math.inf]
        if self.margin is not None:
            limits.append(positive - self.margin)
        if self.max_share is not None:  # of a score below 0, a share lies further below
            limits.append(positive - (1 - self.max_share) * abs(positive))
        return min(limits)
