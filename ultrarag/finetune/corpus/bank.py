"""Bank: the stored passages of a corpus as what the queries of a step are compared with.

Row numbers are those of the corpus; behind them come passages that only the training rows hold, which the frozen side
has encoded once. Up to `FULL_ROWS` passages all of them are negatives at every step. Of larger corpora a step takes the
passages nearest to its queries and a sample of the others, each of which stands for as many as it was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ultrarag.encode import CorpusVectors, KeyIndex
from ultrarag.errors import DataError, TrainingError
from ultrarag.finetune.batches import Batch, Draws, TrainData
from ultrarag.io import replacing
from ultrarag.rows import text_key
from ultrarag.scores import head_scores
from ultrarag.types import Embeddings, Passage, text_of

#: Passages up to which all of them are negatives at every step, and the memory that they may take for that.
FULL_ROWS, FULL_BYTES = 100_000, 2 << 30
#: Negatives of a step where they are a sample; with ColBERT, whose scores cost hundreds of products each.
SAMPLE, SAMPLE_COLBERT = 8192, 1024
#: Of those, the nearest to each query, as the model saw them when the epoch began.
NEAREST = 16
#: Says that a stream of draws is this one: see the first numbers of the others in `plan.py`.
_CORPUS = 4

_Text = TypeVar("_Text", bound=str | Passage)


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """The keys of texts, (n,) int64."""
    return np.array([text_key(text) for text in texts], np.int64)


class Bank:
    """Passages by row number, on a device."""

    def __init__(self, vectors: CorpusVectors, heads: Sequence[str], device: torch.device) -> None:
        self.vectors, self.heads, self.device = vectors, tuple(heads), device
        self._more: Embeddings | None = None
        self._more_keys = np.zeros(0, np.int64)
        self._everything: Embeddings | None = None

    def __len__(self) -> int:
        return len(self.vectors) + len(self._more_keys)

    def add(self, texts: Iterable[_Text], encode: Callable[[list[_Text]], Embeddings]) -> int:
        """Have those of the texts encoded that are no passage of the corpus; how many there were."""
        # of equal keys the first text counts
        distinct = {text_key(text_of(text)): text for text in reversed(list(texts))}
        keys = np.array(list(reversed(distinct)), np.int64)
        found = np.zeros(len(keys), bool)
        found[self.rows_of(keys)[0]] = True
        missing = keys[~found]
        if len(missing):
            encoded = encode([distinct[key] for key in missing.tolist()])
            self._more = encoded if self._more is None else Embeddings.cat([self._more, encoded])
            self._more_keys, self._everything = np.concatenate([self._more_keys, missing]), None
        return len(missing)

    def rows_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every row with one of the keys: pairs (place in `keys`, row), each (pairs,) int64."""
        stored = self.vectors.rows_of(keys)
        more = KeyIndex(self._more_keys, len(self.vectors) + np.arange(len(self._more_keys))).find(keys)
        return np.concatenate([stored[0], more[0]]), np.concatenate([stored[1], more[1]])

    def row_of(self, keys: np.ndarray) -> np.ndarray:
        """One row for each key, (n,) int64: that whose whole content has it, before one whose text alone does.

        Raises:
            DataError: there is none.
        """
        places, rows = self.rows_of(keys)
        stored = rows < len(self.vectors)
        whole = ~stored
        whole[stored] = self.vectors.keys[rows[stored], 0] == np.asarray(keys)[places[stored]]
        found = np.full(len(keys), -1, np.int64)
        best = np.lexsort((rows, ~whole, places))[::-1]  # assigned last: the best of each place
        found[places[best]] = rows[best]
        if (found < 0).any():
            raise DataError(f"{int((found < 0).sum())} passages of the training rows have no stored vector")
        return found

    def read(self, rows: np.ndarray) -> Embeddings:
        """The vectors of rows, (n,) int64, in that order, as float32 tensors."""
        if self._everything is not None:
            return self._everything[torch.as_tensor(rows, device=self.device)]
        stored = rows < len(self.vectors)
        if stored.all():
            return self._moved(self.vectors.read(rows, self.heads))
        assert self._more is not None
        parts = [self.vectors.read(rows[stored], self.heads), self._more[rows[~stored] - len(self.vectors)]]
        parts = [part for part in parts if len(part)]
        order = np.argsort(np.concatenate([np.flatnonzero(stored), np.flatnonzero(~stored)]), kind="stable")
        return self._moved(Embeddings.cat(parts)[order])

    def everything(self) -> Embeddings:
        """All rows, held on the device from now on."""
        if self._everything is None:
            self._everything = self.read(np.arange(len(self)))
        return self._everything

    @property
    def fits(self) -> bool:
        """Whether all rows may be negatives at every step; of ColBERT's vectors only a few hundred passages' may."""
        if "colbert" in self.heads:
            return len(self) <= SAMPLE_COLBERT
        first = self.vectors.read(np.arange(min(64, len(self.vectors))), self.heads)
        per_row = sum(array.nbytes for array in first.arrays()) / len(first)
        return len(self) <= FULL_ROWS and len(self) * per_row <= FULL_BYTES

    def _moved(self, embeddings: Embeddings) -> Embeddings:
        return embeddings.map(lambda array: torch.as_tensor(array, device=self.device))


