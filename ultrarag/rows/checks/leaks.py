"""What training and evaluation share: queries, passages that answer, and documents; and which split that makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ultrarag.rows.checks.documents import NearTexts, counted, name_key, names_in_row, names_of, title_of
from ultrarag.rows.checks.rows import SHOWN, Finding, leak_key

#: Share of the evaluation queries that may share something by chance, such as one answer that is boilerplate.
BY_CHANCE = 0.01
#: Characters of a query that is shown as an example.
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Judged:
    """A query of the evaluation data, with the passages that answer it."""

    query: str
    #: (id, text, metadata) of each
    passages: Sequence[tuple[str, str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Overlap:
    """What the rows that are trained on share with the evaluation data."""

    #: "by document": nothing is shared; "by query": passages or documents are; "no split": queries are; "unknown": no
    #: text is shared, but the evaluation data names no documents
    split: str
    #: queries of the evaluation data that have an answer
    queries: int
    #: those of them that are trained on, or of whose answers something is
    touched: int
    #: "query", "passage" and "document" -> evaluation queries that share one; each counts for the first of them
    shared: dict[str, int]
    #: training rows looked at, and all
    checked: int
    rows: int
    #: "file:line: what it shares with which query", the first few
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the evaluation queries that are touched."""
        return self.touched / self.queries if self.queries else 0.0

    @property
    def too_much(self) -> bool:
        """More is shared than by chance: what is measured is not what new queries would get."""
        return self.share > BY_CHANCE

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return described(self.to_dict())


def described(overlap: Mapping[str, Any]) -> str:
    """What `Overlap.to_dict` says, in words."""
    split, shared = overlap["split"], overlap["shared"]
    looked = "" if overlap["checked"] >= overlap["rows"] else f", in {overlap['checked']} of {overlap['rows']} rows"
    if split == "unknown":
        return f"unknown: no passage is shared{looked}, but the evaluation data names no documents"
    parts = ", ".join(f"{kind} {count}" for kind, count in shared.items() if count)
    told = (
        f"{overlap['share']:.1%} of {overlap['queries']} evaluation queries share a {parts}" if parts else "0 % shared"
    )
    return f"{split}: {told}{looked}"


