"""The judgement of int8: ranking by each head, beside float32, for each pair of precisions that may be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ultrarag.encoder import Encoder
from ultrarag.encoder.engines import INT8, Pair
from ultrarag.evaluation import Collection, Evaluation, Verdict, evaluate_run, run_of, top_k
from ultrarag.types import Embeddings, Kind

#: (passages, queries): the first decides whether int8 is published, all of them which pairs may be searched.
PAIRS = ((INT8, INT8), ("fp32", INT8), (INT8, "fp32"))
DEPTH = 100
#: Passages compared with all queries at a time, where the head is not dense.
BLOCK = 256


@dataclass(frozen=True)
class Terms:
    """What an int8 model is judged by."""

    tolerance: float = 0.005
    metric: str = "nDCG@10"


def judge(float32: Encoder, int8: Encoder, collection: Collection, terms: Terms) -> list[Pair]:
    """Measure each pair of precisions, head by head; each side is encoded once per precision."""
    found = []
    for head in float32.heads:
        evaluate = _evaluations({"fp32": float32, INT8: int8}, collection, head, terms.metric)
        before = evaluate("fp32", "fp32")
        for passages, queries in PAIRS:
            verdict = Verdict.of(terms.metric, before, evaluate(passages, queries))
            found.append(_pair(passages, queries, head, verdict, terms))
    return found


def _evaluations(
    encoders: dict[str, Encoder], collection: Collection, head: str, metric: str
) -> Callable[[str, str], Evaluation]:
    """What evaluates passages in one precision and queries in another."""
    texts = [passage.encodable for passage in collection.corpus.values()]
    queries = list(collection.queries.values())

    def encoded(kind: Kind) -> dict[str, Embeddings]:
        given = queries if kind == "query" else texts
        return {name: encoder.encode(given, kind, heads=(head,)) for name, encoder in encoders.items()}

    sides: dict[str, dict[str, Embeddings]] = {kind: encoded(kind) for kind in ("passage", "query")}
    names = list(collection.queries), list(collection.corpus)

    def evaluate(passages: str, queries: str) -> Evaluation:
        search = _by_vectors if head == "dense" else partial(_by_scores, encoders["fp32"], head)
        scores, rows = search(sides["query"][queries], sides["passage"][passages])
        return evaluate_run(collection.qrels, run_of(*names, scores, rows), [metric])

    return evaluate


def _by_vectors(queries: Embeddings, passages: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    return top_k(queries.dense, passages.dense, DEPTH)


def _by_scores(encoder: Encoder, head: str, queries: Embeddings, passages: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """By the scores of another head: those of each block of passages."""

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(passages), BLOCK):
            yield encoder.similarity(queries, passages[start : start + BLOCK], weights={head: 1.0})

    scores = np.concatenate(list(blocks()), axis=1)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return np.take_along_axis(scores, rows, axis=1), rows


def _pair(passages: str, queries: str, head: str, verdict: Verdict, terms: Terms) -> Pair:
    change = verdict.change
    return Pair(
        passages,
        queries,
        head,
        verdict.metric,
        verdict.old,
        verdict.new,
        change.low,
        change.high,
        change.p_value,
        change.queries,
        accepted=not verdict.judges_nothing and not (verdict.worse and -change.difference > terms.tolerance),
    )


def in_words(pair: Pair) -> str:
    """One line of what was measured."""
    return (
        f"{pair.head}, passages in {pair.passages}, queries in {pair.queries}: {pair.metric} {pair.float32:.4f} -> "
        f"{pair.found:.4f}: {pair.found - pair.float32:+.4f} (95 % interval {pair.low:+.4f} to {pair.high:+.4f}, "
        f"p = {pair.p_value:.4f}, {pair.judged} queries){'' if pair.accepted else ': too much is lost'}"
    )
