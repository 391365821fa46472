"""ReplayPlan: batches of new rows, and of old ones among them, as a pure function of (seed, epoch, index, rank).

Whole batches are old or new, so that same-dataset batches, group sizes and in-batch negatives stay what each side's
rows say. Every new row is seen once per epoch, as without replay; the old rows go on from epoch to epoch, so that all
of them have their turn before one comes again.
"""

from __future__ import annotations

from ultrarag.errors import UsageError
from ultrarag.finetune.batches import Batch, BatchPlan
from ultrarag.finetune.data import TrainData
from ultrarag.finetune.draws import Draws
from ultrarag.finetune.pools import Pool

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
        if new.sizes.world_size != old.sizes.world_size:
            raise UsageError(f"new rows for {new.sizes.world_size} ranks and old rows for {old.sizes.world_size}")
        self.new, self.old = new, old
        self.seed = new.seed
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

    @property
    def sizes(self) -> object:
        """What the run asks for."""
        return self.new.sizes

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
            self._order = (epoch, Draws(_MIXTURE, self.seed, epoch).order(self.steps_per_epoch).tolist())
        return self._order[1]


#: What says which batch comes when.
Plan = BatchPlan | ReplayPlan
