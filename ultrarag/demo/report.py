"""What the demonstration prints: the metrics before and after, and one query whose right passage rose."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ultrarag.ir import Collection, Run
from ultrarag.retrieve.evaluation import Evaluation


def comparison(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Return the mean of each metric for every way of searching, before and after, as lines of text."""
    lines = [f"{'held-out queries':<20}{'before':>8}{'after':>8}{'gain':>9}"]
    for name, side in before.items():
        for metric, old in side.metrics.items():
            new = after[name].metrics[metric]
            lines.append(f"{f'{name} {metric}':<20}{old:>8.3f}{new:>8.3f}{new - old:>+9.3f}")
    return "\n".join(lines)


def example(task: Collection, before: Run, after: Run, hits: int = 3) -> str:
    """Return one query's first hits, before and after, side by side; the right passage is starred."""
    query_id = risen(task, before, after)
    if query_id is None:
        return "No query's right passage rose."
    columns = [_hits(task, run, query_id, hits) for run in (before, after)]
    width = max(len(hit) for hit in [*columns[0], "before"]) + 2
    rows = [f"  {old:<{width}}{new}".rstrip() for old, new in zip(*columns, strict=True)]
    head = f'query: "{task.queries[query_id]}"  (* is the right answer)\n  {"before":<{width}}after'
    return "\n".join([head, *rows])


def risen(task: Collection, before: Run, after: Run) -> str | None:
    """The query whose right passage gained most, by reciprocal rank; the first id among equals."""
    gains = {
        query_id: reciprocal_rank(task, after, query_id) - reciprocal_rank(task, before, query_id)
        for query_id in sorted(task.qrels)
    }
    best = max(gains, key=lambda query_id: gains[query_id])
    return best if gains[best] > 0 else None


def reciprocal_rank(task: Collection, run: Run, query_id: str) -> float:
    """One over the rank of the first relevant passage; 0 when it was not found."""
    ranks = (rank for rank, hit in enumerate(run[query_id], 1) if task.qrels[query_id].get(hit, 0) > 0)
    return 1 / next(ranks, math.inf)


def _hits(task: Collection, run: Run, query_id: str, count: int) -> list[str]:
    found = list(run[query_id].items())[:count]
    lines = [f"{'*' if task.qrels[query_id].get(hit, 0) > 0 else ' '} {score:.3f} {hit}" for hit, score in found]
    return lines + [""] * (count - len(lines))
