"""FalseNegativeArguments: which passages of a batch are no negatives after all. Imports nothing heavy."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import UsageError, did_you_mean

#: How false negatives are found.
MASKS = ("none", "text", "margin", "guide")
MARGIN_TYPES = ("absolute", "relative")


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class FalseNegativeArguments:
    """What is left out of the negatives of a query, and by which evidence.

    Raises:
        UsageError: when a value cannot be used.
    """

    false_negative_mask: str = _flag(
        "none",
        "Leave false negatives of the batch (and of other devices) out of the loss. text: passages with the same text, "
        "but for case, width and spaces, as a positive of this query, in its row or elsewhere in the batch; margin: "
        "passages of other rows that the model itself scores above the positive less the margin; guide: passages that "
        "a guide model scores so.",
        choices=MASKS,
    )
    false_negative_margin: float = _flag(
        0.0,
        "margin, guide: a passage is left out when its score is above the positive's score less this; negative: only "
        "when it is above by that much.",
    )
    false_negative_margin_type: str = _flag(
        "absolute",
        "absolute: the margin is in units of the score, such as cosine; relative: it is a share of the positive's "
        "score.",
        choices=MARGIN_TYPES,
    )
    guide_model: str | None = _flag(
        None, "The model whose scores find false negatives (false_negative_mask guide): a directory or a Hub name."
    )
    guide_adapter: str | None = _flag(
        None, "The guide's adapter, such as bge.", shown_default="that of its manifest, else that of the trained model"
    )

    def __post_init__(self) -> None:
        _one_of("false_negative_mask", self.false_negative_mask, MASKS)
        _one_of("false_negative_margin_type", self.false_negative_margin_type, MARGIN_TYPES)
        if not math.isfinite(self.false_negative_margin):
            raise UsageError(f"false_negative_margin is {self.false_negative_margin}; it must be a finite number")
        self._check_guide()
        if self.false_negative_margin and self.false_negative_mask not in ("margin", "guide"):
            raise UsageError("false_negative_margin needs --false_negative_mask margin or guide")

    def _check_guide(self) -> None:
        guided = self.false_negative_mask == "guide"
        if guided and not self.guide_model:
            raise UsageError("--false_negative_mask guide needs --guide_model, the model whose scores decide")
        for name in ("guide_model", "guide_adapter"):
            if getattr(self, name) and not guided:
                raise UsageError(f"{name} has no effect without --false_negative_mask guide")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is '{value}'; it must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


#: In `merge_weight`: search for the weight.
AUTO = "auto"
#: In `merge_with`: the model that this run starts from, and the first model of its lineage.
PARENT, BASE = "parent", "base"


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
