"""By which queries a refresh is judged: those given, those of a BEIR folder, or rows with a corpus of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag import ir
from ultrarag.retrieve.evaluation import Evaluation
from ultrarag.retrieve.gate import Verdict
from ultrarag.types import Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder
    from ultrarag.retrieve.store import Store

#: A BEIR folder is about the index's passages when this share of its relevant ones have the same text there.
SAME_TEXT = 0.5
DEPTH = 10
#: Queries whose hits are shown: so many of those that gained most, and of those that lost most.
SHOWN = 5


@dataclass(frozen=True)
class Questions:
    """Queries, what is relevant to them, and where they are searched."""

    queries: Mapping[str, str]
    qrels: ir.Qrels
    #: the corpus to search, passage id -> text; None: the index itself
    corpus: Mapping[str, str] | None = None

    def __str__(self) -> str:
        where = "the index" if self.corpus is None else f"the {len(self.corpus)} passages of the evaluation data"
        return f"{len(self.qrels)} queries on {where}"


def questions(store: Store, gate: Any, eval_data: Any) -> Questions | None:
    """Return what the gate asks; None when there is nothing to ask, or nothing shall be asked.

    Args:
        gate: (queries, qrels); or True for those of `eval_data`; or False for none.

    Raises:
        DataError: when `eval_data` cannot be used.
    """
    if gate is False or (gate is True and eval_data is None):
        return None
    if gate is not True:
        queries, qrels = gate
        return Questions(queries, qrels)
    from ultrarag.finetune.evaluation import read_evaluator

    found = read_evaluator(os.fspath(eval_data) if isinstance(eval_data, os.PathLike) else eval_data, None, None)
    qrels = {query_id: dict(found.qrels[query_id]) for query_id in found.queries if found.qrels.get(query_id)}
    return Questions(found.queries, qrels, None if _is_of(store, found.corpus, qrels) else found.corpus)


def _is_of(store: Store, corpus: Mapping[str, str], qrels: ir.Qrels) -> bool:
    """Whether the relevant passages are all in the index; ids alone may agree by chance, so texts are compared."""
    ids = sorted({id for judged in qrels.values() for id, relevance in judged.items() if relevance > 0})
    held = store.get(ids)
    same = sum(held[id].content == corpus[id] for id in held)
    return bool(ids) and len(held) == len(ids) and same >= SAME_TEXT * len(ids)


def compare_encoders(
    old: Path, new: Path, asked: Questions, metric: str, precision: str, device: str | None
) -> Verdict:
    """Search the questions' own corpus with both checkpoints, exactly: with the dense head, or the first there is."""
    from ultrarag.encoder import Encoder

    names = list(dict.fromkeys((metric, *ir.DEFAULT_METRICS)))
    before, after = (
        _evaluate(Encoder.load(folder, device=device, precision=precision), asked, names) for folder in (old, new)
    )
    return Verdict.of(metric, before, after)


def _evaluate(encoder: Encoder, asked: Questions, names: list[str]) -> Evaluation:
    assert asked.corpus is not None
    head = "dense" if "dense" in encoder.heads else encoder.heads[0]
    ids, passage_ids = list(asked.qrels), list(asked.corpus)
    queries = encoder.encode([asked.queries[id] for id in ids], "query", heads=(head,))
    passages = encoder.encode(list(asked.corpus.values()), "passage", heads=(head,))
    if head == "dense":
        scores, rows = ir.top_k(queries.dense, passages.dense, DEPTH)
    else:
        scores = encoder.similarity(queries, passages, weights={head: 1.0})
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        scores = np.take_along_axis(scores, rows, axis=1)
    run = ir.run_of(ids, passage_ids, scores, rows)
    return Evaluation(ir.metrics(asked.qrels, run, names), ir.per_query(asked.qrels, run, names), run)


@dataclass(frozen=True)
class Measured:
    """What the gate measured, with the texts of the queries and of the passages that a reader wants to see."""

    metric: str
    before: Evaluation
    after: Evaluation
    queries: Mapping[str, str]
    qrels: ir.Qrels
    passages: Mapping[str, Passage]
    #: such as "300 queries on the index"
    where: str

    @classmethod
    def of(cls, verdict: Verdict, asked: Questions, store: Store) -> Measured:
        """Add the texts: of all judged queries, and of the passages of those that are shown."""
        queries = {query_id: asked.queries[query_id] for query_id in asked.qrels}
        qrels = {query_id: dict(judged) for query_id, judged in asked.qrels.items()}
        found = cls(verdict.metric, verdict.before, verdict.after, queries, qrels, {}, str(asked))
        ids = list(dict.fromkeys(id for query_id in found.shown() for id in found.ids_of(query_id)))
        if asked.corpus is None:
            return replace(found, passages=store.get(ids))
        return replace(found, passages={id: Passage(id, asked.corpus[id]) for id in ids if id in asked.corpus})

    def ids_of(self, query_id: str) -> list[str]:
        """The passages that one query is about: what was found, and what should have been."""
        return [*self.before.run[query_id], *self.after.run[query_id], *self.qrels[query_id]]

    def gained(self) -> list[tuple[str, float]]:
        """The queries that are answered better, and by how much, the most first."""
        return [change for change in self._changes() if change[1] > 0]

    def lost(self) -> list[tuple[str, float]]:
        """The queries that are answered worse, and by how much, the most first."""
        return [change for change in reversed(self._changes()) if change[1] < 0]

    def shown(self) -> list[str]:
        """The queries whose hits are worth showing: those that gained and lost most."""
        return [query_id for query_id, _ in (*self.gained()[:SHOWN], *self.lost()[:SHOWN])]

    def _changes(self) -> list[tuple[str, float]]:
        before, after = self.before.of(self.metric), self.after.of(self.metric)
        changed = [(id, after[id] - before[id]) for id in before if abs(after[id] - before[id]) > 1e-9]
        return sorted(changed, key=lambda change: (-change[1], change[0]))

    @property
    def verdict(self) -> Verdict:
        """The comparison of the two."""
        return Verdict.of(self.metric, self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        # runs as lists of pairs: JSON files are written with sorted keys, and hits have an order
        for side in ("before", "after"):
            run = plain[side]["run"]
            plain[side]["run"] = {query_id: [[*hit] for hit in hits.items()] for query_id, hits in run.items()}
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """Read what `to_dict` gave."""
        sides = {}
        for side in ("before", "after"):
            found = values[side]
            run = {query_id: dict(hits) for query_id, hits in found["run"].items()}
            first = sorted(found["metrics"].items(), key=lambda item: (item[0] != values["metric"], item[0]))
            sides[side] = Evaluation(dict(first), found["per_query"], run)
        passages = {id: Passage(**passage) for id, passage in values["passages"].items()}
        return cls(**{**values, **sides, "passages": passages})
