"""CorpusNegatives: a run's queries against the stored passages of the corpus, whichever side is trained.

With the passage side frozen, a batch's own passages come from the store too and are never encoded. With passages in
training, the stored vectors are a memory bank of stale ones beside the batch's fresh passages.

Source:
    Cross-Batch Memory (Wang et al., 2020) for stale vectors; hard negatives taken anew from the index: ANCE (Xiong et
    al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.errors import TrainingError
from ultrarag.finetune.batches import Batch
from ultrarag.finetune.corpus.bank import (
    NEAREST,
    SAMPLE,
    SAMPLE_COLBERT,
    Bank,
    Columns,
    CorpusBatch,
    Known,
    Nearest,
    Opponents,
    draw_columns,
    keys_of,
    mask_of_columns,
    mask_of_groups,
    nearest_rows,
)
from ultrarag.types import Embeddings

#: A query as it is asked: its text, and its row's own instruction (None: the run's).
Asked = tuple[str, str | None]
#: Encodes queries that have one instruction.
EncodeQueries = Callable[[list[str], str | None], Embeddings]


def encode_asked(asked: Sequence[Asked], encode: EncodeQueries) -> Embeddings:
    """Encode queries, those of one instruction together; in the order given."""
    places: dict[str | None, list[int]] = {}
    for place, (_, prompt) in enumerate(asked):
        places.setdefault(prompt, []).append(place)
    parts = [encode([asked[place][0] for place in chosen], prompt) for prompt, chosen in places.items()]
    order = np.argsort(np.concatenate([np.array(chosen) for chosen in places.values()]), kind="stable")
    return Embeddings.cat(parts)[order]


@dataclass
class FrozenQueries:
    """The vectors of a run's queries, encoded once by a query side that does not change."""

    numbers: dict[Asked, int]
    vectors: Embeddings

    @classmethod
    def of(cls, asked: Sequence[Asked], encode: EncodeQueries) -> FrozenQueries:
        """Encode the distinct ones."""
        distinct = list(dict.fromkeys(asked))
        return cls({item: number for number, item in enumerate(distinct)}, encode_asked(distinct, encode))

    def read(self, numbers: np.ndarray, device: torch.device) -> Embeddings:
        """The vectors of queries by number."""
        return self.vectors[numbers].map(lambda array: torch.as_tensor(array, device=device))


