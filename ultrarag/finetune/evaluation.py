"""Evaluation of an encoder on held-out data, before, during and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ultrarag import ir
from ultrarag.encoder import BATCH_TOKENS, Encoder
from ultrarag.errors import DataError
from ultrarag.finetune.distributed import rank, world_size
from ultrarag.progress import progress_bar
from ultrarag.report.measured import Evaluation, Measured, Verdict, evaluate_run
from ultrarag.types import Embeddings, Kind, Passage, Tokens

METRICS = ("nDCG@10", "Recall@10", "MRR@10")
#: The metric that decides.
METRIC = "nDCG@10"
_DEPTH = 10


@dataclass
class Evaluator:
    """Held-out queries, the corpus that they search, and what is relevant to them."""

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    query_max_length: int | None = None
    passage_max_length: int | None = None
    #: tokenize once and keep the token ids, for many evaluations of one model in memory
    keep_tokens: bool = False
    _tokens: dict[Kind, Tokens] = field(default_factory=dict, repr=False)

    def __call__(self, encoder: Encoder, heads: tuple[str, ...]) -> dict[str, float]:
        """Return nDCG@10, Recall@10 and MRR@10."""
        return self.evaluate(encoder, heads).metrics

    def evaluate(self, encoder: Encoder, heads: tuple[str, ...], metrics: Sequence[str] = METRICS) -> Evaluation:
        """Search exactly with the dense head, or else the first of `heads`.

        In a distributed run every rank encodes its share of the texts.
        """
        passages = list(self.corpus)
        head = "dense" if "dense" in heads else heads[0]
        query = self._encode(encoder, [self.queries[key] for key in self.judged], "query", head)
        passage = self._encode(encoder, [self.corpus[key] for key in passages], "passage", head)
        scores, rows = _search(encoder, query, passage, head)
        return evaluate_run(self._qrels(), ir.run_of(self.judged, passages, scores, rows), metrics)

    def measured(self, before: Evaluation, after: Evaluation) -> Measured:
        """Two evaluations compared, with the texts that a reader wants to see."""

        def passages(ids: list[str]) -> dict[str, Passage]:
            return {id: Passage(id, self.corpus[id]) for id in ids if id in self.corpus}

        where = f"{len(self.judged)} queries on the {len(self.corpus)} passages of the evaluation data"
        return Measured.of(Verdict.of(METRIC, before, after), self.queries, self._qrels(), where, passages)

    @property
    def judged(self) -> list[str]:
        """The queries for which something is relevant."""
        return [key for key in self.queries if self.qrels.get(key)]

    def _qrels(self) -> dict[str, dict[str, int]]:
        return {key: dict(self.qrels[key]) for key in self.judged}

    def _encode(self, encoder: Encoder, texts: Sequence[str], kind: Kind, head: str) -> Embeddings:
        mine = list(texts[rank() :: world_size()])
        part = self._encode_kept(encoder, mine, kind, head) if self.keep_tokens else None
        if part is None:
            part = encoder.encode(mine, kind, heads=(head,), max_length=self._limit(kind))
        if world_size() == 1:
            return part
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, part)
        order = np.argsort(np.concatenate([np.arange(r, len(texts), world_size()) for r in range(world_size())]))
        return Embeddings.cat(parts)[order]

    def _encode_kept(self, encoder: Encoder, texts: list[str], kind: Kind, head: str) -> Embeddings | None:
        if not texts:
            return None
        if kind not in self._tokens:
            self._tokens[kind] = encoder.tokenize(texts, kind, self._limit(kind))
        budget = BATCH_TOKENS.get(encoder.device.type, BATCH_TOKENS["cuda"])
        with progress_bar(len(texts), "encode", "text") as bar:
            return encoder.encode_tokens(self._tokens[kind], (head,), budget, on_batch=bar.update)

    def _limit(self, kind: Kind) -> int | None:
        return self.query_max_length if kind == "query" else self.passage_max_length


def _search(encoder: Encoder, query: Embeddings, passage: Embeddings, head: str) -> tuple[np.ndarray, np.ndarray]:
    if head == "dense":
        return ir.top_k(query.dense, passage.dense, _DEPTH)
    scores = encoder.similarity(query, passage, weights={head: 1.0})
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :_DEPTH]
    return np.take_along_axis(scores, rows, axis=1), rows


def read_evaluator(
    eval_data: str | Sequence[Any],
    query_max_length: int | None,
    passage_max_length: int | None,
    name: str = "eval_data",
) -> Evaluator:
    """Read rows like the training data's, or a folder in BEIR's layout.

    Args:
        name: the flag that gave it.

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
        raise DataError(f"{name} {eval_data if isinstance(eval_data, str) else ''} has no query with a judgement")
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
