"""Rows from columns, as sentence-transformers' datasets have them (pairs, triplets, scored pairs), and back.

A line is a JSON object, or a line of a CSV or TSV file with a header (or of query, passage and label without one). What
a column is, its name says, line by line; `--columns` names query, positive and negatives. Lines that follow each other
with the same query make one row.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ultrarag.errors import DataError, UsageError
from ultrarag.io import progress_bar
from ultrarag.rows import Counts, Row, checked_object, reading

LAYOUTS = ("pair", "triplet", "n-tuple", "scored")
_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_QUERIES = ("anchor", "query", "question", "sentence1", "sentence_a")
_POSITIVES = ("positive", "pos", "answer", "passage", "document", "sentence2", "sentence_b")
_NEGATIVES = re.compile(r"(hard_)?neg(ative)?s?_?\d*")
_SCORES = ("score", "scores", "label", "labels", "similarity_score", "similarity_scores", "relevance")
#: The columns of a table without a header whose third field is a number.
_UNNAMED = ["query", "passage", "label"]
_TOO_FEW = "rows without enough negatives"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Which column of a line is what."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    score: str | None = None
    #: columns that give nothing to a row
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], place: str, given: Sequence[str] | None) -> Columns:
        """Read the names of a line's columns; `given` names the query, the positive and the negatives, in order.

        Raises:
            DataError: the query or the positive is missing, or cannot be found by its name.
        """
        low = {name.lower(): name for name in names}
        if given:
            if len(given) < 2 or not {given[0], given[1]} <= set(names):
                raise DataError(f"{place}: columns {', '.join(given)} were asked for; there are {', '.join(names)}")
            query, positive, negatives = given[0], given[1], tuple(name for name in given[2:] if name in names)
        else:
            query, positive = (
                next((low[name] for name in known if name in low), "") for known in (_QUERIES, _POSITIVES)
            )
            negatives = tuple(name for name in names if _NEGATIVES.fullmatch(name.lower()))
        if not query or not positive:
            raise DataError(
                f"{place}: which of the columns {', '.join(names)} is what? name them with "
                "--columns QUERY,POSITIVE[,NEGATIVE...] (a table without a header needs one, such as query, positive)"
            )
        read = {query, positive, *negatives}
        score = next((low[name] for name in _SCORES if name in low and low[name] not in read), None)
        return cls(query, positive, negatives, score, tuple(name for name in names if name not in {*read, score}))

    def judged(self, place: str, values: Mapping[str, Any], threshold: float, counts: Counts) -> Judged:
        """Return what a line says; what it says in columns that are not read is counted.

        Raises:
            DataError: a text is none, or scores are not as many as the texts.
        """
        query, texts = _text(values, self.query, place), _texts(values, self.positive, place)
        negatives = [text for name in self.negatives if values.get(name) for text in _texts(values, name, place)]
        # one number beside two texts is none of the positive alone: their margin, maybe
        score = self.score if not negatives or isinstance(values.get(self.score or ""), list) else None
        self._refuse_labels(place, values, len(texts))
        count_unread(values, (*self.unread, *([self.score] if self.score and not score else [])), counts)
        found = Judged(place, query, texts, negatives)
        return _graded(found, _numbers(values, score, place), threshold, score) if score else found

    def _refuse_labels(self, place: str, values: Mapping[str, Any], texts: int) -> None:
        """A list between 0 and 1 beside a list of texts is no column to pass over: some texts may be negatives."""
        for name in self.unread:
            found = values[name]
            if isinstance(found, list) and len(found) == texts > 1 and _are_shares(found):
                raise DataError(
                    f"{place}: '{name}' has a number from 0 to 1 for each text of '{self.positive}', and is not read: "
                    "call it 'labels' (texts below --threshold are then negatives), or take it out"
                )


def _are_shares(values: list[Any]) -> bool:
    """Numbers from 0 to 1 that differ."""
    return all(isinstance(value, int | float) and 0 <= value <= 1 for value in values) and len(set(values)) > 1


def count_unread(values: Mapping[str, Any], names: Iterable[str], counts: Counts) -> None:
    """Count what a line holds under names that are not read."""
    for name in names:
        if values.get(name) not in (None, "", []):
            counts[f"values of '{name}', which is not read"] += 1


def _graded(found: Judged, scores: list[float], threshold: float, name: str) -> Judged:
    """Divide the texts by their scores; scores of the negatives too are a teacher's, and divide nothing.

    Raises:
        DataError: there are neither as many scores as texts nor as many as texts and negatives, nor one for all.
    """
    texts = found.pos
    if found.neg and len(scores) == len(texts) + len(found.neg):
        return replace(found, scores=dict(zip([*texts, *found.neg], scores, strict=True)))
    if len(scores) == 1:
        scores = scores * len(texts)
    if len(scores) != len(texts):
        raise DataError(f"{found.place}: '{name}' has {len(scores)} numbers for {len(texts)} texts")
    split = Judged.graded(found.place, found.query, texts, scores, threshold)
    return replace(split, neg=[*split.neg, *found.neg], scores={} if found.neg else split.scores)


def delimiter_of(path: str) -> str | None:
    """Return what separates the fields of a CSV or TSV file; None for other files."""
    return next((mark for suffix, mark in _SUFFIXES.items() if path.lower().endswith(suffix)), None)


def read_column_rows(
    paths: Sequence[str], columns: Sequence[str] | None, threshold: float, counts: Counts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row).

    Args:
        columns: names of the query, the positive and the negatives, where the header does not say it.
        threshold: a text with at least this score is a positive, any other a negative.
        counts: says how many queries have no positive, and give no row; and what is not read.

    Raises:
        DataError: a line cannot be used.
    """
    for path in paths:
        lines = _csv_lines(path) if delimiter_of(path) else _json_lines(path)
        yield from grouped(_cells(lines, columns, threshold, counts), counts)


