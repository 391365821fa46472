"""The judgement: one system's answers measured, two systems compared, and the texts to show of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from ultrarag.errors import UsageError
from ultrarag.evaluation.metrics import (
    DEFAULT_METRICS,
    Run,
    Significance,
    deepest,
    listed,
    means,
    per_query,
    significance,
)
from ultrarag.evaluation.qrels import Qrels, checked_qrels, checked_queries, coverage
from ultrarag.types import Hit, Passage

#: Queries searched at a time.
CHUNK_QUERIES = 256
#: Queries whose hits are shown: so many of those that gained most, and of those that lost most.
SHOWN = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    #: metric -> mean over the queries
    metrics: dict[str, float]
    #: query id -> metric -> value
    per_query: dict[str, dict[str, float]]
    #: query id -> passage id -> score, best first
    run: dict[str, dict[str, float]]
    #: what a reader of the numbers should know, such as relevant passages that are not in the index
    notes: tuple[str, ...] = ()

    def of(self, metric: str) -> dict[str, float]:
        """The values of one metric, query id -> value, for `ultrarag.evaluation.metrics.significance`."""
        return {query_id: values[metric] for query_id, values in self.per_query.items()}


def evaluate_run(
    qrels: Qrels, run: Run, metrics: Sequence[str] = DEFAULT_METRICS, *, ignore_identical_ids: bool = False
) -> Evaluation:
    """Measure a run made earlier or by another system, such as one from `ultrarag.evaluation.formats.read_run`.

    A judged query that the run lacks counts as 0.

    Args:
        ignore_identical_ids: leave out the hit whose id is the query's own, unless it is judged relevant (see
            `evaluate`).

    Raises:
        UsageError: for an unknown metric, no qrels, a relevance that is no integer, or a run that answers none of
            their queries.
    """
    qrels = checked_qrels(qrels)
    named = {str(query_id): {str(id): score for id, score in hits.items()} for query_id, hits in run.items()}
    if named and not qrels.keys() & named.keys():
        raise UsageError(f"the run answers none of the judged queries; it has '{next(iter(named))}' and others")
    kept, notes = _identical(qrels, named, ignore_identical_ids)
    values = per_query(qrels, kept, metrics)
    return Evaluation(means(values), values, kept, (*notes, *_none_judged(qrels, kept)))


def _identical(
    qrels: Mapping[str, Mapping[str, int]], run: dict[str, dict[str, float]], ignore: bool
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Leave out hits that are the query itself by its id, or say that they count."""
    same = {id for id, hits in run.items() if id in hits and qrels.get(id, {}).get(id, 0) <= 0}
    if not same:
        return run, []
    found = f"{len(same)} of {len(run)} queries found the passage that has their own id"
    if not ignore:
        return run, [f"{found}, and it counts as a wrong hit: ignore_identical_ids leaves it out where it is the query"]
    kept = {id: {p: score for p, score in hits.items() if p != id or id not in same} for id, hits in run.items()}
    return kept, [f"{found}, which is left out (ignore_identical_ids)"]


def _none_judged(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]) -> list[str]:
    judged = set().union(*qrels.values())
    if not any(run.values()) or any(not judged.isdisjoint(hits) for hits in run.values()):
        return []
    return ["no passage that was found is judged at all: do the qrels and the run name passages by the same ids?"]


