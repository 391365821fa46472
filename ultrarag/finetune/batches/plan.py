"""BatchPlan: which rows each rank sees at each step, as a pure function of (seed, epoch, index, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.errors import DataError
from ultrarag.finetune.batches.pools import Pool, Schedule, check_groups, draw_candidates, make_pools, remarks
from ultrarag.finetune.batches.train_data import Draws, TrainData, read_data

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments

# the first number of a key says what is drawn, so that no two streams are the same
_ROWS, _STEPS, _TEXTS = range(3)

#: Steps among whose rows those of similar length are grouped: few enough that the groups differ in every epoch.
GROUPED_STEPS = 50
#: `Batch.dataset` where a batch holds rows of several.
MIXED = "mixed"


@dataclass
class Batch:
    """One step of one rank, as raw texts: instructions are the encoder's business."""

    #: (queries,)
    queries: list[str]
    #: (queries * group_size,): passage i * group_size + j is candidate j of query i, candidate 0 its positive
    passages: list[str]
    #: (queries, group_size) raw scores
    teacher: list[list[float]] | None
    group_size: int
    #: the other queries' passages are negatives too
    in_batch_negatives: bool
    #: the rows' dataset, or "mixed"
    dataset: str
    #: (queries,) "file:line"
    sources: list[str]
    #: (queries,) the row's own instruction, None: the run's
    prompts: list[str | None]
    #: passages are of the queries' kind (symmetric tasks) and get the instruction of their query
    passages_as_queries: bool = False
    #: (queries,) all positives of each row, drawn or not
    positives: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Epoch:
    number: int
    #: per pool: (rows,) row numbers in their order
    rows: list[np.ndarray]
    #: (steps,) the step of the plan that comes at each index
    steps: np.ndarray


class BatchPlan:
    """The batches of a run; any of them can be asked for at any time, so a resumed run goes on exactly.

    In every epoch each row is seen once, except those that `notes` counts: rows dropped by `drop_last`, and rows
    seen twice because each rank needs some at each step.

    Raises:
        DataError, UsageError: no batch is left, or one in which a query has no second candidate.
    """

    def __init__(self, data: TrainData, schedule: Schedule) -> None:
        self.data = data
        self.schedule = schedule
        self._lengths = data.lengths() if schedule.group_by_length else None
        self.pools = make_pools(data, schedule)
        self._ends = list(accumulate(self._steps(pool) for pool in self.pools))
        #: steps of each rank in each epoch
        self.steps_per_epoch = self._ends[-1]
        if not self.steps_per_epoch:
            raise DataError(self._nothing_left())
        self.notes = [*remarks(data, self.pools), *self._tails()]
        self._epochs: dict[int, _Epoch] = {}

    def batch(self, epoch: int, index: int, rank: int) -> Batch:
        """Return step `index` (0 .. steps_per_epoch-1) of `epoch` (0, 1, ...) on `rank`.

        Raises:
            IndexError: there is no such step or rank.
        """
        self._check(epoch, index, rank)
        pool, rows = self._step(self._epoch(epoch), index)
        mine = np.array_split(rows, self.schedule.world_size)[rank]
        return self._texts(pool, [int(row) for row in mine], epoch)

    # ---- steps

    def _global_batch(self, pool: Pool) -> int:
        return pool.batch_size * self.schedule.world_size

    def _steps(self, pool: Pool) -> int:
        rows, batch = len(pool.rows), self._global_batch(pool)
        return rows // batch if self.schedule.drop_last else -(-rows // batch)

    def _step(self, epoch: _Epoch, index: int) -> tuple[Pool, np.ndarray]:
        """Return a step's pool and its rows over all ranks, at least `fewest` for each."""
        step = int(epoch.steps[index])
        which = int(np.searchsorted(self._ends, step, side="right"))
        pool, order = self.pools[which], epoch.rows[which]
        at = (step - (self._ends[which - 1] if which else 0)) * self._global_batch(pool)
        rows = order[at : at + self._global_batch(pool)]
        missing = pool.fewest * self.schedule.world_size - len(rows)
        # the epoch's first rows are other rows than its last, unless the pool is smaller than one step
        return pool, np.concatenate([rows, np.resize(order, missing)]) if missing > 0 else rows

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            rows = [
                self._order(pool, Draws(_ROWS, self.schedule.seed, number, which))
                for which, pool in enumerate(self.pools)
            ]
            steps = Draws(_STEPS, self.schedule.seed, number).order(self.steps_per_epoch)
            kept = {key: self._epochs[key] for key in self._epochs if key == number - 1}
            self._epochs = {**kept, number: _Epoch(number, rows, steps)}
        return self._epochs[number]

    def _order(self, pool: Pool, draws: Draws) -> np.ndarray:
        """The pool's rows in random order, grouped by length where that is asked for, some steps' rows at a time."""
        rows = pool.rows[draws.order(len(pool.rows))]
        if self._lengths is None:
            return rows
        chunk_rows = GROUPED_STEPS * self._global_batch(pool)
        parts = [rows[start : start + chunk_rows] for start in range(0, len(rows), chunk_rows)]
        grouped = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        step = np.arange(len(rows)) // self._global_batch(pool)
        # within a step at random again: the ranks' shares are equally long, and a row has other neighbours each epoch
        return grouped[np.lexsort((draws.order(len(rows)), step))]

    def _check(self, epoch: int, index: int, rank: int) -> None:
        if epoch < 0 or not 0 <= index < self.steps_per_epoch or not 0 <= rank < self.schedule.world_size:
            raise IndexError(
                f"epoch {epoch}, step {index}, rank {rank}: there are {self.steps_per_epoch} steps per epoch and "
                f"{self.schedule.world_size} ranks, counted from 0"
            )

    # ---- texts

    def _texts(self, pool: Pool, rows: list[int], epoch: int) -> Batch:
        drawn = [
            draw_candidates(self.data, row, pool.group_size, Draws(_TEXTS, self.schedule.seed, epoch, row))
            for row in rows
        ]
        names = {self.data.dataset_of(row).name for row in rows}
        scores = [item.scores for item in drawn if item.scores is not None]
        return Batch(
            queries=[item.example.query for item in drawn],
            passages=[text for item in drawn for text in item.passages],
            teacher=scores or None,
            group_size=pool.group_size,
            in_batch_negatives=pool.in_batch_negatives,
            dataset=names.pop() if len(names) == 1 else MIXED,
            sources=[item.example.source for item in drawn],
            prompts=[item.example.prompt for item in drawn],
            passages_as_queries=pool.passages_as_queries,
            positives=[item.example.pos for item in drawn],
        )

    # ---- what is said about the ends

    def _tails(self) -> Iterator[str]:
        for pool in self.pools:
            rows, batch = len(pool.rows), self._global_batch(pool)
            tail = rows % batch
            twice = pool.fewest * self.schedule.world_size - tail
            if tail and self.schedule.drop_last:
                never = "; no row of it is ever trained on" if rows < batch else ""
                yield f"'{pool.name}': {tail} of {rows} rows are dropped in each epoch (drop_last){never}"
            elif tail and twice > 0:
                yield f"'{pool.name}': {twice} rows are seen twice in each epoch, so that no rank is without rows"

    def _nothing_left(self) -> str:
        most = max(self.pools, key=lambda pool: len(pool.rows) / self._global_batch(pool))
        return (
            f"drop_last leaves no batch: '{most.name}' has {len(most.rows)} rows, and a step takes {most.batch_size} x "
            f"{self.schedule.world_size} ranks; lower --per_device_train_batch_size, or leave --dataloader_drop_last "
            "out"
        )