class Known:
    """The positives of each query over all rows of a run, as keys."""

    def __init__(self, parts: Sequence[TrainData]) -> None:
        rows = (data[number] for data in parts for number in range(len(data)))
        pairs = [(text_key(row.query), text_key(text)) for row in rows for text in row.pos]
        distinct = np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)
        self._index = KeyIndex(distinct[:, 0], distinct[:, 1])

    def of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (place in `queries`, key of a positive) for the keys of some queries."""
        return self._index.find(queries)


@dataclass(frozen=True)
class Columns:
    """The passages of the corpus that stand against a step's queries."""

    #: (columns,) int64, ascending
    rows: np.ndarray
    #: (columns,) float32: the logarithm of how many passages each stands for; None: each for itself
    offsets: np.ndarray | None = None

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows stand: (which of them are there, their columns)."""
        at = np.minimum(np.searchsorted(self.rows, rows), max(0, len(self.rows) - 1))
        there = self.rows[at] == rows if len(self.rows) else np.zeros(len(rows), bool)
        return np.flatnonzero(there), at[there]


def draw_columns(total: int, count: int, nearest: np.ndarray, *key: int) -> Columns:
    """The passages nearest to a step's queries, and a sample of the others, about `count` in all.

    The sum over the sample, each passage weighted by how many it stands for, is on average that over the corpus.

    Args:
        total: passages of the corpus.
        nearest: row numbers, of any shape; those below 0 are none.
        key: makes the draw another one: seed and step.
    """
    certain = np.unique(nearest[nearest >= 0])
    drawn = np.unique(Draws(_CORPUS, *key).all_below(total, max(1, count - len(certain))))
    others = np.setdiff1d(drawn, certain, assume_unique=True)
    rows = np.sort(np.concatenate([certain, others]))
    weight = (total - len(certain)) / max(1, len(others))
    offsets = np.where(np.isin(rows, certain, assume_unique=True), 0.0, math.log(max(1.0, weight)))
    return Columns(rows, offsets.astype(np.float32))


class Nearest:
    """The passages nearest to each training query, as a model saw them at some time."""

    def __init__(self, queries: np.ndarray, rows: np.ndarray) -> None:
        """Hold keys of queries, (n,) int64, and the row numbers of each one's passages, (n, k)."""
        self.queries, self.rows = queries, rows
        self._index = KeyIndex(queries, np.arange(len(queries)))

    def of(self, queries: np.ndarray) -> np.ndarray:
        """The rows of some queries, (n, k); -1 where a query is not known."""
        found = np.full((len(queries), self.rows.shape[1]), -1, np.int64)
        places, numbers = self._index.find(queries)
        found[places] = self.rows[numbers]
        return found

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        with replacing(path) as file:
            np.save(file, np.concatenate([self.queries[:, None], self.rows], axis=1), allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> Nearest:
        """Read what `save` wrote.

        Raises:
            TrainingError: it is not there, or damaged.
        """
        try:
            table = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"'{path}', the hard negatives with which this epoch began, cannot be read ({error}), so that the run "
                "cannot go on as it would have: start it anew in another output_dir"
            ) from error
        return cls(table[:, 0], table[:, 1:])


