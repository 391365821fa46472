"""An encoded corpus: a folder of vectors, maybe compressed, as `encode_corpus` writes it and anybody reads it.

The folder holds `encoding.json` (whose vectors, of what), `ids.txt` (a JSON string per line) and a shard per process
with its rows in order. A row's place is its passage's line. Dense vectors may have fewer dimensions, and 16 or 8 bits
for each, or one; rows are compressed one by one, so that a row's code does not depend on what else is stored. Bytes per
vector of d dimensions: float32 4 d, float16 2 d, int8 d + 4, binary d / 8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.encode.blocks import CHUNK_TEXTS
from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.io import Column, Vectors, only
from ultrarag.types import Embeddings

INFO, IDS, SCALES = "encoding.json", "ids.txt", "scale.bin"
FORMATS = ("float32", "float16", "int8", "binary")


@dataclass(frozen=True)
class Compression:
    """How dense vectors are stored."""

    #: of each number: float32, float16, int8 or binary
    format: str = "float32"
    #: only the first dimensions; None: all. For models trained with Matryoshka losses (`--use_mrl`).
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                f"format '{self.format}' is unknown{did_you_mean(self.format, FORMATS)} ({', '.join(FORMATS)})"
            )
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise UsageError(f"truncate_dim is {self.truncate_dim}; it must be at least 1")

    def encode(self, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compress vectors.

        Args:
            dense: (n, dim) float32.

        Returns:
            The codes, (n, width) of the format's type, and each row's scale, (n,) float32.
        """
        dense = truncated(dense, self.truncate_dim)
        ones = np.ones(len(dense), np.float32)
        if self.format == "binary":
            return np.packbits(dense > 0, axis=1), np.full(len(dense), dense.shape[1] ** -0.5, np.float32)
        if self.format != "int8":
            return dense.astype(self.format, copy=False), ones
        scale = np.abs(dense).max(axis=1).astype(np.float32) / 127
        safe = np.where(scale > 0, scale, 1)
        return np.rint(dense / safe[:, None]).astype(np.int8), safe.astype(np.float32)

    def decode(self, codes: np.ndarray, scale: np.ndarray, dim: int) -> np.ndarray:
        """Return what `encode` stored, (n, dim) float32; of binary vectors the signs, at unit length."""
        if self.format == "binary":
            signs = np.unpackbits(codes, axis=1, count=dim).astype(np.float32) * 2 - 1
            return signs * scale[:, None]
        found = codes.astype(np.float32, copy=False)
        return found * scale[:, None] if self.format == "int8" else found


def truncated(dense: np.ndarray, dim: int | None) -> np.ndarray:
    """The first dimensions of vectors; those of unit length have it again.

    Source:
        Matryoshka Representation Learning (Kusupati et al., 2022).

    Raises:
        UsageError: there are not so many.
    """
    if dim is None or dim == dense.shape[1]:
        return dense
    if dim > dense.shape[1]:
        raise UsageError(f"truncate_dim is {dim}, but the vectors have {dense.shape[1]} dimensions")
    kept = dense[:, :dim]
    unit = np.abs(np.linalg.norm(dense, axis=1) - 1) < 1e-3
    length = np.linalg.norm(kept, axis=1)
    factor = np.where(unit & (length > 0), 1 / np.maximum(length, 1e-12), 1)
    return (kept * factor[:, None]).astype(np.float32)


class Shard:
    """The vectors of neighbouring rows, in files; what `encode_rest` appends to."""

    def __init__(self, folder: Path, info: dict[str, Any], number: int) -> None:
        self.folder = folder / f"shard-{number:05d}"
        self.folder.mkdir(exist_ok=True)
        self.compression, self.dim = Compression(**info["compression"]), info["dim"]
        dtype = {"binary": "uint8"}.get(self.compression.format, self.compression.format)
        others = [head for head in info["heads"] if head != "dense"]
        self._dense = Vectors(self._sub("dense"), ["dense"], dtype) if "dense" in info["heads"] else None
        self._others = Vectors(self._sub("others"), others) if others else None
        self._scale = Column(self.folder / SCALES, "<f4")
        parts = [part for part in (self._dense, self._others) if part is not None]
        #: what all files hold durably
        self.rows = min(part.rows for part in parts)
        for part in parts:
            part.cut(self.rows)
        self._scale.cut(self.rows if self._dense else 0)

    def _sub(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        for part in (self._dense, self._others, self._scale):
            if part is not None:
                part.close()

    def append(self, embeddings: Embeddings) -> None:
        """Add the next rows."""
        if self._dense is not None:
            codes, scale = self.compression.encode(embeddings.dense)
            self._dense.append(Embeddings(dense=codes))
            self._scale.append(scale[:, None])
        if self._others is not None:
            self._others.append(only(embeddings, self._others.heads))

    def commit(self) -> None:
        """Make the rows durable."""
        self._scale.sync()
        for part in (self._dense, self._others):
            if part is not None:
                part.commit()
                self.rows = part.rows

    def read(self, start: int, stop: int) -> Embeddings:
        """Rows start to stop; dense vectors as float32."""
        found = self._others.read(start, stop) if self._others else Embeddings()
        if self._dense is not None:
            codes, scale = self._dense.codes(start, stop), self._scale.read(start, stop).reshape(-1)
            found.dense = self.compression.decode(codes, scale, self.dim)
        return found


def committed_rows(folder: Path, heads: Sequence[str]) -> int:
    """Rows that all shards hold so far, while other processes write them."""
    states = folder.glob(f"shard-*/{'dense' if 'dense' in heads else 'others'}/vectors.json")
    return sum(int(json.loads(state.read_text(encoding="utf-8"))["rows"]) for state in states)


class EncodedCorpus:
    """What `encode_corpus` wrote: passages' ids and vectors, read a block at a time.

    Example:
        >>> for ids, vectors in EncodedCorpus("encoded").blocks():
        ...     vectors.dense.shape
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a finished folder; DataError when it is none."""
        self.folder = Path(folder)
        try:
            self.info: dict[str, Any] = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"'{self.folder}' holds no encoding ({error})") from error
        if not self.info["finished"]:
            raise DataError(f"'{self.folder}' is not finished: run the same `ultrarag data encode` again to go on")

    def __len__(self) -> int:
        return int(self.info["corpus"]["passages"])

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        return str(self.info["fingerprint"])

    def ids(self) -> Iterator[str]:
        """The passages' ids, in their order."""
        with open(self.folder / IDS, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file)

    def blocks(self, size: int = CHUNK_TEXTS) -> Iterator[tuple[list[str], Embeddings]]:
        """Yield ids and vectors of `size` passages at a time."""
        ids = self.ids()
        for number, (start, stop) in enumerate(self.info["shards"]):
            with Shard(self.folder, self.info, number) as shard:
                for first in range(0, stop - start, size):
                    last = min(first + size, stop - start)
                    yield list(islice(ids, last - first)), shard.read(first, last)

    def dense(self) -> np.ndarray:
        """All dense vectors, (passages, dim) float32, in memory."""
        return np.concatenate([vectors.dense for _, vectors in self.blocks()])
