"""CorpusVectors: the stored vectors of a whole corpus, with what tells whose text a row is.

Training one side of a model against the other, frozen one needs the vectors of all passages and no passage's text: a
training row's passage is found by the key of its text. The vectors come from a folder that `ultrarag data encode` wrote
(mapped from disk, so that they take no memory of their own), or from whoever holds them, such as a live index.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encode.blocks import CHUNK_TEXTS
from ultrarag.encode.corpus import EncodedCorpus
from ultrarag.errors import DataError, FingerprintError, UsageError
from ultrarag.io import Vectors
from ultrarag.rows import text_key
from ultrarag.types import HEADS, Embeddings, Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Of an encoded corpus: two keys for each passage, (passages, 2) int64.
KEYS = "keys.bin"
_EXACT = ("float32", "float16")

#: Gives the vectors of some rows, (n,) int64, by some heads: `Embeddings` of numpy arrays.
Read = Callable[[np.ndarray, tuple[str, ...]], Embeddings]


def passage_keys(passages: Iterable[Passage]) -> np.ndarray:
    """Two keys for each passage, (passages, 2) int64: of title and text as they are encoded, and of the text alone."""
    found = [(text_key(passage.content), text_key(passage.text)) for passage in passages]
    return np.array(found, np.int64).reshape(-1, 2)


def write_keys(path: Path, passages: Iterable[Passage]) -> None:
    """Write the keys of a corpus, durably, however many passages it has."""
    source = iter(passages)
    with open(path, "wb") as file:
        while part := list(islice(source, CHUNK_TEXTS)):
            file.write(passage_keys(part).astype("<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


class KeyIndex:
    """Values by keys, of which several may be equal."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Sort what belongs together: keys and values, each (n,) int64."""
        order = np.argsort(keys, kind="stable")
        self._keys, self._values = keys[order], values[order]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (place in `keys`, value), each (pairs,) int64, in order of place, then as the values were given."""
        keys = np.asarray(keys, np.int64)
        first, last = (np.searchsorted(self._keys, keys, side) for side in ("left", "right"))
        counts = last - first
        places = np.repeat(np.arange(len(keys)), counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return places, self._values[np.repeat(first, counts) + within]


class CorpusVectors:
    """The vectors of passages 0, 1, 2, ..., read by row number.

    Attributes:
        fingerprint: the identity of the passage side that made them (`Encoder.passage_fingerprint`).
        ids: (n,) the passages' ids.
        keys: (n, 2) int64, see `passage_keys`.
        heads: the heads that are stored.

    Example:
        >>> vectors = CorpusVectors.open("encoded")
        >>> vectors.read(np.array([3, 1]), ("dense",)).dense.shape
        (2, 384)
    """

    def __init__(
        self,
        fingerprint: str,
        ids: Sequence[str],
        keys: np.ndarray,
        dense: np.ndarray | None = None,
        *,
        others: Read | None = None,
        heads: Sequence[str] = ("dense",),
    ) -> None:
        """Hold arrays that are there already.

        Args:
            keys: (n, 2) int64, see `passage_keys`.
            dense: (n, dim) float32 or float16, in memory or mapped.
            others: reads the heads other than dense, where `heads` names some; and dense where `dense` is None.

        Raises:
            DataError: the parts do not fit together.
        """
        self.fingerprint, self.ids, self.keys = fingerprint, ids, keys
        self.heads = tuple(head for head in HEADS if head in heads)
        self._dense, self._others = dense, others
        lengths = {len(ids), len(keys), *([] if dense is None else [len(dense)])}
        if len(lengths) != 1 or keys.ndim != 2 or keys.shape[1] != 2:
            raise DataError(f"vectors of a corpus: {len(ids)} ids, keys of shape {keys.shape}, {lengths} rows in all")
        if not len(ids):
            raise DataError("vectors of a corpus: there are no passages")
        if others is None and (dense is None or self.heads != ("dense",)):
            raise DataError(f"vectors of a corpus: nothing reads the heads {', '.join(self.heads)}")
        self._index: KeyIndex | None = None

    @classmethod
    def open(cls, folder: str | Path) -> CorpusVectors:
        """Open what `ultrarag data encode` wrote.

        Raises:
            DataError: it is unfinished, or has no keys, since an earlier version wrote it.
            UsageError: its vectors are rounded to 8 bits or to signs, or cut, so that they are not the model's.
        """
        corpus = EncodedCorpus(folder)
        info, found = corpus.info, Path(folder)
        compression = info["compression"]
        if compression["format"] not in _EXACT or compression["truncate_dim"]:
            raise UsageError(
                f"'{found}' holds vectors in format {compression['format']}, truncate_dim "
                f"{compression['truncate_dim']}: training needs the model's own, so encode with --format float32 or "
                "float16, of all dimensions"
            )
        rows = len(corpus)
        if not (found / KEYS).is_file() or os.path.getsize(found / KEYS) != rows * 16:
            raise DataError(
                f"'{found}' has no '{KEYS}' for its {rows} passages, by which a training row finds its passage: encode "
                "it again, with --overwrite"
            )
        keys = np.memmap(found / KEYS, "<i8", "r", shape=(rows, 2))
        shards = _Shards(found, info)
        dense = shards.only_dense()
        return cls(corpus.fingerprint, list(corpus.ids()), keys, dense, others=shards.read, heads=info["heads"])

    @classmethod
    def of(cls, encoder: Encoder, passages: Sequence[Passage], heads: Sequence[str] | None = None) -> CorpusVectors:
        """Encode passages into memory, for corpora that are small."""
        chosen = tuple(heads or encoder.heads)
        vectors = encoder.encode([passage.encodable for passage in passages], "passage", heads=chosen)
        ids = [passage.id for passage in passages]
        return cls(
            encoder.passage_fingerprint,
            ids,
            passage_keys(passages),
            vectors.dense,
            others=lambda rows, asked: _kept(vectors[rows], asked),
            heads=chosen,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, encoder: Encoder, heads: Sequence[str]) -> None:
        """Refuse vectors of another passage side, or without a head that is needed.

        Raises:
            FingerprintError, UsageError: see above.
        """
        mine = encoder.passage_fingerprint
        if self.fingerprint != mine:
            raise FingerprintError(
                f"the corpus' vectors were made by passage side {self.fingerprint[:12]}, and the model to train has "
                f"{mine[:12]} (weights, instructions and lengths count): encode the corpus with this model, as it is "
                "before training (ultrarag data encode)"
            )
        missing = [head for head in heads if head not in self.heads]
        if missing:
            raise UsageError(
                f"the corpus' vectors have the heads {', '.join(self.heads)}, and {', '.join(heads)} are trained: "
                f"encode it with --heads {' '.join(heads)}, or train fewer (--heads)"
            )

    def read(self, rows: np.ndarray, heads: Sequence[str]) -> Embeddings:
        """The vectors of some rows, (n,) int64, in that order, as float32 numpy arrays."""
        rows, asked = np.asarray(rows, np.int64), tuple(heads)
        rest = tuple(head for head in asked if head != "dense" or self._dense is None)
        found = self._others(rows, rest) if rest and self._others else Embeddings()
        if "dense" in asked and self._dense is not None:
            found.dense = np.asarray(self._dense[rows], np.float32)
        return found

    def blocks(self, heads: Sequence[str], size: int = 16_384) -> Iterator[tuple[int, Embeddings]]:
        """Yield (first row, vectors) of `size` rows at a time."""
        for start in range(0, len(self), size):
            yield start, self.read(np.arange(start, min(start + size, len(self))), heads)

    def rows_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which rows have a key: pairs (place in `keys`, row), each (pairs,) int64, in order of place and row.

        Args:
            keys: (n,) int64, of `text_key`.
        """
        if self._index is None:
            flat = np.asarray(self.keys).reshape(-1)  # a row's two keys are neighbours
            self._index = KeyIndex(flat, np.arange(len(flat)) // 2)
        places, rows = self._index.find(keys)
        pairs = np.unique(np.stack([places, rows], axis=1), axis=0)
        return pairs[:, 0], pairs[:, 1]


def _kept(embeddings: Embeddings, heads: Sequence[str]) -> Embeddings:
    kept: dict[str, Any] = {head: getattr(embeddings, head) for head in heads}
    return Embeddings(**kept, mask=embeddings.mask if "colbert" in heads else None)


class _Shards:
    """The shards of an encoded corpus, read by row number over all of them."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.stops = np.array([stop for _, stop in info["shards"]], np.int64)
        self.starts = np.array([start for start, _ in info["shards"]], np.int64)
        names = [folder / f"shard-{number:05d}" for number in range(len(self.starts))]
        dtype = np.dtype(info["compression"]["format"])
        shape = [(int(stop - start), info["dim"]) for start, stop in info["shards"]]
        self.dense: list[np.ndarray] = []
        self.others: list[Vectors] = []
        if "dense" in info["heads"]:
            self.dense = [_mapped(name / "dense" / "dense.bin", dtype, s) for name, s in zip(names, shape, strict=True)]
        rest = [head for head in info["heads"] if head != "dense"]
        if rest:
            self.others = [Vectors(name / "others", rest) for name in names]
            weakref.finalize(self, _close, self.others)

    def only_dense(self) -> np.ndarray | None:
        """The dense vectors as one array, where they are one shard's."""
        return self.dense[0] if len(self.dense) == 1 else None

    def read(self, rows: np.ndarray, heads: tuple[str, ...]) -> Embeddings:
        """The vectors of rows by heads."""
        shard = np.searchsorted(self.stops, rows, side="right")
        parts, order = [], []
        for number in np.unique(shard):
            places = np.flatnonzero(shard == number)
            parts.append(self._read(int(number), rows[places] - self.starts[number], heads))
            order.append(places)
        if not parts:
            return self._read(0, rows, heads)
        found = Embeddings.cat(parts)
        return found[np.argsort(np.concatenate(order), kind="stable")] if len(parts) > 1 else found

    def _read(self, number: int, rows: np.ndarray, heads: tuple[str, ...]) -> Embeddings:
        found = Embeddings()
        for head in heads:
            if head == "dense":
                found.dense = np.asarray(self.dense[number][rows], np.float32)
            else:
                part = self.others[number].gather(rows, head)
                found.sparse = part.sparse if head == "sparse" else found.sparse
                if head == "colbert":
                    found.colbert, found.mask = part.colbert, part.mask
        return found


def _close(parts: Sequence[Vectors]) -> None:
    for part in parts:
        part.close()


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray:
    if not shape[0]:  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    if not path.is_file() or os.path.getsize(path) < shape[0] * shape[1] * dtype.itemsize:
        raise DataError(f"'{path}' is shorter than its corpus: encode it again")
    return np.memmap(path, dtype, "r", shape=shape)