@torch.no_grad()
def nearest_rows(bank: Bank, queries: Embeddings, k: int, head: str, block: int = 16_384) -> np.ndarray:
    """The k best passages of each query by one head, (queries, k) int64, best first; exact, a block at a time."""
    asked = queries.map(lambda array: torch.as_tensor(array, device=bank.device))
    scores = torch.full((len(queries), 0), -torch.inf, device=bank.device)
    rows = torch.zeros((len(queries), 0), dtype=torch.int64, device=bank.device)
    for start in range(0, len(bank), block):
        numbers = np.arange(start, min(start + block, len(bank)))
        part = head_scores(asked, bank.read(numbers))[head]
        more = torch.as_tensor(numbers, device=bank.device).expand(len(queries), -1)
        scores, rows = torch.cat([scores, part], 1), torch.cat([rows, more], 1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        rows = rows.gather(1, best)
    return rows.cpu().numpy()


@dataclass
class CorpusBatch:
    """What a step needs to know of its texts, looked up where they are tokenized."""

    #: (queries,) int64
    queries: np.ndarray
    #: (queries * group,) int64
    passages: np.ndarray
    #: pairs (query, key of one of its positives)
    positives: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, batch: Batch, known: Known) -> CorpusBatch:
        """Look at a batch."""
        queries = keys_of(batch.queries)
        return cls(queries, keys_of(batch.passages), known.of(queries))


@dataclass
class Opponents:
    """What the loss sees in place of a batch's passages: the groups' own, then those of the corpus."""

    passage: Embeddings
    #: (queries, passages) bool: no negatives of the query
    mask: Tensor
    #: (passages,) float32, or None
    offsets: Tensor | None


def mask_of_groups(batch: CorpusBatch, keys: np.ndarray, group_size: int, whole: bool, alone: bool) -> np.ndarray:
    """Which of a batch's passages are no negatives: (queries, passages) bool; never a query's own positive.

    Args:
        keys: (passages,) of this rank's passages, then of other ranks'.
        whole: a query's own candidates are never hidden: a teacher has scored them.
        alone: the other queries' passages are hidden, since the corpus holds them too.
    """
    count = len(batch.queries)
    mask = np.full((count, len(keys)), alone)
    own = np.arange(count)[:, None], np.arange(count)[:, None] * group_size + np.arange(group_size)
    mask[own] = False
    pairs, columns = KeyIndex(keys, np.arange(len(keys))).find(batch.positives[1])
    mask[batch.positives[0][pairs], columns] = True
    mask[own if whole else (own[0][:, 0], own[1][:, 0])] = False
    return mask


def mask_of_columns(bank: Bank, batch: CorpusBatch, columns: Columns, group_size: int) -> np.ndarray:
    """Which passages of the corpus are no negatives, (queries, columns) bool: a query's positives and own candidates.

    The latter stand in its group already. Passages with the same text are the same passage.
    """
    mask = np.zeros((len(batch.queries), len(columns.rows)), bool)
    group = np.arange(len(batch.passages)) // group_size
    for query, keys in (batch.positives, (group, batch.passages)):
        pairs, rows = bank.rows_of(keys)
        there, at = columns.places(rows)
        mask[query[pairs[there]], at] = True
    return mask
