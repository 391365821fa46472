"""Batches: which rows each rank sees at each step, as a pure function of (seed, epoch, index, rank).

Checked rows come in; padded features of whole batches go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.finetune.batches.loader import (
        Collator,
        PairCollator,
        PairLengths,
        PlannedLoader,
        TrainingBatch,
        make_collator,
        make_loader,
    )
    from ultrarag.finetune.batches.plan import AnyPlan, Batch, BatchPlan, ReplayPlan, make_plan
    from ultrarag.finetune.batches.train_data import DatasetInfo, Draws, TrainData, read_data
else:
    __getattr__, __dir__, __all__ = exports(__name__)
