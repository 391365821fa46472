"""Rows from RAG-Retrieval's training files, and back.

Read are its embedding rows (query, pos, neg, and `scores` of pos), its reranker rows (pos_scores, neg_scores; graded:
all texts in pos), its pointwise lines (query, content, label) and its groups (query, hits of content and label).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ultrarag.data.converting_columns import Judged, count_unread, grouped
from ultrarag.errors import DataError
from ultrarag.rows import Counts, Row, checked_object, reading

_KEYS = ("query", "pos", "neg", "pos_scores", "neg_scores")
#: What grades the texts of `pos`: the first of these that a line has.
_GRADES = ("pos_scores", "scores", "labels")


def read_rag_retrieval_rows(
    paths: Sequence[str], threshold: float, counts: Counts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row); in graded data, texts with at least `threshold` are positives, the others negatives.

    Raises:
        DataError: a line is none of the four kinds.
    """
    with reading(paths, "convert") as items:
        lines = ((place, checked_object(place, raw)) for place, raw in items)
        for pointwise, part in groupby(lines, lambda line: "content" in line[1]):
            if pointwise:
                yield from grouped((_point(place, value, threshold, counts) for place, value in part), counts)
            else:
                for place, value in part:
                    yield from _group(place, value, threshold, counts)


def _point(place: str, value: dict[str, Any], threshold: float, counts: Counts) -> Judged:
    count_unread(value, value.keys() - {"query", "content", "label"}, counts)
    return _hits(place, [value], value, threshold)


def _group(place: str, value: dict[str, Any], threshold: float, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    if "hits" in value:
        count_unread(value, value.keys() - {"query", "hits"}, counts)
        yield from _hits(place, value["hits"], value, threshold).rows(counts)
    else:
        count_unread(value, value.keys() - {*_KEYS, *_GRADES}, counts)
        yield from _plain(place, value, threshold, counts)


def _hits(place: str, hits: Any, value: Mapping[str, Any], threshold: float) -> Judged:
    try:
        texts, labels = [hit["content"] for hit in hits], [float(hit["label"]) for hit in hits]
        query = value["query"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: expected 'query', 'content' and a number as 'label' ({error})") from error
    return Judged.graded(place, query, texts, labels, threshold)


def _plain(place: str, value: dict[str, Any], threshold: float, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row like ours; one whose scores grade the texts of `pos` alone is divided by the threshold."""
    scores = next((value[name] for name in _GRADES if name in value), None)
    if not scores or value.get("neg"):
        row = {key: value[key] for key in _KEYS if value.get(key) is not None}
        yield place, {**row, **({"pos_scores": scores} if scores and value.get("neg_scores") else {})}
        return
    try:
        judged = Judged.graded(place, value["query"], value["pos"], scores, threshold)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: expected 'query', and as many scores as texts in 'pos' ({error})") from error
    yield from judged.rows(counts)


class RagRetrievalLines:
    """What a row gives to a file that RAG-Retrieval trains embedding models and rerankers on."""

    def __init__(self, path: str) -> None:
        self.files = [path]
        self.holds = set(_KEYS)

    def __call__(self, row: Row) -> Iterator[tuple[int, str]]:
        """Yield (0, line)."""
        found = {key: getattr(row, key) for key in _KEYS}
        yield 0, json.dumps({key: value for key, value in found.items() if value}, ensure_ascii=False)
