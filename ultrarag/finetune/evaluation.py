"""Evaluation of an encoder on held-out data, before, during and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ultrarag import ir
from ultrarag.encoder import Encoder
from ultrarag.errors import DataError
from ultrarag.finetune.distributed import rank, world_size
from ultrarag.types import Embeddings, Kind

METRICS = ("nDCG@10", "Recall@10", "MRR@10")
_DEPTH = 10


@dataclass
class Evaluator:
    """Held-out queries, the corpus that they search, and what is relevant to them."""

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    query_max_length: int | None = None
    passage_max_length: int | None = None

    def __call__(self, encoder: Encoder, heads: tuple[str, ...]) -> dict[str, float]:
        """Return nDCG@10, Recall@10 and MRR@10 of exact search with the dense head, or else the first of `heads`.

        In a distributed run every rank encodes its share of the texts.
        """
        judged = [key for key in self.queries if self.qrels.get(key)]
        passages = list(self.corpus)
        head = "dense" if "dense" in heads else heads[0]
        query = self._encode(encoder, [self.queries[key] for key in judged], "query", head)
        passage = self._encode(encoder, [self.corpus[key] for key in passages], "passage", head)
        scores, rows = _search(encoder, query, passage, head)
        run = ir.run_of(judged, passages, scores, rows)
        return ir.metrics({key: dict(self.qrels[key]) for key in judged}, run, METRICS)

    def _encode(self, encoder: Encoder, texts: Sequence[str], kind: Kind, head: str) -> Embeddings:
        limit = self.query_max_length if kind == "query" else self.passage_max_length
        mine = list(texts[rank() :: world_size()])
        part = encoder.encode(mine, kind, heads=(head,), max_length=limit)
        if world_size() == 1:
            return part
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, part)
        order = np.argsort(np.concatenate([np.arange(r, len(texts), world_size()) for r in range(world_size())]))
        return Embeddings.cat(parts)[order]


def _search(encoder: Encoder, query: Embeddings, passage: Embeddings, head: str) -> tuple[np.ndarray, np.ndarray]:
    if head == "dense":
        return ir.top_k(query.dense, passage.dense, _DEPTH)
    scores = encoder.similarity(query, passage, weights={head: 1.0})
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :_DEPTH]
    return np.take_along_axis(scores, rows, axis=1), rows


def read_evaluator(
    eval_data: str | Sequence[Any], query_max_length: int | None, passage_max_length: int | None
) -> Evaluator:
    """Read rows like the training data's, or a folder in BEIR's layout.

    Raises:
        DataError: nothing to evaluate on, or a line that cannot be read.
    """
    from ultrarag.finetune.rows import read_eval_rows

    if isinstance(eval_data, str) and (Path(eval_data) / "corpus.jsonl").is_file():
        folder = Path(eval_data)
        collection = ir.read_beir(folder, _split(folder))
        corpus = {key: passage.content for key, passage in collection.corpus.items()}
        queries, qrels = collection.queries, collection.qrels
    else:
        sources = [eval_data] if isinstance(eval_data, str) else list(eval_data)
        corpus, queries, qrels = read_eval_rows(sources)
    if not any(qrels.get(key) for key in queries):
        raise DataError(f"eval_data {eval_data if isinstance(eval_data, str) else ''} has no query with a judgement")
    return Evaluator(corpus, queries, qrels, query_max_length, passage_max_length)


def _split(folder: Path) -> str:
    """The split to evaluate on: test, else dev, else the only one."""
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    for name in ("test", "dev", "validation"):
        if name in splits:
            return name
    if len(splits) == 1:
        return splits[0]
    raise DataError(f"{folder / 'qrels'} has no test.tsv or dev.tsv (it has {', '.join(splits) or 'nothing'})")
