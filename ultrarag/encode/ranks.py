"""The passages of an index encoded by any number of processes of torchrun, on any number of machines.

A block is the passages of neighbouring rows, and one file; so it does not matter how many processes there are, which of
them ends when, or whether they are started again. A vector is found by the hash of its passage's text: a passage that
was changed meanwhile is simply not found, and the build encodes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encode.blocks import Blocks, Encode, encode_apart, encode_blocks
from ultrarag.errors import IndexStateError, UltraragError
from ultrarag.io import padded_sparse, padded_tokens, resource_error, write_bytes, write_json
from ultrarag.retrieve.passages import Store, content_hash
from ultrarag.types import Embeddings, Passage, Sparse, text_of

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

FOLDER = "encoded"
#: Rows of the store in a block.
CHUNK_TEXTS = 512
#: How long the ranks that are done wait for the others.
PATIENCE = timedelta(days=7)
_NOTE = "encoded.json"


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun, or SLURM with the same variables, has started."""

    number: int
    world: int
    local: int

    @staticmethod
    def of_environment() -> Rank:
        """What RANK, WORLD_SIZE and LOCAL_RANK say; a process by itself is the only one."""
        number, world, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Rank(int(number or 0), int(world or 1), int(local or 0))

    def device(self) -> str:
        """The GPU of this process, or the CPU."""
        import torch

        return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        """Wait until every rank is here; an error when one has ended without coming."""
        if self.world == 1:
            return
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=PATIENCE)
        dist.barrier()
        dist.destroy_process_group()


class Encoded(Blocks):
    """The vectors of one encoder in a folder below the index: blocks whose file is their mark."""

    def __init__(self, root: Path, fingerprint: str, heads: Sequence[str], precision: str, last: int = 0) -> None:
        """Name the folder, by whose vectors they are; nothing is made or read yet."""
        super().__init__(0, last, CHUNK_TEXTS)
        self._heads = tuple(heads)
        self._made_by = {"fingerprint": fingerprint, "heads": list(heads), "precision": precision, "block": CHUNK_TEXTS}
        digest = hashlib.sha256(json.dumps(self._made_by, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / FOLDER / digest
        self._written = 0
        self._held: dict[int, tuple[list[bytes], Embeddings]] = {}

    def is_done(self, block: int) -> bool:
        """Whether a block has its file."""
        return self._path(block).exists()

    def begin(self) -> None:
        """Make the folder, with a note of whose vectors it holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _NOTE, self._made_by)

    def encode(self, encoder: Encoder, store: Store, rank: Rank, after_row: int) -> int:
        """Encode a rank's blocks that have no file and rows after one, and return the number of passages.

        The blocks of rank r of w are r, r + w, r + 2w, ...
        """
        first = self.block_of(after_row + 1)
        blocks = [block for block in self.missing() if block >= first and block % rank.world == rank.number]
        self.begin()
        found = (
            (block, [passage.encodable for passage in passages_of(store, *self.rows_of(block))]) for block in blocks
        )
        try:
            encode_blocks(
                encoder,
                found,
                self.write,
                chunk_texts=self.chunk_texts,
                total=len(blocks) * self.chunk_texts,
                label=f"encode, rank {rank.number} of {rank.world}",
                heads=self._heads,
                progress=None if rank.number == 0 else False,
            )
        except (OSError, UltraragError):  # a full disk, a damaged file: no passage is at fault
            raise
        except Exception:  # a passage at fault, which the build that joins the blocks will list; or the encoder: raised
            for block in blocks:
                if not self.is_done(block):
                    self._encode_apart(encoder, store, block)
        return self._written

    def _encode_apart(self, encoder: Encoder, store: Store, block: int) -> None:
        """Encode and write what can be encoded of a block."""

        def encode(texts: Sequence[str | Passage]) -> Embeddings:
            return encoder.encode(list(texts), "passage", heads=self._heads, progress=False)

        found = encode_apart(passages_of(store, *self.rows_of(block)), encode)
        self.write(block, [passage.encodable for passage in found.passages], found.embeddings)

    def known(self, rows: Sequence[int]) -> Known:
        """What is held of the blocks of these rows (in ascending order)."""
        there = [block for block in sorted({self.block_of(row) for row in rows}) if self.is_done(block)]
        self._held = {block: self._held.get(block) or self._read(block) for block in there}
        return Known(list(self._held.values()))

    def remove(self) -> None:
        """Remove the folder: a build has taken what it holds."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, block: int, texts: Sequence[str | Passage], vectors: Embeddings | None) -> None:
        """Write the vectors of a block's texts, durably; None where it has no texts."""
        hashes = np.frombuffer(b"".join(content_hash(text_of(text)) for text in texts), np.uint8).reshape(-1, 32)
        held: dict[str, Any] = {"hashes": hashes, **({} if vectors is None else _flat(vectors))}
        content = io.BytesIO()
        np.savez(content, **held)
        write_bytes(self._path(block), content.getvalue())
        self._written += len(texts)

    def _read(self, block: int) -> tuple[list[bytes], Embeddings]:
        path = self._path(block)
        try:
            with np.load(path) as arrays:
                found = dict(arrays)
            return [bytes(row) for row in found.pop("hashes")], _unflat(found)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if condition := resource_error(error, path):
                raise condition from error
            advice = "delete it: its passages are encoded again"
            raise IndexStateError(f"'{path}' is damaged ({error}); {advice}") from error

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:09d}.npz"


class Known:
    """Vectors found by the hash of what was encoded."""

    def __init__(self, parts: Sequence[tuple[list[bytes], Embeddings]] = ()) -> None:
        held = [part for part in parts if part[0]]
        self._embeddings = [embeddings for _, embeddings in held]
        hashes = [hash for found, _ in held for hash in found]
        self._row, self._count = {hash: row for row, hash in enumerate(hashes)}, len(hashes)

    def fill(self, texts: Sequence[str | Passage], encode: Encode) -> Embeddings:
        """The vectors of texts, those that are not held made by `encode`."""
        rows = [self._row.get(content_hash(text_of(text))) for text in texts]
        new = [text for text, row in zip(texts, rows, strict=True) if row is None]
        if len(new) == len(texts):
            return encode(texts)
        parts = [*self._embeddings, *([encode(new).numpy()] if new else [])]
        fresh = count(self._count)
        return Embeddings.cat(parts)[np.array([next(fresh) if row is None else row for row in rows])]


def passages_of(store: Store, after: int, last: int, up_to_seq: int | None = None) -> list[Passage]:
    """The passages of the rows after one, up to another, as they are now; `up_to_seq` as in `scan`."""
    return [passage for row, passage in store.scan(after, last - after, up_to_seq) if row <= last]


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
