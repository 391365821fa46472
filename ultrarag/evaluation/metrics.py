"""Ranking metrics, significance and exact search: information retrieval without models."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.evaluation.qrels import Qrels, checked_qrels

#: query id -> passage id -> score; the higher the better
Run = Mapping[str, Mapping[str, float]]

#: What is measured where nothing else is asked for; the first one decides.
DEFAULT_METRICS = ("nDCG@10", "Recall@10", "MRR@10")
MAIN_METRIC = DEFAULT_METRICS[0]
#: Below this probability that chance alone made the difference, two systems are said to differ.
SIGNIFICANT = 0.05

#: our names of the metrics, in lower case -> those of ir-measures
_MEASURES = {
    "ndcg": "nDCG",
    "recall": "R",
    "r": "R",
    "mrr": "RR",
    "rr": "RR",
    "map": "AP",
    "ap": "AP",
    "p": "P",
    "precision": "P",
    "success": "Success",
}

log = logging.getLogger(__name__)


def metrics(qrels: Qrels, run: Run, names: Sequence[str] = DEFAULT_METRICS) -> dict[str, float]:
    """Return the mean of each metric over all queries of `qrels`; a query without hits counts as 0.

    A name is nDCG, Recall (R), MRR (RR), MAP (AP), Precision (P) or Success, then "@" and the cut-off. Queries of the
    run that have no qrels are left out, and a log message says how many. Equal scores rank as in trec_eval, by
    passage id from the last to the first, so that the numbers never depend on the order of the run.

    Raises:
        UsageError: unknown metric, no qrels, or a score that is not a number.

    Source:
        The definitions of trec_eval, through ir-measures (MacAvaney et al., 2022).
    """
    return means(per_query(qrels, run, names))


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the queries of `per_query`."""
    names = next(iter(values.values()))
    return {name: math.fsum(row[name] for row in values.values()) / len(values) for name in names}


def listed(names: str | Sequence[str]) -> list[str]:
    """One name or several as a list: the letters of one are no names."""
    return [names] if isinstance(names, str) else list(names)


def per_query(qrels: Qrels, run: Run, names: Sequence[str] = DEFAULT_METRICS) -> dict[str, dict[str, float]]:
    """Return the metrics of each query of `qrels`, in its order: query id -> name -> value; see `metrics`."""
    import ir_measures

    if not qrels:
        raise UsageError("there are no qrels to evaluate with")
    qrels, names = checked_qrels(qrels), listed(names)
    measures = {name: ir_measures.parse_measure(_measure(name)) for name in names}
    ranked = _ranked(qrels, run)
    values = {query_id: dict.fromkeys(names, 0.0) for query_id in qrels}
    of_measure = {measure: [n for n in names if measures[n] == measure] for measure in set(measures.values())}
    judged = {query_id: dict(row) for query_id, row in qrels.items()}
    for result in ir_measures.iter_calc(list(of_measure), judged, ranked):
        for name in of_measure[result.measure]:
            values[result.query_id][name] = float(result.value)
    return values


def ndcg_of_rows(hits: np.ndarray, relevant: np.ndarray, k: int = 10) -> float:
    """nDCG@k of one query from row numbers, where all relevant passages are equally so; 0 without any.

    What `per_query` gives, without its dictionaries, for loops that measure thousands of queries many times.

    Args:
        hits: (found,) the rows that were found, best first.
        relevant: the rows that are relevant.
    """
    if not len(relevant):
        return 0.0
    gains = np.isin(hits[:k], relevant) / np.log2(np.arange(2, len(hits[:k]) + 2))
    ideal = (1 / np.log2(np.arange(2, min(k, len(relevant)) + 2))).sum()
    return float(gains.sum() / ideal)


def _measure(name: str) -> str:
    """Translate a metric's name to that of ir-measures."""
    match = re.fullmatch(r"([A-Za-z]+)@([1-9]\d*)", name)
    if match is None or match[1].lower() not in _MEASURES:
        cutoff = name.partition("@")[2] or "10"
        known = [f"{metric}@{cutoff}" for metric in ("nDCG", "Recall", "MRR", "MAP", "Precision", "Success")]
        nearest = did_you_mean(name, known)
        raise UsageError(f"unknown metric '{name}'{nearest or '; known are ' + ', '.join(known)}")
    return f"{_MEASURES[match[1].lower()]}@{match[2]}"


def deepest(names: Sequence[str]) -> int:
    """The deepest cut-off among metrics: so many hits must be found; 10 for metrics without one."""
    cutoffs = [name.rpartition("@")[2] for name in names]
    return max((int(cutoff) if cutoff.isdigit() else 10 for cutoff in cutoffs), default=10)


