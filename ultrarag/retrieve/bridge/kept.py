"""Kept: new vectors that are made before the build comes to their passages, in a file that several processes share."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from ultrarag.rows import text_key
from ultrarag.types import Embeddings, Passage

#: The file in the bridge's folder.
KEPT = "vectors.sqlite"
#: Vectors that are held in memory at most, and seconds between two looks for more.
MOST_FRESH, EVERY = 100_000, 1.0
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

    def after(self, row: int, most: int) -> list[tuple[int, str, bytes]]:
        """(row, id, vector) of what was kept after a row, the earliest first."""
        query = "SELECT rowid, id, vector FROM kept WHERE rowid > ? ORDER BY rowid LIMIT ?"
        with self._mutex:
            return self._db.execute(query, (row, most)).fetchall()

    def __len__(self) -> int:
        with self._mutex:
            return int(self._db.execute("SELECT COUNT(*) FROM kept").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._db.close()


class Fresh:
    """The kept vectors in memory, to be searched: candidates that the old vectors would not give."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._mutex = kept, threading.Lock()
        self._ids: list[str] = []
        self._vectors: np.ndarray | None = None
        self._last, self._looked = 0, 0.0

    def search(self, vector: np.ndarray, k: int) -> list[str]:
        """Ids of the k best, in no order; some may have been deleted or changed since, as whoever scores them sees."""
        with self._mutex:
            self._look()
            ids, vectors = self._ids, self._vectors
        if vectors is None:
            return []
        scores = vectors[: len(ids)] @ vector
        best = np.argpartition(-scores, k)[:k] if len(scores) > k else range(len(scores))
        return [ids[row] for row in best]

    def _look(self) -> None:
        """Take over what was kept since, by whichever process, once a second and `MOST_FRESH` at most."""
        if time.monotonic() - self._looked < EVERY or len(self._ids) >= MOST_FRESH:
            return
        self._looked = time.monotonic()
        rows = self._kept.after(self._last, MOST_FRESH - len(self._ids))
        if not rows:
            return
        new = np.stack([np.frombuffer(vector, "<f4") for _, _, vector in rows])
        self._vectors = new if self._vectors is None else np.concatenate([self._vectors, new])
        self._ids, self._last = [*self._ids, *(id for _, id, _ in rows)], rows[-1][0]


def fill(kept: Kept, passages: Sequence[Passage], encode: EncodePassages) -> int:
    """Encode those of the passages that have no vector yet, and keep these; returns how many."""
    missing = kept.missing(passages)
    if missing:
        kept.add(missing, np.asarray(encode([passage.encodable for passage in missing]).numpy().dense))
    return len(missing)


def count_kept(folder: Path) -> int:
    """How many vectors the file in a bridge's folder holds, from any process; 0 where it is gone."""
    path = (folder / KEPT).absolute()
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT COUNT(*) FROM kept").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
