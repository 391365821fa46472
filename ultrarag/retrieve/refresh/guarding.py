"""Guarding: the vectors of the guard's own corpus, kept in the index for all encoders with the same passage side."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ultrarag.encode import CorpusVectors, passage_keys
from ultrarag.encoder import Encoder
from ultrarag.io import write_bytes
from ultrarag.types import Passage

#: The folder below the index; it holds the vectors of one corpus by one passage side.
FOLDER = "guard"


def guard_vectors(root: Path, encoder: Encoder, passages: Sequence[Passage]) -> CorpusVectors:
    """The dense vectors of passages that are not in the index: read, or encoded once and kept."""
    path = root / FOLDER / f"{_digest(encoder, passages)}.npy"
    dense = _read(path)
    if dense is None or dense.shape != (len(passages), encoder.dim):
        made = CorpusVectors.of(encoder, passages, ("dense",))
        dense = np.asarray(made.read(np.arange(len(made)), ("dense",)).dense)
        for stale in path.parent.glob("*.npy"):
            stale.unlink()
        path.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.save(content, dense, allow_pickle=False)
        write_bytes(path, content.getvalue())
    ids = [passage.id for passage in passages]
    return CorpusVectors(encoder.passage_fingerprint, ids, passage_keys(passages), dense)


def _digest(encoder: Encoder, passages: Sequence[Passage]) -> str:
    found = hashlib.sha256(f"{encoder.passage_fingerprint} {encoder.precision}".encode())
    for passage in passages:
        for part in (passage.id, passage.content):
            found.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return found.hexdigest()


def _read(path: Path) -> np.ndarray | None:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
        return found
    except (OSError, ValueError, EOFError):  # not there, or damaged: made anew
        return None
