"""Apart: training rows that a refresh holds out itself, whole documents at a time, to choose by.

One part judges the rungs where no queries are given to judge by; another says when a query side has learned enough, and
at which rate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import DataError
from ultrarag.io import publish_directory, staged_directory
from ultrarag.retrieve.passages import Store
from ultrarag.retrieve.refresh.judging import Questions
from ultrarag.rows import BadRow, Row, as_json, find_files, in_memory, parse_row, raw_rows, rows_given, text_key
from ultrarag.rows.checks import DocumentGroups, hold_out

#: The parts of the rows that are held out: what judges rungs, and what stops a run and finds its rate.
JUDGE, STOP = "judge", "stop"
#: The share of the rows of each, and how many at most.
SHARES, MOST = {JUDGE: 0.15, STOP: 0.05}, {JUDGE: 1000, STOP: 200}
#: Rows that can stop a run at least; and passages of the index beside theirs that their queries are searched in.
FEWEST_STOP, SEARCHED = 20, 2000
#: Of the split.
_SEED = 42


@dataclass(frozen=True)
class _Part:
    """A file of rows, or rows in memory."""

    #: where its rows are written below the folder of training rows
    name: str
    #: what is given in its place: its own name, or that of the directory it came from
    given: str
    path: str | None = None


class Apart:
    """Training rows in parts that share no document."""

    def __init__(self, data: Any, parts: Sequence[str]) -> None:
        """Split rows, by what they are about; nothing is written.

        Args:
            data: what `refresh` is given as train_data.
            parts: those of `JUDGE` and `STOP` that are wanted.
        """
        self._data, self.names = data, list(parts)
        groups = DocumentGroups()
        self._read = [self._grouped(row, groups) for _, _, row in self._rows()]
        roots = groups.joined().roots()
        shares = {name: min(SHARES[name], MOST[name] / max(1, len(roots))) for name in parts}
        of_groups = iter(hold_out(roots, shares, _SEED) if len(roots) else ())
        # a row that cannot be read stays where the training says so
        self._of = np.array([int(next(of_groups)) if read else 0 for read in self._read], np.int8)

    @staticmethod
    def _grouped(row: Row | None, groups: DocumentGroups) -> bool:
        if row is not None:
            groups.add(row.query, row.pos, row.model_extra)
        return row is not None

    @property
    def total(self) -> int:
        """All rows."""
        return len(self._of)

    def count(self, name: str) -> int:
        """Rows of a part."""
        return int((self._of == self.names.index(name) + 1).sum()) if name in self.names else 0

    def rows(self, name: str) -> list[Row]:
        """The rows of a part that is held out."""
        number = self.names.index(name) + 1
        return [row for of, (_, _, row) in zip(self._of, self._rows(), strict=True) if of == number and row is not None]

    def questions(self, store: Store) -> Questions:
        """The queries of the part that judges, about the passages of the index that have their positives' texts."""
        rows = self.rows(JUDGE)
        wanted = {text_key(text) for row in rows for text in row.pos}
        ids: dict[int, list[str]] = {}
        for passage in store.passages():
            if (key := text_key(passage.content)) in wanted:
                ids.setdefault(key, []).append(passage.id)
        queries: dict[str, str] = {}
        qrels: dict[str, dict[str, int]] = {}
        for row in rows:
            name = f"held-out-{text_key(row.query)}"
            if found := [id for text in row.pos for id in ids.get(text_key(text), ())]:
                queries.setdefault(name, row.query)
                qrels.setdefault(name, {}).update(dict.fromkeys(found, 1))
        return Questions(queries, qrels)

    def write(self, folder: Path) -> list[str]:
        """Write the rows to train on into a new folder, unless it is there; returns what stands for the data."""
        if not folder.exists():
            with staged_directory(folder) as stage:
                for part in self._files:
                    (stage / part.name).parent.mkdir(parents=True, exist_ok=True)
                    (stage / part.name).touch()
                self._write(stage)
                publish_directory(stage, folder)
        return list(dict.fromkeys(str(folder / part.given) for part in self._files))

    def _write(self, folder: Path) -> None:
        kept: dict[str, list[bytes]] = {}
        for of, (part, raw, row) in zip(self._of, self._rows(), strict=True):
            if of == 0:
                line = raw if row is None else json.dumps(self._without_held(row), ensure_ascii=False).encode()
                kept.setdefault(part.name, []).append(_line(line))
        for name, lines in kept.items():
            (folder / name).write_bytes(b"".join(lines))

    def _without_held(self, row: Row) -> dict[str, Any]:
        """A row without the negatives that are right for held-out queries."""
        found = as_json(row)
        kept = [place for place, text in enumerate(row.neg or []) if text_key(text) not in self._held]
        if row.neg and len(kept) < len(row.neg):
            for name in ("neg", "neg_scores"):
                if found.get(name):
                    found[name] = [found[name][place] for place in kept]
        return found

    @cached_property
    def _held(self) -> set[int]:
        return {text_key(text) for name in self.names for row in self.rows(name) for text in row.pos}

    @cached_property
    def _files(self) -> list[_Part]:
        if not isinstance(self._data, str | os.PathLike) and rows_given(self._data):
            return [_Part("rows.jsonl", "rows.jsonl")]
        given = [self._data] if isinstance(self._data, str | os.PathLike) else list(self._data)
        found = []
        for number, source in enumerate(given):
            folder = f"{number}-{Path(source).name}" if Path(source).is_dir() else str(number)
            for file in find_files([source])[0]:
                name = f"{folder}/{file.name}.jsonl"
                found.append(_Part(name, folder if file.folder else name, file.path))
        return found

    def _rows(self) -> Iterator[tuple[_Part, Any, Row | None]]:
        """Yield (part, the raw row, the row; None where it cannot be used)."""
        for part in self._files:
            for _, raw in in_memory(self._data) if part.path is None else raw_rows(part.path):
                try:
                    yield part, raw, parse_row(raw)
                except BadRow:
                    yield part, raw, None


def _line(raw: Any) -> bytes:
    if isinstance(raw, bytes):
        return raw.rstrip(b"\r\n") + b"\n"
    try:
        return json.dumps(raw, ensure_ascii=False).encode() + b"\n"
    except TypeError as error:
        raise DataError(f"a row of the training data cannot be written: {error} (ultrarag data check)") from error


def held_out(data: Any, judge: bool, stop: bool) -> Apart | None:
    """Hold rows out for what is asked; what stops a run only where that leaves enough to tell."""
    wanted = [name for name, asked in ((JUDGE, judge), (STOP, stop)) if asked]
    found = Apart(data, wanted) if wanted else None
    if found is not None and stop and found.count(STOP) < FEWEST_STOP:
        return held_out(data, judge, False)
    return found


def stopping_rows(apart: Apart, store: Store) -> list[dict[str, Any]]:
    """The rows that stop a run, as evaluation data: their passages among others of the index."""
    rows = [{"query": row.query, "pos": list(row.pos)} for row in apart.rows(STOP)]
    right = {text_key(text) for row in rows for text in row["pos"]}
    sample = [passage for passage in store.sample(SEARCHED, store.last_seq()) if not passage.blank]
    others = [passage.content for passage in sample if text_key(passage.content) not in right]
    return [{**rows[0], "neg": others}, *rows[1:]]
