"""Vectors: the vectors of numbered texts in plain files, appended chunk by chunk and safe once committed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ultrarag.errors import DataError
from ultrarag.io.durable import write_json
from ultrarag.types import Embeddings, Sparse

_STATE = "vectors.json"
#: Texts read at a time when all are searched.
CHUNK_TEXTS = 16_384


class Column:
    """An array on disk, (rows, width), that grows at its end; rows are read by a range, or by number."""

    def __init__(self, path: Path, dtype: str, width: int = 1) -> None:
        self.dtype, self.width = np.dtype(dtype), width
        self.size = self.dtype.itemsize * width
        self._file: BinaryIO = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by Vectors

    def cut(self, rows: int) -> None:
        """Forget all rows after the first so many."""
        if os.fstat(self._file.fileno()).st_size < rows * self.size:
            raise DataError(f"'{self._file.name}' is shorter than its state says; remove its folder and start again")
        self._file.truncate(rows * self.size)

    def append(self, rows: np.ndarray) -> None:
        """Add rows at the end."""
        content = memoryview(np.ascontiguousarray(rows, self.dtype).tobytes())
        while content:
            content = content[self._file.write(content) :]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, (n, width)."""
        # read, not mapped: pages that are mapped would count as this process's memory
        content = bytearray((stop - start) * self.size)
        view, place = memoryview(content), start * self.size
        while view:
            done = os.preadv(self._file.fileno(), [view], place)
            if not done:
                raise DataError(f"'{self._file.name}' ends before row {stop}; remove its folder and start again")
            view, place = view[done:], place + done
        return np.frombuffer(content, self.dtype).reshape(-1, self.width)

    def sync(self) -> None:
        """Make what was appended durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Ragged:
    """Rows of different lengths on disk: one column or more of their elements, and where each row ends."""

    def __init__(self, folder: Path, name: str, columns: dict[str, Column]) -> None:
        self.columns = columns
        self._ends_file = Column(folder / f"{name}.ends", "<i8")
        #: where each row ends, (rows,)
        self.ends = np.zeros(0, np.int64)

    def cut(self, rows: int) -> None:
        self._ends_file.cut(rows)
        self.ends = self._ends_file.read(0, rows).reshape(-1).astype(np.int64)
        for column in self.columns.values():
            column.cut(int(self.ends[-1]) if rows else 0)

    def append(self, lengths: np.ndarray, elements: dict[str, np.ndarray]) -> None:
        last = self.ends[-1] if len(self.ends) else 0
        ends = last + np.cumsum(lengths)
        self._ends_file.append(ends)
        self.ends = np.concatenate([self.ends, ends])
        for name, column in self.columns.items():
            column.append(elements[name])

    def rows(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
        """The lengths of rows, (n,), and the elements of each, per column."""
        stops = self.ends[numbers]
        starts = np.where(np.asarray(numbers) > 0, self.ends[np.asarray(numbers) - 1], 0)
        spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
        parts = {name: [column.read(*span) for span in spans] for name, column in self.columns.items()}
        return stops - starts, parts

    @property
    def files(self) -> list[Column]:
        return [self._ends_file, *self.columns.values()]


class Vectors:
    """Vectors of texts 0, 1, 2, ... for some heads; `append` adds the next ones, `commit` makes them durable."""

    def __init__(self, folder: Path, heads: Sequence[str], dtype: str = "float32") -> None:
        self.folder, self.heads, self.dtype = folder, tuple(heads), dtype
        self._dense: Column | None = None
        self._sparse: Ragged | None = None
        self._colbert: Ragged | None = None
        #: how many texts have vectors
        self.rows = 0
        self._resume()

    def append(self, embeddings: Embeddings) -> None:
        """Add the vectors of the next texts; heads that are not kept here are left out."""
        embeddings = only(embeddings, self.heads)
        self._columns(_widths(embeddings))
        if self._dense is not None and embeddings.dense is not None:
            self._dense.append(embeddings.dense)
        if self._sparse is not None and embeddings.sparse is not None:
            held = embeddings.sparse.ids >= 0
            elements = {"ids": embeddings.sparse.ids[held], "weights": embeddings.sparse.weights[held]}
            self._sparse.append(held.sum(1), elements)
        if self._colbert is not None:
            tokens = embeddings.mask.astype(bool)
            self._colbert.append(tokens.sum(1), {"tokens": embeddings.colbert[tokens]})
        self.rows += len(embeddings)

    def commit(self) -> None:
        """Make what was appended durable."""
        for file in self._files():
            file.sync()
        write_json(self.folder / _STATE, {"rows": self.rows, "widths": self._widths})

    def chunks(self, stop: int) -> Iterator[tuple[int, Embeddings]]:
        """Yield (first number, its dense and sparse vectors) of the texts before `stop`, a chunk at a time."""
        for start in range(0, stop, CHUNK_TEXTS):
            end = min(start + CHUNK_TEXTS, stop)
            dense = None if self._dense is None else self._dense.read(start, end).astype(np.float32, copy=False)
            sparse = None if self._sparse is None else padded_sparse(*_contiguous(self._sparse, start, end))
            yield start, Embeddings(dense=dense, sparse=sparse)

    def gather(self, numbers: np.ndarray, head: str) -> Embeddings:
        """The vectors of given texts, by one head."""
        if head == "dense" and self._dense is not None:
            rows = [self._dense.read(number, number + 1) for number in numbers.tolist()]
            return Embeddings(dense=np.concatenate(rows).astype(np.float32, copy=False))
        if head == "sparse" and self._sparse is not None:
            lengths, parts = self._sparse.rows(numbers)
            return Embeddings(
                sparse=padded_sparse(lengths, *(np.concatenate(parts[n]).ravel() for n in ("ids", "weights")))
            )
        if head == "colbert" and self._colbert is not None:
            lengths, parts = self._colbert.rows(numbers)
            return padded_tokens(lengths, np.concatenate(parts["tokens"]))
        raise KeyError(head)

    def cut(self, rows: int) -> None:
        """Forget all texts after the first so many."""
        for part in (self._dense, self._sparse, self._colbert):
            if part is not None:
                part.cut(rows)
        self.rows = rows

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Dense vectors start to stop as they are stored, (n, width)."""
        if self._dense is None:
            raise KeyError("dense")
        return self._dense.read(start, stop)

    def read(self, start: int, stop: int) -> Embeddings:
        """All heads of texts start to stop."""
        numbers = np.arange(start, stop)
        parts = [self.gather(numbers, head) for head in self.heads]
        found = Embeddings()
        for part in parts:
            for name in ("dense", "sparse", "colbert", "mask"):
                if (value := getattr(part, name)) is not None:
                    setattr(found, name, value)
        return found

    def close(self) -> None:
        """Close the files."""
        for file in self._files():
            file.close()

    def _resume(self) -> None:
        """Go back to what was committed last."""
        if (self.folder / _STATE).is_file():
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            self.rows = state["rows"]
            self._columns(state["widths"])
            for part in (self._dense, self._sparse, self._colbert):
                if part is not None:
                    part.cut(self.rows)

    def _columns(self, widths: dict[str, int]) -> None:
        """Open the files, once the widths of the vectors are known."""
        if self._files():
            return
        self._widths = widths
        fresh = not self.rows
        if "dense" in widths:
            self._dense = Column(self.folder / "dense.bin", self.dtype, widths["dense"])
        if "sparse" in widths:
            columns = {"ids": Column(self.folder / "ids.bin", "<i4"), "weights": Column(self.folder / "w.bin", "<f4")}
            self._sparse = Ragged(self.folder, "sparse", columns)
        if "colbert" in widths:
            columns = {"tokens": Column(self.folder / "tokens.bin", self.dtype, widths["colbert"])}
            self._colbert = Ragged(self.folder, "colbert", columns)
        if fresh:  # what a process left that was killed before its first commit
            for part in (self._dense, self._sparse, self._colbert):
                if part is not None:
                    part.cut(0)

    def _files(self) -> list[Column]:
        ragged = [part for part in (self._sparse, self._colbert) if part is not None]
        return [*([self._dense] if self._dense else []), *(file for part in ragged for file in part.files)]


