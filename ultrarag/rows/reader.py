"""Rows of training data: read from files or memory, checked once, and accounted for to the last one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import DataError
from ultrarag.io import progress_bar
from ultrarag.rows.files import BadJson, DataFile, find_files, raw_rows
from ultrarag.rows.row import BadRow, Row, parse_row
from ultrarag.types import Example

#: What rows given in memory are called.
IN_MEMORY = "<rows>"

_SHOWN = 20


@dataclass
class Dataset:
    """What reading found in one file: how many rows, and its settings (FlagEmbedding's, from its first row)."""

    rows: int = 0
    batch_size: int | None = None
    train_group_size: int | None = None
    type: str = "normal"
    #: where the settings stand
    first: str = ""

    def add(self, row: Row, place: str) -> None:
        """Count a row; its settings may be left out, but not be others than the dataset's.

        Raises:
            BadRow: they are others.
        """
        if not self.rows:
            self.batch_size, self.train_group_size = row.batch_size, row.train_group_size
            self.type, self.first = row.type or "normal", place
        for name in ("batch_size", "train_group_size", "type"):
            found, expected = getattr(row, name), getattr(self, name)
            if found not in (None, expected):
                there = "not set" if expected is None else repr(expected)
                raise BadRow(f"'{name}' is {found!r}, but {there} at {self.first}; it must be the same in a whole file")
        self.rows += 1


@dataclass
class RowReader:
    """Reads and checks rows, file after file, and keeps account of those that cannot be used."""

    #: "fail": `finish` raises; "drop": they are left out and counted in `notes`
    on_bad_rows: str = "fail"
    #: every row needs a teacher's scores
    teacher: bool = False
    seen: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _unused: Counter[str] = field(default_factory=Counter)
    _contradictions: list[str] = field(default_factory=list)

    def read(self, file: DataFile, dataset: Dataset) -> Iterator[Example]:
        """Yield the usable rows of `file`, and account for them in `dataset`.

        Raises:
            DataError: the file cannot be read, or holds no row at all.
        """
        yield from self.check(file.path, raw_rows(file.path), dataset)

    def check(self, name: str, raw: Iterable[tuple[str, Any]], dataset: Dataset) -> Iterator[Example]:
        """Yield the usable ones of (place, raw row); `name` is what they are called as a whole."""
        seen, bad = self.seen, self.bad
        for place, value in raw:
            self.seen += 1
            try:
                row = parse_row(value, self.teacher)
                dataset.add(row, place)
            except BadRow as error:
                self._refuse(f"{place}: {error}", last=isinstance(value, BadJson))
            else:
                yield self._example(row, place, dataset.type)
        if self.seen == seen:
            raise DataError(f"'{name}' holds no rows; remove it or fill it")
        if self.bad > bad and self.on_bad_rows == "drop":
            self.notes.append(
                f"{self.bad - bad} of {self.seen - seen} rows of '{name}' cannot be used and are left out"
            )

    def finish(self) -> None:
        """Settle the account, after the last file.

        Raises:
            DataError: rows cannot be used and `on_bad_rows` is "fail", or no usable row is left.
        """
        listed = "\n".join(f"  {reason}" for reason in self.reasons)
        if self.bad > len(self.reasons):
            listed += f"\n  and {self.bad - len(self.reasons)} more"
        if self.bad and (self.on_bad_rows == "fail" or self.bad == self.seen):
            raise DataError(
                f"{self.bad} of {self.seen} rows cannot be used; correct them"
                + (", or leave them out with --on_bad_rows drop" if self.bad < self.seen else "")
                + f":\n{listed}"
            )
        if self.bad:
            self.notes.append(f"rows left out:\n{listed}")
        self.notes += self._remarks()

    def _refuse(self, reason: str, last: bool) -> None:
        if last and self.on_bad_rows == "drop":
            raise DataError(f"{reason}; the rest of the list cannot be read, so it cannot be left out row by row")
        self.bad += 1
        if len(self.reasons) < _SHOWN:
            self.reasons.append(reason)

    def _example(self, row: Row, place: str, type: str) -> Example:
        self._unused.update(list(row.model_extra or ()))
        if row.neg and not set(row.neg).isdisjoint(row.pos):
            self._contradictions.append(place)
            _remove_positives(row)
        return Example(
            query=row.query,
            pos=tuple(row.pos),
            neg=tuple(row.neg or ()),
            pos_scores=tuple(row.pos_scores) if row.pos_scores else None,
            neg_scores=tuple(row.neg_scores) if row.neg_scores else None,
            prompt=row.prompt,
            type=type,
            source=place,
        )

    def _remarks(self) -> list[str]:
        remarks = []
        if self._unused:
            keys = ", ".join(f"'{key}' ({count} rows)" for key, count in sorted(self._unused.items())[:_SHOWN])
            remarks.append(f"keys of rows that training does not use: {keys}")
        if rows := self._contradictions:
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            remarks.append(
                f"{len(rows)} rows name a text as positive and as negative; it is left out of their negatives: "
                f"{', '.join(rows[:3])}{more}"
            )
        return remarks


def _remove_positives(row: Row) -> None:
    kept = [i for i, text in enumerate(row.neg or ()) if text not in row.pos]
    row.neg_scores = [row.neg_scores[i] for i in kept] if row.neg_scores else None
    row.neg = [row.neg[i] for i in kept] if row.neg else None


def in_memory(rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield ("<rows>:number", row), counting from 1."""
    for number, row in enumerate(rows, 1):
        yield f"{IN_MEMORY}:{number}", row


def read_rows(
    sources: Sequence[str | os.PathLike[str]] | Sequence[Mapping[str, Any]], on_bad_rows: str = "fail"
) -> list[Example]:
    """Read and check all rows of files and directories, or of rows in memory.

    Raises:
        DataError: rows cannot be used (each with file and line), or there are none.
    """
    reader = RowReader(on_bad_rows)
    if rows_given(sources):
        examples = list(reader.check(IN_MEMORY, in_memory(sources), Dataset()))
    else:
        files, _ = find_files(sources)  # type: ignore[arg-type]
        examples = [example for file in files for example in reader.read(file, Dataset())]
    reader.finish()
    return examples


def rows_given(sources: Sequence[Any]) -> bool:
    """Return whether `sources` are rows and not paths (an empty list is no paths either)."""
    return not all(isinstance(source, str | os.PathLike) for source in sources)


def read_eval_rows(
    sources: Sequence[str | os.PathLike[str]] | Sequence[Mapping[str, Any]],
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Turn rows like the training data's into a retrieval task.

    The corpus is every distinct text in `pos` and `neg`; rows with the same query are one query.

    Returns:
        corpus (passage id -> text), queries (query id -> text), qrels (query id -> {passage id: 1}).

    Raises:
        DataError: as `read_rows`.
    """
    passages: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for example in read_rows(sources):
        query_id = queries.setdefault(example.query, f"q{len(queries)}")
        for text in (*example.pos, *example.neg):
            passages.setdefault(text, f"p{len(passages)}")
        qrels.setdefault(query_id, {}).update({passages[text]: 1 for text in example.pos})
    return _by_id(passages), _by_id(queries), qrels


def _by_id(ids: Mapping[str, str]) -> dict[str, str]:
    return {identity: text for text, identity in ids.items()}


#: What was left out or changed -> how often.
Counts = Counter[str]
#: A file, files, or directories of files.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@contextmanager
def reading(sources: Paths, label: str, skip: int = 0) -> Iterator[Iterator[tuple[str, Any]]]:
    """Give ("file:line", raw row) of all files, the first `skip` left out unread, with a progress bar.

    Example:
        >>> with reading(["train.jsonl"], "clean", skip=out.done) as items:
        ...     for place, raw in items:
        ...         row = checked_row(place, raw)

    Raises:
        DataError: a file does not exist or cannot be read.
    """
    paths = file_paths(sources)
    with progress_bar(sum(map(os.path.getsize, paths)), label, "B") as bar:
        bar.unit_scale = True
        yield _raw(paths, skip, bar.update)


def file_paths(sources: Paths) -> list[str]:
    """Return the files that are meant, those of a directory sorted by name."""
    named = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    return [file.path for file in find_files(named)[0]]


def _raw(paths: Sequence[str], skip: int, on_bytes: Callable[[int], Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for path in paths:
        left = os.path.getsize(path)
        for place, raw in raw_rows(path):
            if number >= skip:
                yield place, raw
            number += 1
            if isinstance(raw, bytes):
                left -= len(raw)
                on_bytes(len(raw))
        on_bytes(left)


def checked_row(place: str, raw: Any, teacher: bool = False) -> Row:
    """Return a row of training data.

    Raises:
        DataError: it cannot be used; says where, why, and how to see all.
    """
    try:
        return parse_row(raw, teacher)
    except BadRow as error:
        raise DataError(f"{place}: {error} (ultrarag data check lists every bad row)") from error


def checked_object(place: str, raw: Any) -> dict[str, Any]:
    """Return a JSON object of any kind.

    Raises:
        DataError: it is none; says where and why.
    """
    if isinstance(raw, BadJson):
        raise DataError(f"{place}: {raw}")
    try:
        value = json.loads(raw) if isinstance(raw, bytes) else raw
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: {type(value).__name__} instead of a JSON object")
    return value


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as it stood in its file, unknown keys included."""
    return row.model_dump(exclude_unset=True)
