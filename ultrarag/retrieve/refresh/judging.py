"""By which queries a refresh is judged: those given, those of a BEIR folder, or rows with a corpus of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.encoder.engines import is_int8
from ultrarag.evaluation import (
    DEFAULT_METRICS,
    Measured,
    Qrels,
    Verdict,
    checked_qrels,
    checked_queries,
    coverage,
    passages_of,
)
from ultrarag.rows.checks import Judged, LeakChecks, document_of, named_in

if TYPE_CHECKING:
    from ultrarag.retrieve.passages import Store
    from ultrarag.types import Passage

#: id, text and metadata of a passage
Sibling = tuple[str, str, Mapping[str, Any]]
#: A BEIR folder is about the index's passages when this share of its relevant ones have the same text there.
SAME_TEXT = 0.5


@dataclass(frozen=True)
class Questions:
    """Queries, what is relevant to them, and where they are searched."""

    queries: Mapping[str, str]
    qrels: Qrels
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
        DataError: when `eval_data` cannot be used, or no relevant passage of the gate's is in the index.
    """
    if gate is False or (gate is True and eval_data is None):
        return None
    if gate is not True:
        queries, qrels = checked_queries(gate[0]), checked_qrels(gate[1])
        coverage(qrels, store.existing)  # DataError now, not after hours of training
        return Questions(queries, qrels)
    from ultrarag.finetune import read_evaluator

    found = read_evaluator(os.fspath(eval_data) if isinstance(eval_data, os.PathLike) else eval_data, None, None)
    qrels = {query_id: dict(found.qrels[query_id]) for query_id in found.queries if found.qrels.get(query_id)}
    return Questions(found.queries, qrels, None if _is_of(store, found.corpus, qrels) else found.corpus)


def leak_checks(asked: Questions, store: Store) -> LeakChecks:
    """What looks for the questions, their answers, and other passages of the answers' documents among rows."""
    corpus = asked.corpus
    ids = sorted({id for judged in asked.qrels.values() for id, relevance in judged.items() if relevance > 0})
    if corpus is None:
        held = {id: (passage.content, passage.metadata) for id, passage in store.get(ids).items()}
    else:
        held = {id: (corpus[id], {}) for id in ids if id in corpus}
    judged = [
        Judged(asked.queries[key], [(id, *held[id]) for id, relevance in found.items() if relevance > 0 and id in held])
        for key, found in asked.qrels.items()
        if key in asked.queries
    ]
    siblings = ((id, text, {}) for id, text in corpus.items()) if corpus is not None else _siblings(store, held)
    return LeakChecks(judged, siblings, "warning")


def _siblings(store: Store, held: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Iterator[Sibling]:
    """Passages of the index that may be of these passages' documents: by id, or all where metadata names documents."""
    if any(next(named_in(metadata), None) for _, metadata in held.values()):
        found: Iterator[Passage] = store.passages()
    else:
        names = {name for id in held if (name := document_of(id)) is not None}
        found = (passage for name in sorted(names) for passage in store.of_document(name))
    yield from ((passage.id, passage.content, passage.metadata) for passage in found)


def _is_of(store: Store, corpus: Mapping[str, str], qrels: Qrels) -> bool:
    """Whether the relevant passages are all in the index; ids alone may agree by chance, so texts are compared."""
    ids = sorted({id for judged in qrels.values() for id, relevance in judged.items() if relevance > 0})
    held = store.get(ids)
    same = sum(held[id].content == corpus[id] for id in held)
    return bool(ids) and len(held) == len(ids) and same >= SAME_TEXT * len(ids)


def compare_encoders(
    old: Path,
    new: Path,
    asked: Questions,
    metric: str,
    precision: str,
    device: str | None,
    ignore_identical_ids: bool = False,
    trust_remote_code: bool = False,
) -> Verdict:
    """Search the questions' own corpus with both checkpoints, exactly: with the dense head, or the first there is."""
    from ultrarag.encoder import Encoder
    from ultrarag.finetune import Evaluator

    assert asked.corpus is not None
    names = list(dict.fromkeys((metric, *DEFAULT_METRICS)))
    own = "fp32" if is_int8(precision) else precision  # the new one is quantised when it is built
    options: dict[str, Any] = {"device": device, "precision": own, "trust_remote_code": trust_remote_code}
    evaluator = Evaluator(asked.corpus, asked.queries, asked.qrels, ignore_identical_ids=ignore_identical_ids)
    before, after = (
        evaluator.evaluate(encoder, encoder.heads, names)
        for encoder in (Encoder.load(folder, **options) for folder in (old, new))
    )
    return Verdict.of(metric, before, after)


def measured(verdict: Verdict, asked: Questions, store: Store) -> Measured:
    """What the gate measured, with the texts of what a reader wants to see."""
    passages = store.get if asked.corpus is None else passages_of(asked.corpus)
    return Measured.of(verdict, asked.queries, asked.qrels, str(asked), passages)
