"""ArrowRows: checked rows as Arrow record batches, in memory or mapped from a file of any size."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ultrarag.types import Example

#: Counted up whenever what a row's columns mean changes: older caches are then built anew.
SCHEMA_VERSION = 1

_TEXTS = pa.list_(pa.string())
_NUMBERS = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("pos", _TEXTS, nullable=False),
        pa.field("neg", _TEXTS, nullable=False),
        pa.field("pos_scores", _NUMBERS),
        pa.field("neg_scores", _NUMBERS),
        pa.field("prompt", pa.string()),
        pa.field("type", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

#: A record batch is closed at this many rows or characters, whichever comes first.
_ROWS, _CHARACTERS = 1024, 1 << 24


def write_rows(examples: Iterable[Example], sink: Any) -> None:
    """Write an Arrow IPC file to `sink` (anything pyarrow can write to), holding one record batch at a time."""
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for rows in _grouped(examples):
            columns = [pa.array([getattr(row, item.name) for row in rows], item.type) for item in SCHEMA]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


def _grouped(examples: Iterable[Example]) -> Iterator[list[Example]]:
    rows: list[Example] = []
    characters = 0
    for example in examples:
        rows.append(example)
        characters += len(example.query) + sum(map(len, example.pos)) + sum(map(len, example.neg))
        if len(rows) == _ROWS or characters >= _CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def _bytes(texts: pa.StringArray) -> np.ndarray:
    """The length of each text."""
    import pyarrow.compute as pc

    return pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.float64)


def _sizes(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of each row's texts together, and how many there are."""
    offsets = lists.offsets.to_numpy()
    total = np.concatenate([[0.0], np.cumsum(_bytes(lists.values))])
    return total[offsets[1:]] - total[offsets[:-1]], np.diff(offsets)


class ArrowRows:
    """Rows by number; a mapped file is opened again in each process that receives it."""

    def __init__(self, source: str | pa.Buffer) -> None:
        self._source = source
        self._open()

    def _open(self) -> None:
        mapped = pa.memory_map(self._source) if isinstance(self._source, str) else pa.BufferReader(self._source)
        reader = pa.ipc.open_file(mapped)
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Example:
        which = bisect.bisect_right(self._ends, number)
        batch = self._batches[which]
        at = number - (self._ends[which] - batch.num_rows)
        cells = {item.name: batch.column(i)[at].as_py() for i, item in enumerate(SCHEMA)}
        values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in cells.items()}
        return Example(**values)

    def negatives(self) -> np.ndarray:
        """How many negatives each row has, (rows,) int32; reads offsets only."""
        neg = SCHEMA.get_field_index("neg")
        counts = [np.diff(batch.column(neg).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(counts).astype(np.int32) if counts else np.zeros(0, np.int32)

    def lengths(self) -> np.ndarray:
        """About how long each row's texts are, (rows,) float64: bytes of the query and of its mean passage."""
        names = ("query", "pos", "neg")
        query, pos, neg = (SCHEMA.get_field_index(name) for name in names)
        found = []
        for batch in self._batches:
            sums, counts = (
                sum(part) for part in zip(*(_sizes(batch.column(column)) for column in (pos, neg)), strict=True)
            )
            found.append(_bytes(batch.column(query)) + sums / np.maximum(counts, 1))
        return np.concatenate(found) if found else np.zeros(0)

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the query and the positives of each row, in order."""
        query, pos = SCHEMA.get_field_index("query"), SCHEMA.get_field_index("pos")
        for batch in self._batches:
            yield from zip(batch.column(query).to_pylist(), batch.column(pos).to_pylist(), strict=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._source = state["_source"]
        self._open()
