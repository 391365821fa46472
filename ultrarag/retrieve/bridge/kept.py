"""Kept: new vectors that are made before the build comes to their passages, in a file that several processes share."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ultrarag.rows import text_key
from ultrarag.types import Embeddings, Passage

#: The file in the bridge's folder.
KEPT = "vectors.sqlite"
#: Encodes passages with the new encoder.
EncodePassages = Callable[[Sequence[str | Passage]], Embeddings]


class Kept:
    """New vectors by passage, durably; each belongs to one text, so that a passage that changed has none."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._mutex = threading.Lock()
        with self._mutex, self._db:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS kept (id TEXT PRIMARY KEY, text INTEGER, vector BLOB)")

    def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Keep the vectors, (n, d), of passages as they are now."""
        rows = [
            (passage.id, text_key(passage.content), vector.astype("<f4").tobytes())
            for passage, vector in zip(passages, vectors, strict=True)
        ]
        with self._mutex, self._db:
            self._db.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)

    def of(self, passages: Sequence[Passage]) -> dict[str, np.ndarray]:
        """The vectors of those passages that have one."""
        found: dict[str, np.ndarray] = {}
        texts = {passage.id: text_key(passage.content) for passage in passages}
        with self._mutex:
            for id, text, vector in self._rows(list(texts)):
                if texts[id] == text:
                    found[id] = np.frombuffer(vector, "<f4")
        return found

    def _rows(self, ids: list[str]) -> Iterator[tuple[str, int, bytes]]:
        for start in range(0, len(ids), 500):  # SQLite's limit on parameters
            part = ids[start : start + 500]
            marks = ",".join("?" * len(part))
            yield from self._db.execute(f"SELECT id, text, vector FROM kept WHERE id IN ({marks})", part)

    def missing(self, passages: Sequence[Passage]) -> list[Passage]:
        """The passages without a vector."""
        held = self.of(passages)
        return [passage for passage in passages if passage.id not in held]

    def __len__(self) -> int:
        with self._mutex:
            return int(self._db.execute("SELECT COUNT(*) FROM kept").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._db.close()


def fill(kept: Kept, passages: Sequence[Passage], encode: EncodePassages) -> int:
    """Encode those of the passages that have no vector yet, and keep these; returns how many."""
    missing = kept.missing(passages)
    if missing:
        kept.add(missing, np.asarray(encode([passage.encodable for passage in missing]).numpy().dense))
    return len(missing)


def count_kept(folder: Path) -> int:
    """How many vectors the file in a bridge's folder holds, from any process; 0 without a file."""
    if not (path := folder / KEPT).is_file():
        return 0
    kept = Kept(path)
    try:
        return len(kept)
    finally:
        kept.close()
