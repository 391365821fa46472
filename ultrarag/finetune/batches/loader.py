"""The data loader: whole planned batches, a pure function of (seed, epoch, index, rank), so that resume is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import TrainingArguments

from ultrarag.encoder import in_background
from ultrarag.finetune.batches.collator import Collator, PairCollator
from ultrarag.finetune.batches.plan import Batch, Plan


class PlannedBatches(Dataset[Batch]):
    """Item (epoch, index) is this rank's batch."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan = plan
        self.rank = rank

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        return self.plan.batch(epoch, index, self.rank)

    def __len__(self) -> int:
        """Rows per epoch (the Trainer reports it)."""
        return len(self.plan.data)


class EpochOrder(BatchSampler):
    """Yields [(epoch, 0)], [(epoch, 1)], ... for the epoch that the Trainer sets."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0
        self.batch_size = 1
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (the Trainer calls it before it iterates)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.steps):
            yield [(self.epoch, index)]

    def __len__(self) -> int:
        return self.steps


class PlannedLoader(DataLoader[Any]):
    """A DataLoader that passes `set_epoch` on to its order of batches, and may tokenize the next one in a thread."""

    #: whether the next batch is made while a step runs; worker processes, where there are any, do that anyway
    ahead = False

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return in_background(lambda _: next(batches), range(len(self))) if self.ahead else batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        cast(EpochOrder, self.batch_sampler).set_epoch(epoch)


def make_loader(plan: Plan, collator: Collator | PairCollator, rank: int, args: TrainingArguments) -> PlannedLoader:
    """Return the loader of one rank's batches, with the run's dataloader settings."""
    workers = args.dataloader_num_workers
    loader = PlannedLoader(
        PlannedBatches(plan, rank),
        batch_sampler=EpochOrder(plan.steps_per_epoch),
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        # its own generator: a loader must not draw from the one that dropout uses
        generator=torch.Generator().manual_seed(args.seed),
    )
    # on a CPU the step itself has need of every core
    loader.ahead = workers == 0 and args.device.type != "cpu"
    return loader
