"""Evaluation of an encoder on held-out data, before, during and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ultrarag.encoder import BATCH_TOKENS, Encoder
from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation import Evaluation, Measured, Verdict, evaluate_run, read_beir, run_of, top_k
from ultrarag.finetune.step import rank, world_size
from ultrarag.io import progress_bar
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
    #: leave out the passage whose id is the query's own, unless it is judged relevant
    ignore_identical_ids: bool = False
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
        scores, rows = _search(encoder, query, passage, head, _DEPTH + self.ignore_identical_ids)
        run = run_of(self.judged, passages, scores, rows)
        return evaluate_run(self._qrels(), run, metrics, ignore_identical_ids=self.ignore_identical_ids)

    def measured(self, before: Evaluation, after: Evaluation) -> Measured:
        """Two evaluations compared, with the texts that a reader wants to see."""

        def passages(ids: list[str]) -> dict[str, Passage]:
            return {id: Passage(id, self.corpus[id]) for id in ids if id in self.corpus}

        where = f"{len(self.judged)} queries on the {len(self.corpus)} passages of the evaluation data"
        return Measured.of(Verdict.of(METRIC, before, after), self.queries, self._qrels(), where, passages)

    @property
    def judged(self) -> list[str]:
        """The queries for which something is judged."""
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


def _search(
    encoder: Encoder, query: Embeddings, passage: Embeddings, head: str, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    if head == "dense":
        return top_k(query.dense, passage.dense, depth)
    scores = encoder.similarity(query, passage, weights={head: 1.0})
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
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
    from ultrarag.rows import read_eval_rows

    if isinstance(eval_data, str) and (Path(eval_data) / "corpus.jsonl").is_file():
        folder = Path(eval_data)
        collection = read_beir(folder, _split(folder))
        corpus = {key: passage.content for key, passage in collection.corpus.items()}
        queries, qrels = collection.queries, collection.qrels
    else:
        sources = [eval_data] if isinstance(eval_data, str) else list(eval_data)
        corpus, queries, qrels = read_eval_rows(sources)
    if not any(grade > 0 for key in queries for grade in qrels.get(key, {}).values()):
        given = f" {eval_data}" if isinstance(eval_data, str) else ""
        raise DataError(f"{name}{given} has no query with a relevant passage")
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
    from ultrarag.rows import read_rows

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


AnyEvaluator = Evaluator | RerankEvaluator
#: Before the name of a stage: measured on the guard.
GUARD = "guard_"


@dataclass
class Measures:
    """Evaluations by stage: before, after, unmerged, and the same on the guard."""

    domain: AnyEvaluator | None = None
    guard: AnyEvaluator | None = None
    found: dict[str, Evaluation] = field(default_factory=dict)

    def take(self, stage: str, encoder: Encoder, heads: tuple[str, ...]) -> None:
        """Measure a model on all there is."""
        for prefix, evaluator in (("", self.domain), (GUARD, self.guard)):
            if evaluator:
                self.found[prefix + stage] = evaluator.evaluate(encoder, heads)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Stage -> metric -> value."""
        return {stage: dict(evaluation.metrics) for stage, evaluation in self.found.items()}

    def measured(self) -> Measured | None:
        """The domain before and after, with texts; None where nothing was evaluated."""
        if self.domain is None:
            return None
        return self.domain.measured(self.found["before"], self.found["after"])

    def warn(self, max_forgetting: float, note: Callable[[str], None]) -> None:
        """Say what got worse, and what the numbers leave out."""
        for prefix, evaluator in (("", self.domain), (GUARD, self.guard)):
            if evaluator and f"{prefix}after" in self.found:
                self._warn_of_data(prefix, note)
        change = self._change("")
        if change < 0:
            before, after = (self.found[stage].metrics[METRIC] for stage in ("before", "after"))
            note(
                f"the model is worse than before on the evaluation data: {METRIC} {before:.4f} -> {after:.4f}; "
                "do not deploy it unseen"
            )
        forgotten = -self._change(GUARD)
        if forgotten > max_forgetting + 1e-9:
            note(
                f"the model lost {forgotten:.4f} of {METRIC} on the guard data, more than --max_forgetting "
                f"{max_forgetting:g}; --merge_with parent, or --replay_data, keeps more of what it knew"
            )

    def _warn_of_data(self, prefix: str, note: Callable[[str], None]) -> None:
        name = "guard data" if prefix else "evaluation data"
        for found in self.found[f"{prefix}after"].notes:
            note(f"{name}: {found}")
        if all(self.found[prefix + stage].metrics[METRIC] == 0 for stage in ("before", "after")):
            note(f"{name}: {METRIC} is 0 before and after, which judges neither model: is it about these passages?")

    def _change(self, prefix: str) -> float:
        if f"{prefix}before" not in self.found:
            return 0.0
        before, after = (self.found[prefix + stage].metrics[METRIC] for stage in ("before", "after"))
        return after - before
