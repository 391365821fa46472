"""Choosing negatives: the settings, which candidates may be one, in what order, and why others are not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.mining.pool import without_title
from ultrarag.mining.search import Found
from ultrarag.rows.checks import leak_key, nearly_same, shingles
from ultrarag.types import head_weights

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


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


#: Why a candidate in the range is no negative, in the order in which they are asked; the first that holds counts.
REASONS = {
    "positive": "is a positive of the query, in this row or another",
    "query": "is the query itself",
    "margin": "scores too close to the positive, or above it",
    "near_duplicate": "is nearly the same text as a positive",
    "reranker": "the reranker thinks that it answers the query",
    "not_drawn": "could be a negative, but enough were drawn",
}

Veto = Callable[[Sequence["tuple[Job, int]"]], Sequence[bool]]


@dataclass
class Job:
    """One row's choice while it is being made."""

    query: str
    positives: list[str]
    #: candidates in the range, best first
    found: Found
    #: numbers of texts that are positives of this query anywhere
    forbidden: np.ndarray
    #: numbers of texts that are the query, with a title or without one
    query_numbers: np.ndarray
    settings: MiningSettings
    random: np.random.Generator
    read: Callable[[int], str]
    chosen: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    #: the reranker's score of each text that it saw, by number
    judged: dict[int, float] = field(default_factory=dict)
    #: the reranker's scores of the positives
    positives_judged: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting = iter(self._order(self._open()))
        self._looked_at = 0

    @property
    def lacking(self) -> int:
        """Negatives still to be found."""
        return self.settings.negatives - len(self.chosen)

    @cached_property
    def score_of(self) -> dict[int, float]:
        """The search's score of each candidate."""
        return dict(zip(self.found.numbers.tolist(), self.found.scores.tolist(), strict=True))

    @property
    def positive_score(self) -> float:
        """The search's score of the lowest positive."""
        return float(self.found.positive_scores.min())

    def draw(self) -> Iterator[int]:
        """Yield the next candidates, as many as are lacking, passing over near-duplicates of positives."""
        wanted = self.lacking
        while wanted > 0 and (number := next(self._waiting, None)) is not None:
            self._looked_at += 1
            if self._nearly_positive(self.read(number)):
                self.counts["near_duplicate"] += 1
            else:
                wanted -= 1
                yield number

    def finish(self) -> None:
        """Count what was not needed."""
        self.counts["not_drawn"] = len(self._drawable) - self._looked_at
        self.counts["chosen"] = len(self.chosen)

    def _open(self) -> np.ndarray:
        """Numbers of candidates that may be drawn; the others are counted."""
        numbers, scores = self.found.numbers, self.found.scores
        positive = np.isin(numbers, self.forbidden)
        query = ~positive & np.isin(numbers, self.query_numbers)
        close = ~positive & ~query & (scores > self.settings.limit(self.positive_score))
        for reason, refused in (("positive", positive), ("query", query), ("margin", close)):
            self.counts[reason] = int(refused.sum())
        self.counts["candidates"] = len(numbers)
        self._drawable = numbers[~(positive | query | close)]
        return self._drawable

    def _order(self, numbers: np.ndarray) -> list[int]:
        ordered = numbers if self.settings.sampling == "hardest" else self.random.permutation(numbers)
        return [int(number) for number in ordered]

    def _nearly_positive(self, text: str) -> bool:
        if not self._same_words.isdisjoint(map(leak_key, (text, without_title(text)))):
            return True
        least = self.settings.near_duplicate
        if least is None:
            return False
        mine = {shingles(text), shingles(without_title(text))}
        return any(nearly_same(one, theirs, least) for one in mine for theirs in self._shingles)

    @cached_property
    def _same_words(self) -> set[int]:
        """A positive joined with its title by ". " or ": " has no line to tell where the title ends, but its words."""
        return {leak_key(part) for text in self.positives for part in (text, without_title(text))}

    @cached_property
    def _shingles(self) -> set[frozenset[object]]:
        return {shingles(part) for text in self.positives for part in (text, without_title(text))}


def choose(jobs: Sequence[Job], veto: Veto | None = None) -> None:
    """Draw each job's negatives; what the veto refuses is replaced by the next candidates, while there are any."""
    waiting = list(jobs)
    while waiting:
        drawn = [(job, number) for job in waiting for number in job.draw()]
        refused = veto(drawn) if veto and drawn else [False] * len(drawn)
        for (job, number), no in zip(drawn, refused, strict=True):
            if no:
                job.counts["reranker"] += 1
            else:
                job.chosen.append(number)
        more = {id(job) for job, _ in drawn}
        waiting = [job for job in waiting if job.lacking and id(job) in more]
    for job in jobs:
        job.finish()


def fill(job: Job, pool: int) -> None:
    """Add random texts of the pool until there are enough, or 20 draws in a row find nothing new."""
    misses = 0
    while job.lacking > 0 and misses < 20:
        number = int(job.random.integers(pool))
        held = number in job.chosen or number in job.forbidden or number in job.query_numbers
        if held or job._nearly_positive(job.read(number)):
            misses += 1
            continue
        misses = 0
        job.chosen.append(number)
        job.counts["filled"] += 1


class RerankerVeto:
    """Refuses a candidate whose score is above a threshold, or too near to the lowest positive's."""

    def __init__(
        self, reranker: Encoder, above: float | None = None, margin: float | None = None, **options: Any
    ) -> None:
        self.reranker, self.above, self.margin, self.options = reranker, above, margin, options

    def __call__(self, drawn: Sequence[tuple[Job, int]]) -> list[bool]:
        """Score what was drawn; say what is refused."""
        self.judge_positives([job for job, _ in drawn])
        scores = self._scores([(job.query, job.read(number)) for job, number in drawn])
        for (job, number), score in zip(drawn, scores, strict=True):
            job.judged[number] = score
        return [job.judged[number] > self._limit(job) for job, number in drawn]

    def judge_positives(self, jobs: Sequence[Job]) -> None:
        """Score the positives of jobs whose positives have no score yet."""
        fresh = list({id(job): job for job in jobs if not job.positives_judged}.values())
        scores = iter(self._scores([(job.query, text) for job in fresh for text in job.positives]))
        for job in fresh:
            job.positives_judged = [next(scores) for _ in job.positives]

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        scores = [float(score) for score in self.reranker.score(pairs, progress=False, **self.options)]
        if bad := next((pair for pair, score in zip(pairs, scores, strict=True) if math.isnan(score)), None):
            raise DataError(f"the reranker's score of query {bad[0]!r:.60} and {bad[1]!r:.60} is not a number")
        return scores

    def _limit(self, job: Job) -> float:
        limits = [math.inf if self.above is None else self.above]
        if self.margin is not None:
            limits.append(min(job.positives_judged) - self.margin)
        return min(limits)
