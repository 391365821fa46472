"""Rows and plans of tests, from settings by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ultrarag.finetune.batches.plan import BatchPlan
from ultrarag.finetune.batches.pools import Schedule
from ultrarag.finetune.batches.train_data import TrainData
from ultrarag.finetune.flags.groups import DataArguments

_SCHEDULE = {item.name for item in dataclasses.fields(Schedule)}


def train_data(sources: str | os.PathLike[str] | Sequence[Any], seed: int = 42, **settings: Any) -> TrainData:
    """Read a path, paths, or rows."""
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    plain = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in given]
    return TrainData.read(DataArguments(plain, **settings), seed)


def batch_plan(data: TrainData, per_device_batch_size: int, world_size: int = 1, **settings: Any) -> BatchPlan:
    """The plan of these rows, read again where a setting is the data's own."""
    schedule = {name: value for name, value in settings.items() if name in _SCHEDULE}
    own = {name: value for name, value in settings.items() if name not in _SCHEDULE}
    again = TrainData.read(dataclasses.replace(data.settings, **own)) if own else data
    return BatchPlan(again, Schedule(per_device_batch_size, world_size, **schedule))
