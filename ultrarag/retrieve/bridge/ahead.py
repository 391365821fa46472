"""Ahead: which passages a builder encodes before all others, and the vectors that a bridge keeps, which it takes.

The sample has its vectors; what searches meet, the bridge's own thread encodes; and the builder goes by the residual
that the sample predicts, the worst mapped first: a passage whose mapped vector is far from its new one gains most.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.encode import CHUNK_TEXTS, Known
from ultrarag.io import progress_bar, write_bytes
from ultrarag.maps import LinearMap, fit_ridge
from ultrarag.retrieve.bridge.kept import KEPT, EncodePassages, Kept, fill
from ultrarag.retrieve.bridge.state import read_state
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.passages import Store, content_hash
from ultrarag.types import Embeddings, Passage

logger = logging.getLogger("ultrarag")

#: Ids of passages, one JSON string a line, in the bridge's folder.
ORDER = "order.jsonl"
#: Passages whose order is worth a file; all others come as they stand in the index.
ORDERED = 100_000
#: Penalties of the prediction, as multiples of the mean variance of a coordinate, and passages encoded at a time.
_PENALTIES, _CHUNK = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0), 128


@dataclass(frozen=True)
class Predicted:
    """How far a passage's mapped vector will be from its new one: a linear function of the old one."""

    #: (d,)
    weight: np.ndarray
    bias: float

    @classmethod
    def of(cls, old: np.ndarray, new: np.ndarray, item: LinearMap) -> Predicted:
        """Learn it from a sample's vectors, (n, d) each.

        Args:
            item: the map that serves; of a fitted one each half's residual is under a map fitted to the other half.
        """
        residual = np.zeros(len(old))
        fitted = item.digest != LinearMap.identity(item.dim, item.normalize).digest
        for half in (np.arange(len(old)) % 2 == 0, np.arange(len(old)) % 2 == 1):
            held_out = fit_ridge(old[~half], new[~half], normalize=item.normalize).map if fitted else item
            residual[half] = np.square(held_out.apply(old[half]) - new[half]).sum(1)
        held = np.arange(len(old)) % 5 == 0
        tried = [_ridge(old[~held], residual[~held], penalty) for penalty in _PENALTIES]
        errors = [float(np.square(item.apply(old[held]) - residual[held]).mean()) for item in tried]
        return _ridge(old, residual, _PENALTIES[int(np.argmin(errors))])

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """The squared distance of old vectors, (n, d) -> (n,)."""
        found: np.ndarray = vectors @ self.weight + self.bias
        return found


def _ridge(old: np.ndarray, wanted: np.ndarray, penalty: float) -> Predicted:
    middle, mean = old.mean(0), wanted.mean()
    centred = old - middle
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += penalty * max(float(np.trace(gram)) / len(gram), 1e-12)
    weight = np.linalg.solve(gram, centred.T @ (wanted - mean))
    return Predicted(weight, float(mean - middle @ weight))


def write_order(core: Core, predicted: Predicted, folder: Path) -> None:
    """Write which passages a builder encodes first, by the stored vectors of the live generation, read in blocks."""
    ids, scores = np.zeros(0, object), np.zeros(0)
    vectors_of = core.live.generation.vectors_of
    for row in range(0, core.store.last_row(), CHUNK_TEXTS):
        passages, held = core.stored(row, row + CHUNK_TEXTS, vectors_of, ("dense",))
        if held is None:
            continue
        ids = np.concatenate([ids, np.array([passage.id for passage in passages], object)])
        scores = np.concatenate([scores, predicted.apply(np.asarray(held.dense))])
        best = np.argsort(-scores, kind="stable")[:ORDERED]
        ids, scores = ids[best], scores[best]
    lines = "".join(json.dumps(id, ensure_ascii=False) + "\n" for id in ids)
    write_bytes(folder / ORDER, lines.encode())


class KeptAhead:
    """A bridge's order and vectors, for the builder of its generation; without a bridge, of nothing.

    The bridge may end, and its folder be removed, while the builder runs: then it goes on as without one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept = Kept(folder / KEPT) if folder is not None else None

    @classmethod
    def of(cls, root: Path, generation: Generation) -> KeptAhead:
        """What serves over the index now, if that is this generation's encoder."""
        state = read_state(root)
        fits = state is not None and (state["generation"], state["fingerprint"]) == (
            generation.id,
            generation.fingerprint,
        )
        return cls(root / "bridge" if fits else None)

    def fill(self, store: Store, encode: EncodePassages, progress: bool | None) -> int:
        """Encode the passages of the order that have no vector, and keep these; returns how many were encoded."""
        if self._kept is None or self._folder is None or not (self._folder / ORDER).is_file():
            return 0
        ids = [json.loads(line) for line in (self._folder / ORDER).read_text(encoding="utf-8").splitlines()]
        done = 0
        try:
            with progress_bar(len(ids), "encode, the worst mapped first", "passage", progress) as bar:
                for chunk in _chunks(ids):
                    done += fill(self._kept, list(store.get(chunk).values()), encode)
                    bar.update(len(chunk))
        except sqlite3.Error as error:
            self._end(error)
        return done

    def known(self, passages: Sequence[Passage]) -> Known:
        """The vectors that are kept of some passages."""
        if self._kept is None:
            return Known()
        try:
            held = self._kept.of(passages)
        except sqlite3.Error as error:
            self._end(error)
            return Known()
        hashes = [content_hash(passage.content) for passage in passages if passage.id in held]
        vectors: Any = [held[passage.id] for passage in passages if passage.id in held]
        return Known([(hashes, Embeddings(dense=np.stack(vectors)))] if hashes else [])

    def close(self) -> None:
        """Close the file."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _end(self, error: sqlite3.Error) -> None:
        logger.warning("the bridge has ended (%s); the build goes on without what it kept", error)
        self.close()


def _chunks(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))
