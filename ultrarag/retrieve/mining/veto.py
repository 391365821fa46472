"""RerankerVeto: a reranker reads the candidates that were drawn, and refuses those that answer the query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultrarag.errors import DataError
from ultrarag.retrieve.mining.choice import Job

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


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