@dataclass
class CorpusNegatives:
    """What stands against the queries of each step."""

    bank: Bank
    known: Known
    #: the side that does not change
    frozen: Literal["query", "passage"] | None
    seed: int = 42
    #: negatives of a step; None: all
    count: int | None = None
    #: the map of the passage side that is in training, with `weight` and `bias`, and what holds it to the identity
    map: nn.Module | None = None
    strength: float = 0.0
    queries: FrozenQueries | None = None
    nearest: Nearest | None = None
    _stage: int = field(default=-1, repr=False)

    @classmethod
    def size(cls, bank: Bank, asked: int | None) -> int | None:
        """How many negatives a step has; None: all of them.

        Args:
            asked: what the run's flags say; None: as many as suit the corpus and the heads.
        """
        if asked is None:
            asked = None if bank.fits else SAMPLE_COLBERT if "colbert" in bank.heads else SAMPLE
        return None if asked is None or asked >= len(bank) else asked

    # ---- where a batch is tokenized

    def features(self, batch: Batch) -> dict[str, Any]:
        """Look up what a step needs to know of its texts."""
        found: dict[str, Any] = {"keys": CorpusBatch.of(batch, self.known)}
        if self.frozen == "passage":
            found["rows"] = self.bank.row_of(found["keys"].passages)
        if self.queries:
            asked = zip(batch.queries, batch.prompts, strict=True)
            found["queries"] = np.array([self.queries.numbers[item] for item in asked], np.int64)
        return found

    # ---- where a step is taken

    def query(self, features: dict[str, Any]) -> Embeddings:
        """The queries' vectors, where their side is frozen."""
        assert self.queries is not None
        return self.queries.read(features["queries"], self.bank.device)

    def nearest_to(self, features: dict[str, Any]) -> np.ndarray:
        """The mined passages of a batch's queries, (queries, k); -1 where there is none."""
        queries = features["keys"].queries
        return self.nearest.of(queries) if self.nearest else np.full((len(queries), 1), -1, np.int64)

    def columns(self, step: int, nearest: np.ndarray) -> Columns:
        """The passages of the corpus of a step, the same on all ranks.

        Args:
            nearest: the mined passages of all ranks' queries.
        """
        if self.count is None:
            return Columns(np.arange(len(self.bank)))
        return draw_columns(len(self.bank), self.count, nearest, self.seed, step)

    def opponents(
        self,
        features: dict[str, Any],
        fresh: Embeddings | None,
        keys: np.ndarray,
        columns: Columns,
        group_size: int,
        whole: bool,
    ) -> Opponents:
        """What the loss sees as passages.

        Args:
            fresh: the batch's passages as the model in training encodes them, maybe other ranks' behind; None: frozen.
            keys: those of `fresh`, or of the batch's own passages.
            whole: a query's own candidates are never hidden: a teacher has scored them.
        """
        batch: CorpusBatch = features["keys"]
        stored, own = self._stored(columns, features["rows"] if fresh is None else None)
        groups = mask_of_groups(batch, keys, group_size, whole, alone=fresh is None)
        corpus = mask_of_columns(self.bank, batch, columns, group_size)
        if fresh is not None:  # what the batch holds fresh is left out of the stale ones
            corpus[:, columns.places(self.bank.rows_of(keys)[1])[1]] = True
        first = own if fresh is None else fresh
        assert first is not None
        mask = torch.from_numpy(np.concatenate([groups, corpus], axis=1)).to(self.bank.device)
        offsets = None
        if columns.offsets is not None:
            offsets = torch.from_numpy(columns.offsets).to(self.bank.device)
            offsets = torch.cat([offsets.new_zeros(len(first)), offsets])
        return Opponents(Embeddings.cat([first, stored]), mask, offsets)

    def _stored(self, columns: Columns, rows: np.ndarray | None) -> tuple[Embeddings, Embeddings | None]:
        """The vectors of the columns and of a batch's own rows, mapped."""
        whole = self.count is None
        stored = self.bank.everything() if whole else self.bank.read(columns.rows)
        if self.map is None:
            return stored, None if rows is None else self.bank.read(rows)
        mapped = Embeddings(**{name: getattr(stored, name) for name in ("sparse", "colbert", "mask")})
        mapped.dense = self.map(stored.dense)
        if rows is None or whole:
            return mapped, None if rows is None else mapped[torch.as_tensor(rows, device=self.bank.device)]
        own = self.bank.read(rows)
        own.dense = self.map(own.dense)
        return mapped, own

    def penalty(self) -> Tensor | float:
        """What holds the map to the identity: its squared distance, weighted."""
        if self.map is None:
            return 0.0
        weight, bias = self.map.weight, self.map.bias
        identity = torch.eye(len(bias), device=bias.device)  # type: ignore[arg-type]
        distance = F.mse_loss(weight, identity, reduction="sum") + bias.square().sum()  # type: ignore[arg-type,operator]
        return self.strength * distance

    # ---- hard negatives, taken anew

    def refresh(self, step: int, every: int, folder: Path, mine: Callable[[], Nearest], writes: bool) -> None:
        """Have the nearest passages of an epoch, mined when it begins; a resumed run reads what was mined then.

        Args:
            every: steps of an epoch.
            mine: mines with the model as it is; all ranks take part.
            writes: this rank writes the file.

        Raises:
            TrainingError: the epoch has begun, and what was mined for it is gone.
        """
        stage = step // every
        if self.count is None or stage == self._stage:
            return
        path = folder / f"nearest-{stage}.npy"
        if path.is_file():
            self.nearest = Nearest.load(path)
        elif step % every:
            raise TrainingError(
                f"'{path}', the hard negatives with which this epoch began, is gone, so that the run cannot go on as "
                "it would have: start it anew in another output_dir"
            )
        else:
            self.nearest = mine()
            if writes:
                self.nearest.save(path)
        self._stage = stage

    def mine(self, asked: Sequence[Asked], vectors: Embeddings) -> Nearest:
        """The passages nearest to queries, by the dense head where there is one.

        Args:
            vectors: of the queries, by the head that `mined_by` names.
        """
        rows = nearest_rows(self.bank, vectors, min(NEAREST, len(self.bank)), self.mined_by)
        return Nearest(keys_of(text for text, _ in asked), rows)

    @property
    def mined_by(self) -> str:
        """The head that finds the nearest passages."""
        return "dense" if "dense" in self.bank.heads else self.bank.heads[0]
