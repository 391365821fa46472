"""FalseNegativeArguments: which passages of a batch are no negatives after all. Imports nothing heavy."""

from __future__ import annotations

import math
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