def only(embeddings: Embeddings, heads: Sequence[str]) -> Embeddings:
    """The same texts with some of the heads."""
    kept = {head: getattr(embeddings, head) for head in heads}
    return Embeddings(**kept, mask=embeddings.mask if "colbert" in heads else None)


def _widths(embeddings: Embeddings) -> dict[str, int]:
    found = {"sparse": 1} if embeddings.sparse is not None else {}
    for head in ("dense", "colbert"):
        if (array := getattr(embeddings, head)) is not None:
            found[head] = int(array.shape[-1])
    return found


def _contiguous(ragged: Ragged, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, ids and weights of neighbouring rows, in one read each."""
    first = int(ragged.ends[start - 1]) if start else 0
    ends = ragged.ends[start:stop]
    ids, weights = (ragged.columns[name].read(first, int(ends[-1])).ravel() for name in ("ids", "weights"))
    return np.diff(ends, prepend=first), ids, weights


def padded_sparse(lengths: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Sparse:
    """Rows of different lengths, (texts,), whose elements follow each other, as padded arrays."""
    held = np.arange(max(1, int(lengths.max(initial=0)))) < lengths[:, None]
    padded = Sparse(np.full(held.shape, Sparse.PAD_ID, np.int64), np.zeros(held.shape, np.float32))
    padded.ids[held], padded.weights[held] = ids, weights
    return padded


def padded_tokens(lengths: np.ndarray, tokens: np.ndarray) -> Embeddings:
    """Token vectors that follow each other, (tokens, dim), as padded arrays with their mask."""
    held = np.arange(max(1, int(lengths.max(initial=0)))) < lengths[:, None]
    padded = np.zeros((*held.shape, tokens.shape[1]), np.float32)
    padded[held] = tokens
    return Embeddings(colbert=padded, mask=held.astype(np.int64))
