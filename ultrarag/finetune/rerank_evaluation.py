"""Evaluation of a cross-encoder on held-out data: the order in which it puts each query's own candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ultrarag.encoder import Encoder
from ultrarag.errors import DataError, UsageError
from ultrarag.finetune.distributed import rank, world_size
from ultrarag.finetune.evaluation import METRIC, METRICS
from ultrarag.report.measured import Evaluation, Measured, Verdict, evaluate_run
from ultrarag.types import Passage


@dataclass
class RerankEvaluator:
    """Held-out queries with their candidates, and which of these are relevant."""

    #: query -> its distinct candidates, the relevant ones first
    candidates: dict[str, list[str]]
    #: query -> how many of the first candidates are relevant
    relevant: dict[str, int]
    query_max_length: int | None = None
    max_length: int | None = None

    def __call__(self, encoder: Encoder, heads: tuple[str, ...]) -> dict[str, float]:
        """Return nDCG@10, Recall@10 and MRR@10."""
        return self.evaluate(encoder, heads).metrics

    def evaluate(self, encoder: Encoder, heads: tuple[str, ...]) -> Evaluation:
        """Measure the candidates in the order of the scores.

        In a distributed run every rank scores its share of the pairs.
        """
        pairs = [(query, text) for query, texts in self.candidates.items() for text in texts]
        scores = iter(self._score(encoder, pairs).tolist())
        # of equal scores the last id counts as first: a model that scores all alike must not look good
        run = {f"q{number}": {id: next(scores) for id in texts} for number, texts in enumerate(self._ids())}
        best_first = {
            query: dict(sorted(found.items(), key=lambda hit: (hit[1], hit[0]), reverse=True))
            for query, found in run.items()
        }
        return evaluate_run(self._qrels(), best_first, METRICS)

    def measured(self, before: Evaluation, after: Evaluation) -> Measured:
        """Two evaluations compared, with the texts that a reader wants to see."""
        queries = {f"q{number}": query for number, query in enumerate(self.candidates)}
        texts = {id: text for named in self._ids() for id, text in named.items()}

        def passages(ids: list[str]) -> dict[str, Passage]:
            return {id: Passage(id, texts[id]) for id in ids}

        where = f"{len(queries)} queries, each with its own candidates"
        return Measured.of(Verdict.of(METRIC, before, after), queries, self._qrels(), where, passages)

    def _ids(self) -> list[dict[str, str]]:
        """Per query, an id for each candidate: id -> text; the relevant ones first."""
        return [
            {f"q{number}-p{place:06d}": text for place, text in enumerate(texts)}
            for number, texts in enumerate(self.candidates.values())
        ]

    def _qrels(self) -> dict[str, dict[str, int]]:
        return {
            f"q{number}": dict.fromkeys(list(ids)[: self.relevant[query]], 1)
            for number, (query, ids) in enumerate(zip(self.candidates, self._ids(), strict=True))
        }

    def _score(self, encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        limits: dict[str, Any] = {"query_max_length": self.query_max_length, "max_length": self.max_length}
        mine = encoder.score(pairs[rank() :: world_size()], **limits)
        if world_size() == 1:
            return mine
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, mine)
        scores = np.empty(len(pairs), dtype=np.float32)
        for number, part in enumerate(parts):
            scores[number :: world_size()] = part
        return scores


def read_rerank_evaluator(
    eval_data: str | Sequence[Any],
    query_max_length: int | None,
    max_length: int | None,
    name: str = "eval_data",
) -> RerankEvaluator:
    """Read rows like the training data's: a query's candidates are its `pos` and `neg`.

    Args:
        name: the flag that gave it.

    Raises:
        DataError: no query has a negative, or a line cannot be read.
        UsageError: a folder in BEIR's layout, which has no candidates.
    """
    from ultrarag.finetune.rows import read_rows

    if isinstance(eval_data, str) and (Path(eval_data) / "corpus.jsonl").is_file():
        raise UsageError(
            f"--{name} {eval_data} is a corpus with queries; a cross-encoder orders candidates that a search has "
            "found: give rows with 'pos' and 'neg', such as mined hard negatives"
        )
    positives: dict[str, dict[str, None]] = {}
    negatives: dict[str, dict[str, None]] = {}
    for example in read_rows([eval_data] if isinstance(eval_data, str) else list(eval_data)):
        positives.setdefault(example.query, {}).update(dict.fromkeys(example.pos))
        negatives.setdefault(example.query, {}).update(dict.fromkeys(example.neg))
    candidates = {
        query: [*texts, *(text for text in negatives[query] if text not in texts)] for query, texts in positives.items()
    }
    useful = {query: texts for query, texts in candidates.items() if len(texts) > len(positives[query])}
    if not useful:
        raise DataError(f"{name} has no query with 'neg': a cross-encoder is measured by how it orders candidates")
    return RerankEvaluator(useful, {query: len(positives[query]) for query in useful}, query_max_length, max_length)
