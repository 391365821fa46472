"""Evaluation of a cross-encoder on held-out data: the order in which it puts each query's own candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ultrarag import ir
from ultrarag.encoder import Encoder
from ultrarag.errors import DataError, UsageError
from ultrarag.finetune.distributed import rank, world_size
from ultrarag.finetune.evaluation import METRICS


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
        """Return nDCG@10, Recall@10 and MRR@10 of the candidates in the order of the scores.

        In a distributed run every rank scores its share of the pairs.
        """
        pairs = [(query, text) for query, texts in self.candidates.items() for text in texts]
        scores = self._score(encoder, pairs)
        run: dict[str, dict[str, float]] = {}
        qrels: dict[str, dict[str, int]] = {}
        start = 0
        for number, (query, texts) in enumerate(self.candidates.items()):
            # of equal scores the last id counts as first: a model that scores all alike must not look good
            run[f"q{number}"] = {f"p{place:06d}": float(scores[start + place]) for place in range(len(texts))}
            qrels[f"q{number}"] = {f"p{place:06d}": 1 for place in range(self.relevant[query])}
            start += len(texts)
        return ir.metrics(qrels, run, METRICS)

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
    eval_data: str | Sequence[Any], query_max_length: int | None, max_length: int | None
) -> RerankEvaluator:
    """Read rows like the training data's: a query's candidates are its `pos` and `neg`.

    Raises:
        DataError: no query has a negative, or a line cannot be read.
        UsageError: a folder in BEIR's layout, which has no candidates.
    """
    from ultrarag.finetune.rows import read_rows

    if isinstance(eval_data, str) and (Path(eval_data) / "corpus.jsonl").is_file():
        raise UsageError(
            f"--eval_data {eval_data} is a corpus with queries; a cross-encoder orders candidates that a search has "
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
        raise DataError("eval_data has no query with 'neg': a cross-encoder is measured by how it orders candidates")
    return RerankEvaluator(useful, {query: len(positives[query]) for query in useful}, query_max_length, max_length)
