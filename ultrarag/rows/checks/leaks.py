"""LeakChecks: what of the evaluation data stands in the training rows; keys of the texts are held, not the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ultrarag.rows.checks.rows import SHOWN, Finding
from ultrarag.rows.checks.texts import leak_key


class LeakChecks:
    """Counts training rows that hold a query of the evaluation data, or a passage that answers one.

    Texts count as the same whatever their case, width, spaces and punctuation.
    """

    def __init__(self, queries: Iterable[str], relevant: Iterable[str], level: str = "error") -> None:
        self.level = level
        self._queries = {leak_key(text) for text in queries}
        self._relevant = {leak_key(text) for text in relevant}
        self._asked: set[int] = set()
        self._answered: set[int] = set()
        self._rows: dict[str, int] = {"query": 0, "passage": 0}
        self._places: dict[str, list[str]] = {"query": [], "passage": []}

    @classmethod
    def of(cls, evaluator: Any, level: str = "error") -> LeakChecks:
        """Take the texts of held-out data with `queries`, `qrels` and `corpus`."""
        judged = {key: evaluator.qrels.get(key) or {} for key in evaluator.queries}
        queries = [evaluator.queries[key] for key, relevant in judged.items() if relevant]
        return cls(queries, _relevant(judged.values(), evaluator.corpus), level)

    def add(self, place: str, query: str, pos: Sequence[str]) -> None:
        """Look at one training row."""
        asked = leak_key(query)
        if asked in self._queries:
            self._asked.add(asked)
            self._count("query", place)
        if self._relevant and (found := self._relevant.intersection(map(leak_key, pos))):
            self._answered |= found
            self._count("passage", place)

    def _count(self, kind: str, place: str) -> None:
        self._rows[kind] += 1
        if len(self._places[kind]) < SHOWN:
            self._places[kind].append(place)

    def findings(self) -> Iterator[Finding]:
        """Yield what has leaked."""
        if self._rows["query"]:
            text = (
                f"{len(self._asked)} of {len(self._queries)} evaluation queries are trained on: their metrics say "
                "nothing about new queries; take these rows out"
            )
            yield Finding(self.level, "eval_queries_in_train", self._rows["query"], text, self._places["query"])
        if self._rows["passage"]:
            text = (
                f"{len(self._answered)} of {len(self._relevant)} passages that answer evaluation queries are positives "
                "here: metrics are of seen passages (data split --by document keeps them apart)"
            )
            yield Finding("warning", "eval_passages_in_train", self._rows["passage"], text, self._places["passage"])


def _relevant(judged: Iterable[Mapping[str, int]], corpus: Mapping[str, str]) -> Iterator[str]:
    for relevant in judged:
        yield from (corpus[key] for key, grade in relevant.items() if grade > 0)