class Searchable(Protocol):
    """A LiveIndex, or one generation of it."""

    def search_many(self, queries: Sequence[str], **options: Any) -> Sequence[Sequence[Hit]]:
        """The hits of each query."""
        ...

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are passages here."""
        ...


def evaluate(
    index: Searchable,
    queries: Mapping[str, str],
    qrels: Qrels,
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int | None = None,
    *,
    ignore_identical_ids: bool = False,
    **search: Any,
) -> Evaluation:
    """Search every judged query and compare with its qrels.

    Relevant passages that are not in the index are counted in the result's `notes`, which are logged too.

    Args:
        queries: query id -> text; those without qrels are not searched.
        qrels: query id -> passage id -> relevance (or a list of relevant ids). Ids may be integers, and whatever means
            an integer is a relevance.
        metrics: names such as "nDCG@10"; see `ultrarag.evaluation.metrics.metrics`.
        k: hits per query; default: the deepest cut-off among the metrics.
        ignore_identical_ids: leave out the passage whose id is the query's own, unless it is judged relevant: for
            collections whose queries are passages of the corpus, such as ArguAna and Quora in BEIR.
        search: options of `LiveIndex.search`, such as `weights`.

    Raises:
        UsageError: for a query that has qrels and no text, an unknown metric, no qrels, or a relevance that is no
            integer.
        DataError: no passage is relevant, or none of the relevant ones is in the index.
    """
    for option in ("log", "client"):
        if option in search:
            raise UsageError(f"evaluate takes no '{option}': judged queries are nobody's searches, and not remembered")
    queries, qrels, metrics = checked_queries(queries), checked_qrels(qrels), listed(metrics)
    missing = [query_id for query_id in qrels if query_id not in queries]
    if missing:
        raise UsageError(f"{len(missing)} judged queries have no text, '{missing[0]}' for one")
    per_query(qrels, {}, metrics)  # refuses an unknown metric before the search, which may take long
    # somebody's own Searchable may be older than `existing`
    lacking = coverage(qrels, index.existing) if hasattr(index, "existing") else []
    depth = k or deepest(metrics)
    run = _searched(index, queries, list(qrels), depth + ignore_identical_ids, search)
    notes: list[str] = []
    if ignore_identical_ids:
        run, notes = _identical(qrels, run, True)
        run = {query_id: dict(list(hits.items())[:depth]) for query_id, hits in run.items()}
    found = evaluate_run(qrels, run, metrics)
    found = replace(found, notes=(*lacking, *notes, *found.notes))
    for note in found.notes:
        log.warning("%s", note)
    return found


def _searched(
    index: Searchable, queries: Mapping[str, str], ids: Sequence[str], depth: int, search: dict[str, Any]
) -> dict[str, dict[str, float]]:
    run: dict[str, dict[str, float]] = {}
    for start in range(0, len(ids), CHUNK_QUERIES):
        part = ids[start : start + CHUNK_QUERIES]
        found = index.search_many([queries[query_id] for query_id in part], k=depth, **search)
        run.update({q: {hit.id: hit.score for hit in hits} for q, hits in zip(part, found, strict=True)})
    return run


def differences(before: Evaluation, after: Evaluation) -> dict[str, Significance]:
    """How sure one can be that `after` differs from `before`, metric by metric; both must judge the same queries."""
    return {name: significance(before.of(name), after.of(name)) for name in after.metrics if name in before.metrics}


@dataclass(frozen=True)
class Verdict:
    """Two systems compared by one metric, as a gate judges them."""

    metric: str
    old: float
    new: float
    change: Significance
    #: all that was measured: every default metric, each query, and the runs
    before: Evaluation = field(repr=False, compare=False)
    after: Evaluation = field(repr=False, compare=False)

    @classmethod
    def of(cls, metric: str, before: Evaluation, after: Evaluation) -> Verdict:
        """Compare two evaluations of the same queries by one metric."""
        change = significance(before.of(metric), after.of(metric))
        return cls(metric, before.metrics[metric], after.metrics[metric], change, before, after)

    @property
    def worse(self) -> bool:
        """Significantly worse."""
        return self.change.difference < 0 and self.change.significant

    @property
    def judges_nothing(self) -> bool:
        """Both sides measure 0: no query tells them apart, nor would it a broken one."""
        return self.old == 0 and self.new == 0

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        return list(dict.fromkeys((*self.before.notes, *self.after.notes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; means only, not the single queries."""
        return {
            "metric": self.metric,
            "old": self.old,
            "new": self.new,
            "change": asdict(self.change),
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return f"{self.metric} {self.old:.4f} -> {self.new:.4f}: {self.change}"


def passages_of(corpus: Mapping[str, str]) -> Callable[[list[str]], Mapping[str, Passage]]:
    """What gives the passages of some ids, where a corpus is held as texts by id."""
    return lambda ids: {id: Passage(id, corpus[id]) for id in ids if id in corpus}


@dataclass(frozen=True)
class Measured:
    """Two systems measured, with the texts of the queries and of the passages that a reader wants to see."""

    metric: str
    before: Evaluation
    after: Evaluation
    queries: Mapping[str, str]
    qrels: Qrels
    passages: Mapping[str, Passage]
    #: such as "300 queries on the index"
    where: str

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        queries: Mapping[str, str],
        qrels: Qrels,
        where: str,
        passages: Callable[[list[str]], Mapping[str, Passage]],
    ) -> Measured:
        """Add the texts: of all judged queries, and of the passages of those that are shown.

        Args:
            passages: gives the passages of some ids (see `passages_of`); those that it does not know are left out.
        """
        asked = {query_id: queries[query_id] for query_id in qrels}
        judged = {query_id: dict(row) for query_id, row in qrels.items()}
        found = cls(verdict.metric, verdict.before, verdict.after, asked, judged, {}, where)
        ids = list(dict.fromkeys(id for query_id in found.shown() for id in found.ids_of(query_id)))
        return replace(found, passages=passages(ids))

    def short(self) -> Measured:
        """The same without the hits of queries that are not shown: what a file needs to hold."""
        shown = self.shown()
        before, after = (
            replace(side, run={query_id: side.run[query_id] for query_id in shown if query_id in side.run})
            for side in (self.before, self.after)
        )
        return replace(self, before=before, after=after)

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
            sides[side] = Evaluation(dict(first), found["per_query"], run, tuple(found.get("notes", ())))
        passages = {id: Passage(**passage) for id, passage in values["passages"].items()}
        return cls(**{**values, **sides, "passages": passages})