# so that no stream of choices is one of a BatchPlan's
_MIXTURE = 3
#: Added to the seed of the old rows' plan: with the same one, equally many rows would have the same order.
SEED_OF_OLD = 1_000_003


class ReplayPlan:
    """The batches of a run with replay.

    Args:
        new: the plan of the new rows.
        old: the plan of the old rows.
        ratio: the share of all batches that is old, rounded to whole batches per epoch, at least one.
    """

    def __init__(self, new: BatchPlan, old: BatchPlan, ratio: float) -> None:
        self.new, self.old = new, old
        #: old batches per epoch
        self.replayed = max(1, round(new.steps_per_epoch * ratio / (1 - ratio)))
        #: steps of each rank in each epoch
        self.steps_per_epoch = new.steps_per_epoch + self.replayed
        share = self.replayed / self.steps_per_epoch
        self.notes = [
            *new.notes,
            *(f"replay: {note}" for note in old.notes),
            f"replay: {self.replayed} of {self.steps_per_epoch} batches of each epoch are old ones ({share:.1%})",
        ]
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def pools(self) -> list[Pool]:
        """The pools of both."""
        return [*self.new.pools, *self.old.pools]

    @property
    def data(self) -> TrainData:
        """The new rows."""
        return self.new.data

    def batch(self, epoch: int, index: int, rank: int) -> Batch:
        """Return step `index` (0 .. steps_per_epoch-1) of `epoch` (0, 1, ...) on `rank`.

        Raises:
            IndexError: there is no such step or rank.
        """
        if epoch < 0 or not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"epoch {epoch}, step {index}: there are {self.steps_per_epoch} steps per epoch")
        step = self._steps(epoch)[index]
        if step < self.new.steps_per_epoch:
            # its own order is random already: the n-th new step here is the n-th there
            return self.new.batch(epoch, step, rank)
        turn = epoch * self.replayed + step - self.new.steps_per_epoch
        return self.old.batch(*divmod(turn, self.old.steps_per_epoch), rank)

    def _steps(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            self._order = (epoch, Draws(_MIXTURE, self.new.schedule.seed, epoch).order(self.steps_per_epoch).tolist())
        return self._order[1]


#: What says which batch comes when.
AnyPlan = BatchPlan | ReplayPlan


def make_plan(arguments: FinetuneArguments, data: TrainData, pairs: bool) -> AnyPlan:
    """Which batch of the run comes when; rows to replay are read here.

    Args:
        pairs: the batches are for a cross-encoder.

    Raises:
        DataError, UsageError: no batch is left, or one that teaches nothing.
    """
    schedule = Schedule.of(arguments)
    new = BatchPlan(data, schedule)
    plan: AnyPlan = new
    if arguments.incremental.replay_data:
        old = BatchPlan(read_data(arguments, replay=True), replace(schedule, seed=schedule.seed + SEED_OF_OLD))
        plan = ReplayPlan(new, old, arguments.incremental.replay_ratio or 0.0)
    if pairs:
        check_groups(plan.pools)
    return plan
