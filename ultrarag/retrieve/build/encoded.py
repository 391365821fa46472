"""Encoded: vectors of an index's passages made ahead of a build, by any number of processes, block by block.

A block is the passages of a fixed stretch of row numbers, and one file; so it does not matter how many processes there
are, which of them ends when, or whether they are started again. A vector is found by the hash of its passage's text: a
passage that was changed meanwhile is simply not found, and the build encodes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.io import padded_sparse, padded_tokens, sync_directory, write_json
from ultrarag.retrieve.generation import encode_apart
from ultrarag.retrieve.passages import Store, content_hash
from ultrarag.types import Embeddings, Passage, Sparse

FOLDER = "encoded"
#: Rows of the store in a block.
BLOCK = 512
_KEY = "encoded.json"
_Encode = Callable[[Sequence[str]], Embeddings]


class Encoded:
    """The vectors of one encoder, in a folder below the index."""

    def __init__(self, root: Path, fingerprint: str, heads: Sequence[str], precision: str) -> None:
        """Name the folder; nothing is made or read yet."""
        key = {"fingerprint": fingerprint, "heads": list(heads), "precision": precision, "block": BLOCK}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self._key = root / FOLDER / digest, key
        self._held: dict[int, tuple[list[bytes], Embeddings]] = {}

    def prepare(self) -> None:
        """Make the folder, with a note of whose vectors these are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _KEY, self._key)

    def missing(self, last_row: int) -> list[int]:
        """The blocks, up to that of a row, that have no file."""
        return [block for block in range(block_of(last_row) + 1) if not self._path(block).exists()]

    def write(self, block: int, passages: Sequence[Passage], encode: _Encode) -> None:
        """Encode a block's passages and write its file, all of it or nothing."""
        content = io.BytesIO()
        found = encode_apart(passages, encode)  # the build lists the others
        texts = [passage.content for passage in found.passages]
        hashes = np.frombuffer(b"".join(map(content_hash, texts)), np.uint8).reshape(-1, 32)
        arrays = _flat(found.embeddings.numpy()) if found.embeddings is not None else {}
        held: dict[str, Any] = {"hashes": hashes, **arrays}
        np.savez(content, **held)
        self._publish(block, content.getvalue())

    def known(self, rows: Sequence[int]) -> Known:
        """What is held of the blocks of these rows (in ascending order)."""
        blocks = sorted({block_of(row) for row in rows})
        there = [block for block in blocks if self._path(block).exists()]
        self._held = {block: self._held.get(block) or self._read(block) for block in there}
        return Known(list(self._held.values()))

    def remove(self) -> None:
        """Remove the folder: a build has taken what it holds."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, block: int) -> tuple[list[bytes], Embeddings]:
        path = self._path(block)
        try:
            with np.load(path) as arrays:
                found = dict(arrays)
            return [bytes(row) for row in found.pop("hashes")], _unflat(found)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            advice = "delete it: its passages are encoded again"
            raise IndexStateError(f"'{path}' is damaged ({error}); {advice}") from error

    def _publish(self, block: int, content: bytes) -> None:
        """Write beside, under a name that no other process of any machine has, and rename."""
        stage = self.folder / f".{block}.{socket.gethostname()}.{os.getpid()}.tmp"
        with open(stage, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, self._path(block))
        sync_directory(self.folder)

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:09d}.npz"


class Known:
    """Vectors found by the hash of what was encoded."""

    def __init__(self, parts: Sequence[tuple[list[bytes], Embeddings]] = ()) -> None:
        held = [part for part in parts if part[0]]
        self._embeddings = [embeddings for _, embeddings in held]
        hashes = [hash for found, _ in held for hash in found]
        self._row, self._count = {hash: row for row, hash in enumerate(hashes)}, len(hashes)

    def fill(self, texts: Sequence[str], encode: _Encode) -> Embeddings:
        """The vectors of texts, those that are not held made by `encode`."""
        rows = [self._row.get(content_hash(text)) for text in texts]
        new = [text for text, row in zip(texts, rows, strict=True) if row is None]
        if len(new) == len(texts):
            return encode(texts)
        parts = [*self._embeddings, *([encode(new).numpy()] if new else [])]
        fresh = count(self._count)
        return Embeddings.cat(parts)[np.array([next(fresh) if row is None else row for row in rows])]


def block_of(row: int) -> int:
    """The block of a row of the store; rows count from 1."""
    return (row - 1) // BLOCK


def passages_of(store: Store, block: int) -> list[Passage]:
    """A block's passages, as they are now."""
    first = block * BLOCK
    return [passage for row, passage in store.scan(first, BLOCK) if row <= first + BLOCK]


def _flat(embeddings: Embeddings) -> dict[str, np.ndarray]:
    """Arrays without padding: token heads as one row per token, and how many each text has."""
    found: dict[str, np.ndarray] = {}
    if embeddings.dense is not None:
        found["dense"] = embeddings.dense
    if embeddings.sparse is not None:
        used = embeddings.sparse.ids != Sparse.PAD_ID
        found |= {"sparse_counts": used.sum(1), "sparse_ids": embeddings.sparse.ids[used]}
        found["sparse_weights"] = embeddings.sparse.weights[used]
    if embeddings.colbert is not None:
        used = embeddings.mask.astype(bool)
        found |= {"colbert_counts": used.sum(1), "colbert": embeddings.colbert[used]}
    return found


def _unflat(arrays: dict[str, np.ndarray]) -> Embeddings:
    result = Embeddings()
    if "colbert" in arrays:
        result = padded_tokens(arrays["colbert_counts"], arrays["colbert"])
    if "sparse_ids" in arrays:
        result.sparse = padded_sparse(*(arrays[f"sparse_{name}"] for name in ("counts", "ids", "weights")))
    result.dense = arrays.get("dense")
    return result
