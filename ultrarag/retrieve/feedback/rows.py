"""From labels to training rows and to the queries that a refresh is judged by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve.feedback.entries import LoggedQuery
from ultrarag.retrieve.feedback.labels import Asked, Label, Rules, gathered, is_held_out, label, unverified
from ultrarag.types import Passage

#: Says of (query, passage's text) pairs which are relevant, such as a reranker with a threshold.
Verify = Callable[[list[tuple[str, str]]], Sequence[bool]]


@dataclass
class TrainingRows:
    """What feedback gives: rows to train on, and held-out queries with labels to judge by."""

    #: in the fine-tuning format (`query`, `pos`, `neg`), with `id` and `feedback`: passage id -> source of its label
    rows: list[dict[str, Any]] = field(default_factory=list)
    #: held-out queries with explicit votes, for the gate: query id -> text, and query id -> passage id -> relevance
    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)
    #: held-out queries that clicks or citations speak of: a second opinion, biased towards the model that was live
    clicked: dict[str, dict[str, int]] = field(default_factory=dict)
    #: what became of the log: counts by name
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def gate(self) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
        """(queries, qrels) for the gate of a refresh."""
        return {id: self.queries[id] for id in self.qrels}, self.qrels

    def checked(self) -> TrainingRows:
        """The same; DataError where there is nothing to train on, with what the log holds."""
        if not self.rows:
            raise DataError(
                f"the feedback gives no rows to train on: {json.dumps(self.report)}; search with log=True, and report "
                "clicks, citations or votes (docs/feedback.md)"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The counts, as JSON."""
        return self.report


def training_rows(
    queries: Iterable[LoggedQuery],
    passages: Callable[[list[str]], Mapping[str, Passage]],
    rules: Rules | None = None,
    verify: Verify | None = None,
) -> TrainingRows:
    """Apply the rules to a log.

    A query becomes a row where it has a positive that is still in the index; its negatives are hard ones: voted down,
    or shown often enough and hardly ever clicked. A fifth of the queries is held out for ever.

    Args:
        queries: of `FeedbackLog.queries`, the oldest first.
        passages: gives those of some ids that are in the index.
        rules: default: Rules().
        verify: asked about citations that nothing else confirms; default: they are not used.
    """
    rules = Rules() if rules is None else rules
    if not isinstance(rules, Rules):
        raise UsageError(f"rules is {type(rules).__name__}; give ultrarag.retrieve.feedback.Rules(...)")
    made, counts, sources, negatives = TrainingRows(), Counter[str](), Counter[str](), Counter[str]()
    below_first = 0
    for asked in gathered(queries, rules).values():
        counts["searches"] += asked.searches
        counts["queries"] += 1
        if not asked.text:
            counts["queries without text (only hashed)"] += 1
            continue
        labels = _labels(asked, rules, counts)
        stored = passages([*labels, *(unverified(asked, rules) if verify else ())])
        if verify is not None:
            labels |= _verified(asked, rules, stored, verify)
        counts["labels whose passage is gone"] += sum(id not in stored for id in labels)
        labels = {id: found for id, found in labels.items() if id in stored}
        if not labels:
            counts["queries without a label"] += 1
        elif is_held_out(asked.key, rules):
            _hold_out(made, asked, labels)
        elif row := _row(asked, labels, stored):
            made.rows.append(row)
            positives = [found for found in labels.values() if found.relevant]
            sources.update(found.source for found in positives)
            negatives.update(found.source for found in labels.values() if not found.relevant)
            below_first += any(found.rank != 1 for found in positives)
        else:
            counts["queries with negatives alone"] += 1
    made.report = {
        **counts,
        "rows": len(made.rows),
        "rows with a positive below rank 1": below_first,
        "positives": dict(sources),
        "negatives": dict(negatives),
        "held-out queries with votes": len(made.qrels),
        "held-out queries with clicks": len(made.clicked),
    }
    return made


def _labels(asked: Asked, rules: Rules, counts: Counter[str]) -> dict[str, Label]:
    found = {}
    for id, evidence in asked.passages.items():
        if (known := label(evidence, rules)) is not None:
            found[id] = known
        elif evidence.votes:
            counts["passages that people disagree about"] += 1
        elif evidence.cited:
            counts["citations without a second signal"] += 1
    return found


def _verified(asked: Asked, rules: Rules, stored: Mapping[str, Passage], verify: Verify) -> dict[str, Label]:
    ids = [id for id in unverified(asked, rules) if id in stored]
    if not ids:
        return {}
    said = verify([(asked.text, stored[id].content) for id in ids])
    if len(said) != len(ids):
        raise UsageError(f"verify was shown {len(ids)} pairs and said something of {len(said)}")
    return {
        id: Label(True, "citation", asked.passages[id].rank) for id, good in zip(ids, said, strict=True) if bool(good)
    }


def _hold_out(made: TrainingRows, asked: Asked, labels: dict[str, Label]) -> None:
    id = f"feedback-{asked.key}"
    votes = {passage: int(found.relevant) for passage, found in labels.items() if found.source == "vote"}
    if any(votes.values()):
        made.queries[id], made.qrels[id] = asked.text, votes
    others = {passage: 1 for passage, found in labels.items() if found.relevant and found.source != "vote"}
    if others:
        made.queries[id], made.clicked[id] = asked.text, others


def _row(asked: Asked, labels: dict[str, Label], stored: Mapping[str, Passage]) -> dict[str, Any] | None:
    relevant = {id: found for id, found in labels.items() if found.relevant}
    if not relevant:
        return None
    texts = {stored[id].content for id in relevant}
    others = [id for id, found in labels.items() if not found.relevant and stored[id].content not in texts]
    row: dict[str, Any] = {
        "id": f"feedback-{asked.key}",
        "query": asked.text,
        "pos": [stored[id].content for id in relevant],
    }
    if others:
        row["neg"] = [stored[id].content for id in others]
    return {**row, "feedback": {id: found.source for id, found in labels.items()}}