class LeakChecks:
    """Counts training rows that hold an evaluation query, a passage that answers one, or another of its document.

    Queries and passages count as the same whatever their case, width, spaces and punctuation. A passage is of an
    answer's document when it has the same title, is nearly the same text, or is one of `siblings`.
    """

    def __init__(
        self,
        judged: Iterable[Judged],
        siblings: Iterable[tuple[str, str, Mapping[str, Any]]] = (),
        level: str = "error",
    ) -> None:
        """Take in the evaluation data.

        Args:
            judged: its queries.
            siblings: (id, text, metadata) of passages of the corpus that may be of the documents of answers; others
                cost nothing.
            level: of the finding that queries are trained on.
        """
        self.level = level
        self._queries: dict[int, set[int]] = {}
        self._passages: dict[int, set[int]] = {}
        #: document -> queries, by the names that passages give
        self._documents: dict[int, set[int]] = {}
        #: passage of an answer's document -> queries
        self._siblings: dict[int, set[int]] = {}
        self._near = NearTexts()
        self._texts: list[str] = []
        self._named = self._answers = 0
        for number, item in enumerate(judged):
            self._take(number, item)
        for id, text, metadata in siblings:
            self._take_sibling(id, text, metadata)
        self._touched: dict[str, set[int]] = {"query": set(), "passage": set(), "document": set()}
        self._rows = dict.fromkeys(self._touched, 0)
        self._places: dict[str, list[str]] = {kind: [] for kind in self._touched}
        self._how: list[str] = []
        self._examples: list[str] = []
        self._checked = 0

    @classmethod
    def of(cls, evaluator: Any, level: str = "error") -> LeakChecks:
        """Take the texts of held-out data with `queries`, `qrels` and `corpus`."""
        corpus = evaluator.corpus
        judged = [
            Judged(evaluator.queries[key], [(id, corpus[id], {}) for id, grade in relevant.items() if grade > 0])
            for key in evaluator.queries
            if (relevant := evaluator.qrels.get(key))
        ]
        return cls(judged, ((id, text, {}) for id, text in corpus.items()), level)

    def _take(self, number: int, item: Judged) -> None:
        self._texts.append(item.query)
        self._queries.setdefault(leak_key(item.query), set()).add(number)
        for id, text, metadata in item.passages:
            key = leak_key(text)
            if key not in self._passages:
                self._near.add(text, key)
            self._passages.setdefault(key, set()).add(number)
            names = [name_key(*name) for name in names_of(text, id, metadata)]
            self._answers, self._named = self._answers + 1, self._named + bool(names)
            for name in names:
                self._documents.setdefault(name, set()).add(number)

    def _take_sibling(self, id: str, text: str, metadata: Mapping[str, Any]) -> None:
        """Remember a passage of an answer's document; of a title training rows speak themselves."""
        names = [name_key(*name) for name in names_of("", id, metadata)]
        found = set().union(*(self._documents.get(name, set()) for name in names))
        if found and (key := leak_key(text)) not in self._passages:
            self._siblings.setdefault(key, set()).update(found)

    # ---- the rows

    def add(self, place: str, query: str, pos: Sequence[str], extra: Mapping[str, Any] | None = None) -> None:
        """Look at one training row; `extra` are the keys that training does not read."""
        self._checked += 1
        asked = self._queries.get(leak_key(query), set())
        self._note("query", place, asked, "the query")
        if not self._passages:
            return
        keys = [leak_key(text) for text in pos]
        same = set().union(*(self._passages.get(key, set()) for key in keys))
        self._note("passage", place, same, "a passage that answers it")
        others = [(key, text) for key, text in zip(keys, pos, strict=True) if key not in self._passages]
        self._note_documents(place, others, extra or {})

    def _note_documents(self, place: str, others: Sequence[tuple[int, str]], extra: Mapping[str, Any]) -> None:
        found: dict[str, set[int]] = {}
        for kind, name in names_in_row(extra, ()) if others else ():
            found.setdefault(kind, set()).update(self._documents.get(name_key(kind, name), ()))
        for key, text in others:
            found.setdefault("id", set()).update(self._siblings.get(key, ()))
            if (title := title_of(text)) is not None:
                found.setdefault("title", set()).update(self._documents.get(name_key("title", title), ()))
            for near in self._near.find(text):
                found.setdefault("near", set()).update(self._passages[near])
        kinds = [kind for kind, queries in found.items() if queries]
        self._how += kinds[:1]
        what = {"near": "nearly the same text as a passage that answers it", "title": "a text with its answer's title"}
        self._note(
            "document", place, set().union(*found.values()), what.get((kinds or [""])[0], "its answer's document")
        )

    def _note(self, kind: str, place: str, touched: set[int], what: str) -> None:
        if not touched:
            return
        new = touched.difference(*self._touched.values())
        self._touched[kind] |= touched
        self._rows[kind] += 1
        if len(self._places[kind]) < SHOWN:
            self._places[kind].append(place)
        if new and len(self._examples) < SHOWN:
            query = self._texts[min(new)]
            cut = query if len(query) <= _SHOWN_CHARACTERS else f"{query[:_SHOWN_CHARACTERS]}..."
            self._examples.append(f"{place}: {what}, '{cut}'")

    # ---- what was found

    def overlap(self, rows: int) -> Overlap:
        """What was found; `rows` is how many there are in all."""
        kinds = tuple(self._touched)
        seen: set[int] = set()
        shared = {}
        for kind in kinds:
            shared[kind] = len(self._touched[kind] - seen)
            seen |= self._touched[kind]
        queries = len(self._texts)
        return Overlap(
            self._split(shared, queries), queries, len(seen), shared, self._checked, rows, list(self._examples)
        )

    def _split(self, shared: Mapping[str, int], queries: int) -> str:
        few = BY_CHANCE * queries
        if shared["query"] > few:
            return "no split"
        if sum(shared.values()) > few:
            return "by query"
        return "by document" if 2 * self._named >= self._answers > 0 else "unknown"

    def findings(self) -> Iterator[Finding]:
        """Yield what has leaked."""
        touched, queries = self._touched, len(self._texts)
        if self._rows["query"]:
            text = (
                f"{len(touched['query'])} of {queries} evaluation queries are trained on: their metrics say "
                "nothing about new queries; take these rows out"
            )
            yield self._finding(self.level, "eval_queries_in_train", "query", text)
        if self._rows["passage"]:
            text = (
                f"passages that answer {len(touched['passage'])} of {queries} evaluation queries are positives "
                "here: metrics are of seen passages (data split --by document keeps them apart)"
            )
            yield self._finding("warning", "eval_passages_in_train", "passage", text)
        if self._rows["document"]:
            text = (
                f"{len(touched['document'])} of {queries} evaluation queries have their answers in documents of "
                f"positives here, known by {counted(self._how)}: metrics promise more than new documents will get "
                "(data split --by document keeps them apart)"
            )
            yield self._finding("warning", "eval_documents_in_train", "document", text)

    def _finding(self, level: str, name: str, kind: str, text: str) -> Finding:
        return Finding(level, name, self._rows[kind], text, self._places[kind])