def _json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with reading(path, "convert") as items:
        for place, raw in items:
            yield place, checked_object(place, raw)


def _csv_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 28)  # of a text; the module's own limit is 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file, progress_bar(None, "convert", "line") as bar:
        reader = csv.reader(file, delimiter=str(delimiter_of(path)), strict=True)
        names: list[str] = []
        try:
            for fields in filter(None, reader):
                place = f"{path}:{reader.line_num}"
                if not names:
                    names = _names_of(fields, place)
                    if names is fields:
                        continue
                if len(fields) != len(names):
                    raise DataError(f"{place}: not {len(names)} fields, as the header has")
                bar.update(1)
                yield place, dict(zip(names, fields, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: {error}") from error


def _names_of(first: list[str], place: str) -> list[str]:
    """Return a table's header: its first line, unless that is a query, a passage and a number already."""
    if len(first) == len(_UNNAMED) and _is_number(first[-1]):
        log.warning("%s: there is no header; the columns are read as %s", place, ", ".join(_UNNAMED))
        return _UNNAMED
    if twice := sorted({name for name in first if first.count(name) > 1}):
        raise DataError(f"{place}: the header names '{twice[0]}' twice")
    return first


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cells(
    lines: Iterable[tuple[str, dict[str, Any]]], given: Sequence[str] | None, threshold: float, counts: Counts
) -> Iterator[Judged]:
    known: dict[tuple[str, ...], Columns] = {}
    place = ""
    for place, values in lines:
        names = tuple(values)
        columns = known.get(names) or known.setdefault(names, Columns.of(names, place, given))
        yield columns.judged(place, values, threshold, counts)
    missing = set(given or ()).difference(*known)
    if known and missing:
        raise DataError(f"{place}: no line up to here has the column '{min(missing)}' that was asked for")


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


def _numbers(values: Mapping[str, Any], name: str, place: str) -> list[float]:
    """A column may hold one number, or a list of them."""
    value = values[name]
    try:
        return [float(number) for number in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise DataError(f"{place}: '{name}' is {value!r:.80}, not a number or a list of numbers") from None


class ColumnLines:
    """What a row gives to a file of columns.

    pair: a line per positive; triplet: a line per positive and negative; n-tuple: a line per positive with the first
    `negatives` negatives; scored: a line per text with its score (without scores: 1 for positives, 0 for negatives).
    """

    def __init__(self, path: str, layout: str, negatives: int, counts: Counts) -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"layout is '{layout}'; it must be one of {', '.join(LAYOUTS)}")
        self.files = [path]
        #: what of a row these lines hold
        self.holds = {"query", "pos", *(() if layout == "pair" else ("neg",))}
        self.holds |= {"pos_scores", "neg_scores"} if layout == "scored" else set()
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
            self._counts[_TOO_FEW] += 1
        for values in found:
            yield 0, self._line(values)

    def refuse_nothing(self, rows: int) -> None:
        """Raise DataError where no row gave a line: a file of a header is no data."""
        if self._counts[_TOO_FEW] == rows:
            raise DataError(
                f"none of the {rows} rows has the negatives that a line of the layout '{self._layout}' needs: mine "
                "some, or write pairs (--layout pair)"
            )

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
        if self.scores and all(text in self.scores for text in (*pos, *neg)):  # not where lines without any joined
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
