"""Rows from columns, as sentence-transformers' datasets have them (pairs, triplets, scored pairs), and back.

A line is a JSON object, or a line of a CSV or TSV file with a header. What a column is, its name says, or its place:
query, positive, then negatives. Lines that follow each other with the same query make one row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import DataError, UsageError
from ultrarag.io import progress_bar
from ultrarag.rows import Counts, Row, checked_object, reading

LAYOUTS = ("pair", "triplet", "n-tuple", "scored")
_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_QUERIES = ("anchor", "query", "question", "sentence1", "sentence_a")
_POSITIVES = ("positive", "pos", "answer", "passage", "document", "sentence2", "sentence_b")
_NEGATIVES = ("negative", "neg")
_SCORES = ("score", "label", "similarity_score")


@dataclass(frozen=True)
class Columns:
    """Which column is what."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    score: str | None = None

    @classmethod
    def of(cls, names: Sequence[str], place: str, given: Sequence[str] | None) -> Columns:
        """Read the names of a file's columns; `given` names the query, the positive and the negatives, in order.

        Raises:
            DataError: a column is missing, or cannot be recognised.
        """
        low = {name.lower(): name for name in names}
        score = next((low[name] for name in _SCORES if name in low), None)
        if given:
            missing = [name for name in given if name not in names]
            if missing or len(given) < 2:
                raise DataError(f"{place}: columns {', '.join(given)} were asked for; there are {', '.join(names)}")
            return cls(given[0], given[1], tuple(given[2:]), score)
        query = next((low[name] for name in _QUERIES if name in low), None)
        positive = next((low[name] for name in _POSITIVES if name in low), None)
        if query is None or positive is None:
            raise DataError(
                f"{place}: which of the columns {', '.join(names)} is what? name them with "
                "--columns QUERY,POSITIVE[,NEGATIVE...]"
            )
        negatives = tuple(name for name in names if name.lower().startswith(_NEGATIVES) and not _is_score(name))
        return cls(query, positive, negatives, score)


def _is_score(name: str) -> bool:
    return name.lower().endswith(("_score", "_scores"))


def delimiter_of(path: str) -> str | None:
    """Return what separates the fields of a CSV or TSV file; None for other files."""
    return next((mark for suffix, mark in _SUFFIXES.items() if path.lower().endswith(suffix)), None)


def read_column_rows(
    paths: Sequence[str], columns: Sequence[str] | None, threshold: float, counts: Counts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row).

    Args:
        columns: names of the query, the positive and the negatives, where the header does not say it.
        threshold: a scored pair with at least this score is a positive.
        counts: says how many queries have no positive, and give no row.

    Raises:
        DataError: a line cannot be used.
    """
    for path in paths:
        lines = _csv_lines(path) if delimiter_of(path) else _json_lines(path)
        yield from grouped(_cells(lines, columns, threshold), counts)


def _json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with reading(path, "convert") as items:
        for place, raw in items:
            yield place, checked_object(place, raw)


def _csv_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 28)  # of a text; the module's own limit is 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file, progress_bar(None, "convert", "line") as bar:
        try:
            reader = csv.DictReader(file, delimiter=str(delimiter_of(path)), strict=True)
            for values in reader:
                if None in values or None in values.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(f"{path}:{reader.line_num}: not {wanted} fields, as the header has")
                bar.update(1)
                yield f"{path}:{reader.line_num}", values
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: {error}") from error


def _cells(
    lines: Iterable[tuple[str, dict[str, Any]]], given: Sequence[str] | None, threshold: float
) -> Iterator[Judged]:
    columns: Columns | None = None
    for place, values in lines:
        columns = columns or Columns.of(list(values), place, given)
        query, positive = _text(values, columns.query, place), _texts(values, columns.positive, place)
        negatives = [text for name in columns.negatives if values.get(name) for text in _texts(values, name, place)]
        if columns.score is None or columns.negatives:
            yield Judged(place, query, positive, negatives)
            continue
        score = _number(values, columns.score, place)
        relevant = score >= threshold
        scores = dict.fromkeys(positive, score)
        yield Judged(place, query, positive if relevant else [], [] if relevant else positive, scores)


def _text(values: Mapping[str, Any], name: str, place: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise DataError(f"{place}: '{name}' is {type(value).__name__}, not a text")
    return value


def _texts(values: Mapping[str, Any], name: str, place: str) -> list[str]:
    """A column may hold one text, or a list of them."""
    value = values.get(name)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    return [_text(values, name, place)]


def _number(values: Mapping[str, Any], name: str, place: str) -> float:
    try:
        return float(values[name])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{place}: '{name}' is {values.get(name)!r}, not a number") from None


class ColumnLines:
    """What a row gives to a file of columns.

    pair: a line per positive; triplet: a line per positive and negative; n-tuple: a line per positive with the first
    `negatives` negatives; scored: a line per text with its score (without scores: 1 for positives, 0 for negatives).
    """

    def __init__(self, path: str, layout: str, negatives: int, counts: Counts) -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"layout is '{layout}'; it must be one of {', '.join(LAYOUTS)}")
        self.files = [path]
        self._delimiter, self._layout, self._negatives, self._counts = delimiter_of(path), layout, negatives, counts
        self._header = self._delimiter is not None

    @property
    def _names(self) -> list[str]:
        names = {
            "pair": ["anchor", "positive"],
            "triplet": ["anchor", "positive", "negative"],
            "n-tuple": ["anchor", "positive", *(f"negative_{number + 1}" for number in range(self._negatives))],
            "scored": ["sentence1", "sentence2", "score"],
        }
        return names[self._layout]

    def __call__(self, row: Row) -> Iterator[tuple[int, str]]:
        """Yield (0, line)."""
        if self._header:
            yield 0, self._line(self._names)
            self._header = False
        found = list(self._values(row))
        if not found:
            self._counts["rows without enough negatives"] += 1
        for values in found:
            yield 0, self._line(values)

    def _values(self, row: Row) -> Iterator[list[Any]]:
        neg = row.neg or []
        if self._layout == "scored":
            ones, zeros = row.pos_scores or [1.0] * len(row.pos), row.neg_scores or [0.0] * len(neg)
            yield from ([row.query, *pair] for pair in zip([*row.pos, *neg], [*ones, *zeros], strict=True))
        elif self._layout == "triplet":
            yield from ([row.query, positive, negative] for positive in row.pos for negative in neg)
        elif self._layout == "pair":
            yield from ([row.query, positive] for positive in row.pos)
        elif len(neg) >= self._negatives:
            yield from ([row.query, positive, *neg[: self._negatives]] for positive in row.pos)

    def _line(self, values: Sequence[Any]) -> str:
        if self._delimiter is None:
            return json.dumps(dict(zip(self._names, values, strict=True)), ensure_ascii=False)
        text = io.StringIO()
        csv.writer(text, delimiter=self._delimiter, lineterminator="\n").writerow(values)
        return text.getvalue().removesuffix("\n")


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