def _ranked(qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
    """Replace the scores of judged queries by distinct ones: ir-measures' providers break ties each in its own way."""
    unjudged = len(run.keys() - qrels.keys())
    if unjudged:
        log.warning("%d of %d queries of the run have no qrels and are left out", unjudged, len(run))
    ranked = {}
    for query_id in qrels.keys() & run.keys():
        scores = run[query_id]
        bad = next((passage for passage, score in scores.items() if math.isnan(score)), None)
        if bad is not None:
            raise UsageError(f"the score of passage '{bad}' for query '{query_id}' is not a number")
        order = sorted(scores, key=lambda passage: (scores[passage], passage))
        ranked[query_id] = {passage: float(rank) for rank, passage in enumerate(order)}
    return ranked


@dataclass(frozen=True)
class Significance:
    """How sure one can be that two systems differ, from the same queries put to both."""

    #: mean of b minus mean of a
    difference: float
    #: 95 % interval of the difference
    low: float
    high: float
    #: two-sided; how often chance alone gives a difference this large
    p_value: float
    queries: int

    @property
    def significant(self) -> bool:
        """Chance alone is an unlikely reason."""
        return self.p_value < SIGNIFICANT

    def __str__(self) -> str:
        return (
            f"{self.difference:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f}, "
            f"p = {self.p_value:.4f}, {self.queries} queries)"
        )


def significance(a: Mapping[str, float], b: Mapping[str, float], samples: int = 10_000, seed: int = 0) -> Significance:
    """Compare two systems' values of one metric, query id -> value, by a paired bootstrap over the queries.

    Raises:
        UsageError: no queries, or not the same ones.

    Source:
        Efron and Tibshirani (1993), chapters 13 and 16; Sakai (2006) for retrieval.
    """
    if a.keys() != b.keys() or not a:
        raise UsageError(f"the two systems must answer the same queries: {len(a)} and {len(b)} differ, or are none")
    differences = np.array([b[query_id] - a[query_id] for query_id in sorted(a)])
    difference = float(differences.mean())
    means = _bootstrap_means(differences, samples, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.025, 0.975])
    # Under the null hypothesis the differences have mean 0: shift them there, and see how far means stray. The
    # slack is for rounding: without any difference every mean is as extreme as the one seen.
    extreme = np.abs(means - difference) >= abs(difference) - 1e-12
    p_value = float(extreme.sum() + 1) / (samples + 1)
    return Significance(difference, float(low), float(high), p_value, len(differences))


def _bootstrap_means(values: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    rows = max(1, 4_000_000 // len(values))  # at most 32 MB of random numbers at a time
    parts = [
        values[rng.integers(0, len(values), (min(rows, samples - start), len(values)))].mean(1)
        for start in range(0, samples, rows)
    ]
    return np.concatenate(parts)


def top_k(
    query_vectors: np.ndarray, passage_vectors: np.ndarray, k: int, chunk: int = 16_384
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k passages of the largest inner product, exactly; equal scores rank by passage number.

    Args:
        query_vectors: (queries, dim).
        passage_vectors: (passages, dim).
        k: how many; all passages where there are fewer.
        chunk: passages scored at a time, against 256 queries at a time; bounds the memory.

    Returns:
        scores, (queries, k) and descending, and the passages' row numbers, (queries, k) int64.

    Raises:
        UsageError: k below 1, no passages, dimensions that differ, or scores that are not numbers.
    """
    _check_vectors(query_vectors, passage_vectors, k)

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        return ((start, passage_vectors[start : start + chunk]) for start in range(0, len(passage_vectors), chunk))

    found = [
        top_k_of_blocks(query_vectors[start : start + 256], blocks(), k) for start in range(0, len(query_vectors), 256)
    ]
    if not found:
        width = min(k, len(passage_vectors))
        return np.empty((0, width), query_vectors.dtype), np.empty((0, width), np.int64)
    return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])


def _check_vectors(query_vectors: np.ndarray, passage_vectors: np.ndarray, k: int) -> None:
    if k < 1:
        raise UsageError(f"k is {k}; it must be at least 1")
    if len(passage_vectors) == 0:
        raise UsageError("there are no passages to search")
    shapes = query_vectors.shape, passage_vectors.shape
    if query_vectors.ndim != 2 or passage_vectors.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise UsageError(f"queries of shape {shapes[0]} cannot search passages of shape {shapes[1]}")


def top_k_of_blocks(
    queries: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find what `top_k` finds, of passages that come a block at a time.

    Args:
        queries: (queries, dim).
        blocks: the first row number of each block, ascending, and its vectors, (passages, dim).

    Returns:
        scores, (queries, k) and descending, and the passages' row numbers, (queries, k) int64.

    Raises:
        UsageError: scores that are not numbers.
    """
    scores = np.empty((len(queries), 0), queries.dtype)
    rows = np.empty((len(queries), 0), np.int64)
    for start, passages in blocks:
        new = queries @ passages.T
        if not np.isfinite(new).all():
            raise UsageError("some scores are not finite numbers: the vectors hold NaN or infinity")
        best = best_columns(new, k)
        # Rows found so far come first, so that a stable sort keeps the lower number among equals.
        scores = np.concatenate([scores, np.take_along_axis(new, best, 1)], 1)
        rows = np.concatenate([rows, best + start], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return scores, rows


def best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Return each row's k best columns in ascending order; among equals at the limit the lowest columns."""
    width = scores.shape[1]
    if k >= width:
        return np.broadcast_to(np.arange(width), scores.shape)
    best = np.argpartition(scores, width - k, axis=1)[:, width - k :]
    limit = np.take_along_axis(scores, best, 1).min(1, keepdims=True)
    tied = np.flatnonzero((scores >= limit).sum(1) > k)
    best[tied] = np.argsort(-scores[tied], axis=1, kind="stable")[:, :k]
    return np.sort(best, axis=1)


def run_of(
    query_ids: Sequence[str], passage_ids: Sequence[str], scores: np.ndarray, rows: np.ndarray
) -> dict[str, dict[str, float]]:
    """Name what `top_k` found: query id -> passage id -> score, best first."""
    return {
        query_id: {passage_ids[row]: float(score) for row, score in zip(found, values, strict=True)}
        for query_id, found, values in zip(query_ids, rows.tolist(), scores.tolist(), strict=True)
    }
