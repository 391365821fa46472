"""Evaluation of an encoder on held-out data, before, during and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from ultrarag.encoder import BATCH_TOKENS, Encoder
from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation import (
    DEFAULT_METRICS,
    MAIN_METRIC,
    Evaluation,
    Measured,
    Verdict,
    deepest,
    evaluate_run,
    passages_of,
    read_beir,
    run_of,
    top_k,
)
from ultrarag.finetune.batches import PairLengths
from ultrarag.finetune.step import encode_by_ranks, rank, world_size
from ultrarag.io import progress_bar
from ultrarag.types import Embeddings, Kind, Passage, Tokens

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments


# ---- what is measured


@dataclass
class HeldOut:
    """Held-out queries, the passages that may answer them, and which of these are relevant; subclasses search."""

    #: passage id -> text
    corpus: Mapping[str, str]
    #: query id -> text
    queries: Mapping[str, str]
    #: query id -> passage id -> relevance
    qrels: Mapping[str, Mapping[str, int]]
    #: leave out the passage whose id is the query's own, unless it is judged relevant
    ignore_identical_ids: bool = field(default=False, kw_only=True)

    def search(self, encoder: Encoder, heads: tuple[str, ...], depth: int) -> dict[str, dict[str, float]]:
        """The best passages of each judged query: query id -> passage id -> score, best first."""
        raise NotImplementedError

    def __call__(self, encoder: Encoder, heads: tuple[str, ...]) -> dict[str, float]:
        """Return the default metrics."""
        return self.evaluate(encoder, heads).metrics

    def evaluate(
        self, encoder: Encoder, heads: tuple[str, ...], metrics: Sequence[str] = DEFAULT_METRICS
    ) -> Evaluation:
        """Search, and compare what is found with the qrels; in a distributed run every rank encodes its share."""
        run = self.search(encoder, heads, deepest(metrics) + self.ignore_identical_ids)
        return evaluate_run(self._judgements(), run, metrics, ignore_identical_ids=self.ignore_identical_ids)

    def measured(self, before: Evaluation, after: Evaluation) -> Measured:
        """Two evaluations compared, with the texts that a reader wants to see."""
        verdict = Verdict.of(MAIN_METRIC, before, after)
        return Measured.of(verdict, self.queries, self._judgements(), self.where, passages_of(self.corpus))

    @property
    def judged(self) -> list[str]:
        """The queries for which something is judged."""
        return [key for key in self.queries if self.qrels.get(key)]

    @property
    def where(self) -> str:
        """What was searched, in words."""
        return f"{len(self.judged)} queries on the {len(self.corpus)} passages of the evaluation data"

    def _judgements(self) -> dict[str, dict[str, int]]:
        return {key: dict(self.qrels[key]) for key in self.judged}


@dataclass
class Evaluator(HeldOut):
    """Searches the whole corpus exactly, with the dense head, or else the first of the heads."""

    query_max_length: int | None = None
    passage_max_length: int | None = None
    #: tokenize once and keep the token ids, for many evaluations of one model in memory
    keep_tokens: bool = False
    #: id -> the passage as an encoder is given it, where that is not its text in the corpus
    titled: dict[str, Passage] = field(default_factory=dict)
    #: reads passages in place of the encoder, for some head: the passage side is frozen, and these are its vectors
    stored: Callable[[Encoder, Sequence[str | Passage], str], Embeddings] | None = field(default=None, repr=False)
    _tokens: dict[Kind, Tokens] = field(default_factory=dict, repr=False)

    def search(self, encoder: Encoder, heads: tuple[str, ...], depth: int) -> dict[str, dict[str, float]]:
        """The best passages of each judged query, best first."""
        head = "dense" if "dense" in heads else heads[0]
        query = self._encode(encoder, [self.queries[key] for key in self.judged], "query", head)
        passage = self._encode(
            encoder, [self.titled.get(id, text) for id, text in self.corpus.items()], "passage", head
        )
        if head == "dense":
            scores, rows = top_k(query.dense, passage.dense, depth)
        else:
            scores = encoder.similarity(query, passage, weights={head: 1.0})
            rows = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
            scores = np.take_along_axis(scores, rows, axis=1)
        return run_of(self.judged, list(self.corpus), scores, rows)

    def _encode(self, encoder: Encoder, texts: Sequence[str | Passage], kind: Kind, head: str) -> Embeddings:
        if kind == "passage" and self.stored:
            return self.stored(encoder, texts, head)

        def encode(mine: list[str | Passage]) -> Embeddings:
            part = self._encode_kept(encoder, mine, kind, head) if self.keep_tokens else None
            return part or encoder.encode(mine, kind, heads=(head,), max_length=self._limit(kind))

        return encode_by_ranks(texts, encode)

    def _encode_kept(self, encoder: Encoder, texts: list[str | Passage], kind: Kind, head: str) -> Embeddings | None:
        if not texts:
            return None
        if kind not in self._tokens:
            self._tokens[kind] = encoder.tokenize(texts, kind, self._limit(kind))
        budget = BATCH_TOKENS.get(encoder.device.type, BATCH_TOKENS["cuda"])
        with progress_bar(len(texts), "encode", "text") as bar:
            return encoder.encode_tokens(self._tokens[kind], (head,), budget, on_batch=bar.update)

    def _limit(self, kind: Kind) -> int | None:
        return self.query_max_length if kind == "query" else self.passage_max_length


@dataclass
class RerankEvaluator(HeldOut):
    """Orders each query's own candidates by the scores of a cross-encoder."""

    #: query id -> ids of its distinct candidates, the relevant ones first
    candidates: dict[str, list[str]] = field(default_factory=dict)
    lengths: PairLengths | None = None

    def search(self, encoder: Encoder, heads: tuple[str, ...], depth: int) -> dict[str, dict[str, float]]:
        """All candidates of each query, best first."""
        pairs = [(self.queries[key], self.corpus[id]) for key, ids in self.candidates.items() for id in ids]
        scores = iter(self._score(encoder, pairs).tolist())
        run = {key: {id: next(scores) for id in ids} for key, ids in self.candidates.items()}
        # of equal scores the last id counts as first: a model that scores all alike must not look good
        return {
            key: dict(sorted(found.items(), key=lambda hit: (hit[1], hit[0]), reverse=True))
            for key, found in run.items()
        }

    @property
    def where(self) -> str:
        """What was searched, in words."""
        return f"{len(self.candidates)} queries, each with its own candidates"

    def _score(self, encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        query, pair = (self.lengths.query, self.lengths.pair) if self.lengths else (None, None)
        mine = encoder.score(pairs[rank() :: world_size()], query_max_length=query, max_length=pair)
        if world_size() == 1:
            return mine
        scores = np.empty(len(pairs), dtype=np.float32)
        for number, part in enumerate(_of_all_ranks(mine)):
            scores[number :: world_size()] = part
        return scores


def _of_all_ranks(part: Any) -> list[Any]:
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


# ---- reading it


def read_evaluator(
    eval_data: str | Sequence[Any],
    query_max_length: int | None = None,
    passage_max_length: int | None = None,
    name: str = "eval_data",
) -> Evaluator:
    """Read rows like the training data's, or a folder in BEIR's layout.

    Args:
        name: the flag that gave it.

    Raises:
        DataError: nothing to evaluate on, or a line that cannot be read.
    """
    from ultrarag.rows import read_eval_rows

    if _is_beir(eval_data):
        folder = Path(str(eval_data))
        collection = read_beir(folder, _split(folder))
        corpus = {key: passage.content for key, passage in collection.corpus.items()}
        titled = {key: passage for key, passage in collection.corpus.items() if passage.title}
        queries, qrels = collection.queries, collection.qrels
    else:
        corpus, queries, qrels = read_eval_rows(_sources(eval_data))
        titled = {}
    if not any(grade > 0 for key in queries for grade in qrels.get(key, {}).values()):
        given = f" {eval_data}" if isinstance(eval_data, str) else ""
        raise DataError(f"{name}{given} has no query with a relevant passage")
    return Evaluator(corpus, queries, qrels, query_max_length, passage_max_length, titled=titled)


def read_rerank_evaluator(
    eval_data: str | Sequence[Any], lengths: PairLengths | None = None, name: str = "eval_data"
) -> RerankEvaluator:
    """Read rows like the training data's: a query's candidates are its `pos` and `neg`.

    Args:
        name: the flag that gave it.

    Raises:
        DataError: no query has a negative, or a line cannot be read.
        UsageError: a folder in BEIR's layout, which has no candidates.
    """
    from ultrarag.rows import read_rows

    if _is_beir(eval_data):
        raise UsageError(
            f"--{name} {eval_data} is a corpus with queries; a cross-encoder orders candidates that a search has "
            "found: give rows with 'pos' and 'neg', such as mined hard negatives"
        )
    positives: dict[str, dict[str, None]] = {}
    negatives: dict[str, dict[str, None]] = {}
    for example in read_rows(_sources(eval_data)):
        positives.setdefault(example.query, {}).update(dict.fromkeys(example.pos))
        negatives.setdefault(example.query, {}).update(dict.fromkeys(example.neg))
    useful = [query for query, texts in positives.items() if negatives[query].keys() - texts.keys()]
    if not useful:
        raise DataError(f"{name} has no query with 'neg': a cross-encoder is measured by how it orders candidates")
    corpus: dict[str, str] = {}
    candidates: dict[str, list[str]] = {}
    for number, query in enumerate(useful):
        texts = [*positives[query], *(text for text in negatives[query] if text not in positives[query])]
        candidates[f"q{number}"] = ids = [f"q{number}-p{place:06d}" for place in range(len(texts))]
        corpus.update(zip(ids, texts, strict=True))
    queries = dict(zip(candidates, useful, strict=True))
    qrels = {key: dict.fromkeys(candidates[key][: len(positives[query])], 1) for key, query in queries.items()}
    return RerankEvaluator(corpus, queries, qrels, candidates, lengths)


def _is_beir(eval_data: str | Sequence[Any]) -> bool:
    return isinstance(eval_data, str) and (Path(eval_data) / "corpus.jsonl").is_file()


def _sources(eval_data: str | Sequence[Any]) -> list[Any]:
    return [eval_data] if isinstance(eval_data, str) else list(eval_data)


def _split(folder: Path) -> str:
    """The split to evaluate on: test, else dev, else the only one."""
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    for name in ("test", "dev", "validation"):
        if name in splits:
            return name
    if len(splits) == 1:
        return splits[0]
    raise DataError(f"{folder / 'qrels'} has no test.tsv or dev.tsv (it has {', '.join(splits) or 'nothing'})")


# ---- the evaluations of a run

#: Before the name of a stage: measured on the guard.
GUARD = "guard_"


@dataclass
class Measures:
    """Evaluations by stage: before, after, unmerged, and the same on the guard."""

    domain: HeldOut | None = None
    guard: HeldOut | None = None
    found: dict[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: FinetuneArguments, pairs: bool) -> Measures:
        """Read the held-out data of a run.

        Args:
            pairs: what is trained is a cross-encoder.

        Raises:
            DataError, UsageError: it cannot be evaluated on.
        """

        def read(name: str, source: Any) -> HeldOut | None:
            if source is None:
                return None
            data = arguments.data
            if pairs:
                if arguments.evaluation.ignore_identical_ids:
                    raise UsageError("ignore_identical_ids is for embedders: a cross-encoder orders given candidates")
                return read_rerank_evaluator(source, PairLengths.of(data), name)
            found = read_evaluator(source, data.query_max_len, data.passage_max_len, name)
            found.keep_tokens = arguments.incremental.merge_with is not None
            found.ignore_identical_ids = arguments.evaluation.ignore_identical_ids
            return found

        domain = read("eval_data", arguments.evaluation.eval_data)
        return cls(domain, read("guard_data", arguments.incremental.guard_data))

    def take(self, stage: str, encoder: Encoder, heads: tuple[str, ...]) -> None:
        """Measure a model on all there is."""
        for prefix, held_out in (("", self.domain), (GUARD, self.guard)):
            if held_out:
                self.found[prefix + stage] = held_out.evaluate(encoder, heads)

    def keep_passages(self, stored: Callable[[Encoder, Sequence[str | Passage], str], Embeddings]) -> None:
        """Have passages read from where they are stored, since their side is not trained."""
        for held_out in (self.domain, self.guard):
            if isinstance(held_out, Evaluator):
                held_out.stored = stored

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Stage -> metric -> value."""
        return {stage: dict(evaluation.metrics) for stage, evaluation in self.found.items()}

    def warn(self, max_forgetting: float, note: Callable[[str], None]) -> None:
        """Note what got worse, and what the numbers leave out."""
        for prefix, held_out in (("", self.domain), (GUARD, self.guard)):
            if held_out and f"{prefix}after" in self.found:
                self._warn_of_data(prefix, note)
        if self._change("") < 0:
            before, after = (self.found[stage].metrics[MAIN_METRIC] for stage in ("before", "after"))
            note(
                f"the model is worse than before on the evaluation data: {MAIN_METRIC} {before:.4f} -> {after:.4f}; "
                "do not deploy it unseen"
            )
        forgotten = -self._change(GUARD)
        if forgotten > max_forgetting + 1e-9:
            note(
                f"the model lost {forgotten:.4f} of {MAIN_METRIC} on the guard data, more than --max_forgetting "
                f"{max_forgetting:g}; --merge_with parent, or --replay_data, keeps more of what it knew"
            )

    def _warn_of_data(self, prefix: str, note: Callable[[str], None]) -> None:
        name = "guard data" if prefix else "evaluation data"
        for found in self.found[f"{prefix}after"].notes:
            note(f"{name}: {found}")
        if all(self.found[prefix + stage].metrics[MAIN_METRIC] == 0 for stage in ("before", "after")):
            note(
                f"{name}: {MAIN_METRIC} is 0 before and after, which judges neither model: is it about these passages?"
            )

    def _change(self, prefix: str) -> float:
        if f"{prefix}before" not in self.found:
            return 0.0
        before, after = (self.found[prefix + stage].metrics[MAIN_METRIC] for stage in ("before", "after"))
        return after - before
