"""The cache of checked rows: read and checked once, then mapped from disk by every process and every later run.

A manifest, named by what the rows depend on, names a file of rows, named by its own content. Both appear whole or
not at all, and two runs that build the same cache at once write the same bytes under the same name.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ultrarag.errors import DataError
from ultrarag.io import sha256_of, sync_directory, user_cache
from ultrarag.rows.files import DataFile
from ultrarag.rows.reader import Dataset, RowReader
from ultrarag.types import Example

_STAGE = ".stage"
#: Seconds after which what a killed process left behind is removed.
_STALE = 24 * 3600


@dataclass
class CheckedRows:
    """The usable rows of some files, one after the other, and what was found while reading them."""

    rows: ArrowRows
    #: one per file
    datasets: list[Dataset]
    notes: list[str]
    #: SHA-256 of the files' content
    digest: str
    #: path -> SHA-256 of each file
    files: dict[str, str] = field(default_factory=dict)


def cached_rows(files: Sequence[DataFile], reader: RowReader, cache_path: str | os.PathLike[str] | None) -> CheckedRows:
    """Return the rows of `files` from the cache; they are read, checked and cached first where they are not in it.

    Raises:
        DataError: rows cannot be used, or the cache cannot be written.
    """
    folder = Path(cache_path) if cache_path else default_cache()
    contents = [_content(file) for file in files]
    digest = hashlib.sha256("".join(contents).encode()).hexdigest()
    manifest = folder / f"{_key(files, contents, reader)}.json"
    found = _read(manifest, digest) or _build(manifest, digest, files, contents, reader)
    return replace(found, files={file.path: content for file, content in zip(files, contents, strict=True)})


def default_cache() -> Path:
    """Where checked rows are kept."""
    return user_cache("data")


def _content(file: DataFile) -> str:
    try:
        return sha256_of(Path(file.path))
    except OSError as error:
        raise DataError(f"cannot read '{file.path}': {error.strerror}") from error


def _key(files: Sequence[DataFile], contents: Sequence[str], reader: RowReader) -> str:
    # the paths count too: rows carry theirs
    parts = [SCHEMA_VERSION, reader.on_bad_rows, reader.teacher, [file.path for file in files], list(contents)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(manifest: Path, digest: str) -> CheckedRows | None:
    """Return what the manifest names, or None where it, or the rows, are missing or damaged."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        rows = manifest.with_name(f"{found['sha256']}.arrow")
        if sha256_of(rows) != found["sha256"]:
            return None
        return CheckedRows(
            ArrowRows(str(rows)), [Dataset(**item) for item in found["datasets"]], found["notes"], digest
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _build(
    manifest: Path, digest: str, files: Sequence[DataFile], contents: Sequence[str], reader: RowReader
) -> CheckedRows:
    datasets = [Dataset() for _ in files]
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(manifest.parent)
        with _stage(manifest.parent) as stage:
            with open(stage, "wb") as file:
                write_rows(_examples(files, contents, reader, datasets), file)
                _sync(file)
            content = sha256_of(stage)
            os.replace(stage, manifest.with_name(f"{content}.arrow"))
        found = {"sha256": content, "datasets": [asdict(item) for item in datasets], "notes": reader.notes}
        _write_manifest(manifest, found)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of training data in '{manifest.parent}': {error.strerror or error}; "
            "name another directory with --cache_path"
        ) from error
    return CheckedRows(ArrowRows(str(manifest.with_name(f"{content}.arrow"))), datasets, reader.notes, digest)


def _examples(
    files: Sequence[DataFile], contents: Sequence[str], reader: RowReader, datasets: Sequence[Dataset]
) -> Iterator[Example]:
    for file, content, dataset in zip(files, contents, datasets, strict=True):
        yield from reader.read(file, dataset)
        if _content(file) != content:
            raise DataError(f"'{file.path}' was changed while it was read; start again when it is finished")
    reader.finish()


def _write_manifest(manifest: Path, value: dict[str, Any]) -> None:
    with _stage(manifest.parent) as stage:
        with open(stage, "wb") as file:
            file.write(json.dumps(value, indent=1).encode())
            _sync(file)
        os.replace(stage, manifest)
    sync_directory(manifest.parent)


@contextlib.contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """Give a new file of a random name (process numbers repeat between machines that share a disk)."""
    handle, name = tempfile.mkstemp(_STAGE, ".", folder)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_stale(folder: Path) -> None:
    for left in folder.glob(f".*{_STAGE}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()


#: Counted up whenever what a row's columns mean, or which rows are refused, changes: older caches are then built anew.
SCHEMA_VERSION = 2

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

#: A record batch ends at this many rows or characters, whichever comes first.
_CHUNK_ROWS, _CHUNK_CHARACTERS = 1024, 1 << 24


def write_rows(examples: Iterable[Example], sink: Any) -> None:
    """Write an Arrow IPC file to `sink` (anything pyarrow can write to), holding one record batch at a time."""
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for rows in _chunks(examples):
            columns = [pa.array([getattr(row, item.name) for row in rows], item.type) for item in SCHEMA]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    rows: list[Example] = []
    characters = 0
    for example in examples:
        rows.append(example)
        characters += len(example.query) + sum(map(len, example.pos)) + sum(map(len, example.neg))
        if len(rows) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
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
