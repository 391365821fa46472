"""How well an index answers test queries: metrics, the values of each query, and the run itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ultrarag.errors import UsageError
from ultrarag.ir import DEFAULT_METRICS, Qrels, Run, Significance, per_query, significance
from ultrarag.types import Hit

#: Queries searched at a time.
BATCH = 256


class Searchable(Protocol):
    """A LiveIndex, or one generation of it."""

    def search_many(self, queries: Sequence[str], **options: Any) -> list[list[Hit]]:
        """The hits of each query."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    #: metric -> mean over the queries
    metrics: dict[str, float]
    #: query id -> metric -> value
    per_query: dict[str, dict[str, float]]
    #: query id -> passage id -> score, best first
    run: dict[str, dict[str, float]]

    def of(self, metric: str) -> dict[str, float]:
        """The values of one metric, query id -> value, for `ultrarag.ir.significance`."""
        return {query_id: values[metric] for query_id, values in self.per_query.items()}


def evaluate(
    index: Searchable,
    queries: Mapping[str, str],
    qrels: Qrels,
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int | None = None,
    **search: Any,
) -> Evaluation:
    """Search every judged query and compare with its qrels.

    Args:
        queries: query id -> text; those without qrels are not searched.
        qrels: query id -> passage id -> relevance.
        metrics: names such as "nDCG@10"; see `ultrarag.ir.metrics`.
        k: hits per query; default: the deepest cut-off among the metrics.
        search: options of `LiveIndex.search`, such as `weights`.

    Raises:
        UsageError: for a query that has qrels and no text, an unknown metric, or no qrels.
    """
    missing = [query_id for query_id in qrels if query_id not in queries]
    if missing:
        raise UsageError(f"{len(missing)} judged queries have no text, '{missing[0]}' for one")
    per_query(qrels, {}, metrics)  # an unknown metric is told before the search, which may take long
    depth = k or max([_cutoff(name) for name in metrics], default=10)
    ids, run = list(qrels), {}
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        found = index.search_many([queries[query_id] for query_id in part], k=depth, **search)
        run.update({q: {hit.id: hit.score for hit in hits} for q, hits in zip(part, found, strict=True)})
    return evaluate_run(qrels, run, metrics)


def evaluate_run(qrels: Qrels, run: Run, metrics: Sequence[str] = DEFAULT_METRICS) -> Evaluation:
    """Measure a run made earlier or by another system, such as one from `ultrarag.retrieve.trec.read_run`.

    A judged query that the run lacks counts as 0.

    Raises:
        UsageError: for an unknown metric, no qrels, or a run that answers none of their queries.
    """
    if run and not qrels.keys() & run.keys():
        raise UsageError(f"the run answers none of the judged queries; it has '{next(iter(run))}' and others")
    values = per_query(qrels, run, metrics)
    means = {name: math.fsum(row[name] for row in values.values()) / len(values) for name in metrics}
    return Evaluation(means, values, {query_id: dict(hits) for query_id, hits in run.items()})


def differences(before: Evaluation, after: Evaluation) -> dict[str, Significance]:
    """How sure one can be that `after` differs from `before`, metric by metric; both must judge the same queries."""
    return {name: significance(before.of(name), after.of(name)) for name in after.metrics if name in before.metrics}


def _cutoff(name: str) -> int:
    digits = name.rpartition("@")[2]
    return int(digits) if digits.isdigit() else 10
