"""How well an index answers test queries: metrics, the values of each query, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ultrarag.errors import UsageError
from ultrarag.ir import DEFAULT_METRICS, Qrels, Significance, per_query, significance
from ultrarag.report.measured import Evaluation, evaluate_run
from ultrarag.types import Hit

__all__ = ["Evaluation", "Searchable", "differences", "evaluate", "evaluate_run"]

#: Queries searched at a time.
BATCH = 256


class Searchable(Protocol):
    """A LiveIndex, or one generation of it."""

    def search_many(self, queries: Sequence[str], **options: Any) -> list[list[Hit]]:
        """The hits of each query."""
        ...


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


def differences(before: Evaluation, after: Evaluation) -> dict[str, Significance]:
    """How sure one can be that `after` differs from `before`, metric by metric; both must judge the same queries."""
    return {name: significance(before.of(name), after.of(name)) for name in after.metrics if name in before.metrics}


def _cutoff(name: str) -> int:
    digits = name.rpartition("@")[2]
    return int(digits) if digits.isdigit() else 10
