"""Judged: what one line of a file says about its query; neighbours with the same query make one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.data.reading import Counts


@dataclass
class Judged:
    """A query with some texts."""

    place: str
    query: str
    pos: list[str]
    neg: list[str]
    #: text -> score; empty where there are none
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def graded(cls, place: str, query: str, texts: Sequence[str], scores: Sequence[float], threshold: float) -> Judged:
        """Take texts that score at least `threshold` as positives, the others as negatives."""
        known = dict(zip(texts, scores, strict=True))
        pos = [text for text, score in known.items() if score >= threshold]
        return cls(place, query, pos, [text for text, score in known.items() if score < threshold], known)

    def rows(self, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place, row); nothing where no text is a positive, which is counted."""
        pos, neg = list(dict.fromkeys(self.pos)), list(dict.fromkeys(self.neg))
        if not pos:
            counts["queries without a positive"] += 1
            return
        row: dict[str, Any] = {"query": self.query, "pos": pos, **({"neg": neg} if neg else {})}
        if self.scores:
            row["pos_scores"] = [self.scores[text] for text in pos]
            if neg:
                row["neg_scores"] = [self.scores[text] for text in neg]
        yield self.place, row


def grouped(items: Iterable[Judged], counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Join neighbours that have the same query, and yield (place, row)."""
    held: Judged | None = None
    for item in items:
        if held and item.query == held.query:
            held.pos, held.neg = [*held.pos, *item.pos], [*held.neg, *item.neg]
            held.scores.update(item.scores)
            continue
        if held:
            yield from held.rows(counts)
        held = item
    if held:
        yield from held.rows(counts)
