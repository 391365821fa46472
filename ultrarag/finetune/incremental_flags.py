"""IncrementalArguments: how a model learns new things without losing old ones. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import UsageError

#: In `merge_weight`: search for the weight.
AUTO = "auto"
#: In `merge_with`: the model that this run starts from, and the first model of its lineage.
PARENT, BASE = "parent", "base"


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class IncrementalArguments:
    """Old data mixed in, weights averaged with an older model, and data that was seen before.

    Raises:
        UsageError: when a value cannot be used.
    """

    replay_data: Sequence[str] | Sequence[Mapping[str, Any]] = _flag(
        (), "Rows of earlier runs to train on again, in batches of their own.", kind="data", shown_default="none"
    )
    replay_ratio: float | None = _flag(
        None, "The share of all batches that comes from --replay_data.", shown_default="0.2 with --replay_data"
    )
    merge_with: str | None = _flag(
        None,
        "Average the trained weights with an older model's: parent (the model trained from), base (the first model of "
        "its lineage), or a path. The weights as trained are kept in the folder unmerged/.",
    )
    merge_weight: str = _flag(
        AUTO,
        "The weight of the trained model in the average, between 0 and 1; auto: the best on --eval_data of those that "
        "lose at most --max_forgetting on --guard_data.",
        kind="str_or_number",
    )
    guard_data: str | Sequence[Mapping[str, Any]] | None = _flag(
        None,
        "What the model must not forget: held-out data like --eval_data's, of another kind.",
        kind="data",
        many=False,
    )
    max_forgetting: float = _flag(
        0.005,
        "What nDCG@10 on --guard_data may fall below that of the model trained from, at most (0.005: half a point).",
    )
    allow_seen_data: bool = _flag(
        False, "Say nothing when rows were trained on before; a refresh of a live index otherwise refuses them."
    )

    def __post_init__(self) -> None:
        self._check_replay()
        self._check_merge()
        if isinstance(self.guard_data, str) and not os.path.exists(self.guard_data):
            raise UsageError(f"guard_data '{self.guard_data}' does not exist")
        if not 0 <= self.max_forgetting <= 1:
            raise UsageError(
                f"max_forgetting is {self.max_forgetting}; it must lie between 0 and 1 (0.005: half a point)"
            )

    @property
    def fixed_weight(self) -> float | None:
        """The weight that was given; None: it is searched for."""
        return None if self.merge_weight == AUTO else float(self.merge_weight)

    def _check_replay(self) -> None:
        for path in self.replay_data:
            if isinstance(path, str) and not os.path.exists(path):
                raise UsageError(f"replay_data '{path}' does not exist")
        if self.replay_ratio is None:
            self.replay_ratio = 0.2 if self.replay_data else None
            return
        if not self.replay_data:
            raise UsageError("replay_ratio needs --replay_data, the rows to mix in")
        if not 0 < self.replay_ratio < 1:
            raise UsageError(f"replay_ratio is {self.replay_ratio}; it must lie between 0 and 1, such as 0.2")

    def _check_merge(self) -> None:
        if self.merge_weight != AUTO:
            self._check_weight()
        if self.merge_with is None and self.merge_weight != AUTO:
            raise UsageError("merge_weight needs --merge_with: parent, base, or the path of a model")

    def _check_weight(self) -> None:
        try:
            weight = float(self.merge_weight)
        except ValueError:
            weight = -1.0
        if not 0 < weight <= 1:
            raise UsageError(
                f"merge_weight is '{self.merge_weight}'; it must be auto, or a number above 0 and at most 1 "
                "(1: the trained weights alone)"
            )


def check_merge(incremental: IncrementalArguments, eval_data: object, values: Mapping[str, Any]) -> None:
    """Refuse a search for a weight without anything to search by, and merging of weights that no process has whole.

    Args:
        values: the other settings, by the names of flags.
    """
    if incremental.merge_with is None:
        return
    for name in ("fsdp", "deepspeed"):
        if values.get(name):
            raise UsageError(
                f"--merge_with does not work with --{name}, which splits the weights; leave one of them out"
            )
    held_out = {"eval_data": eval_data, "guard_data": incremental.guard_data}
    missing = [name for name, given in held_out.items() if given is None]
    if incremental.fixed_weight is None and missing:
        raise UsageError(f"--merge_weight auto needs --{missing[0]} to choose by; or give a weight, such as 0.5")
