"""FinetuneResult: what a run gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class FinetuneResult:
    """What a fine-tuning run gives back."""

    #: the finished checkpoint's directory
    checkpoint: str
    #: the model it was trained from
    parent: str
    #: identity of the finished model
    fingerprint: str
    steps: int
    #: mean training loss
    loss: float | None
    #: seconds of training, without loading and evaluation
    seconds: float
    #: "before" and "after": metric -> value; empty without eval_data; with guard_data "guard_before" and "guard_after"
    #: too, and with merge_with "unmerged" and "guard_unmerged", the trained weights alone
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    #: what was translated, dropped or changed, one line each
    notes: list[str] = field(default_factory=list)
    #: the model that the weights were averaged with, the weight, and what was tried; None without `merge_with`
    merge: dict[str, Any] | None = None
    #: the page for people
    report: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"checkpoint  {self.checkpoint}", f"steps       {self.steps}"]
        if self.loss is not None:
            lines.append(f"loss        {self.loss:.4f}")
        if self.merge:
            lines.append(f"merged      {self.merge['weight']:g} of it with {self.merge['with']} ({self.merge['path']})")
        for name, before in self.metrics.get("before", {}).items():
            lines.append(f"{name:<11} {before:.4f} -> {self.metrics['after'][name]:.4f}")
        for name, before in self.metrics.get("guard_before", {}).items():
            lines.append(f"{name:<11} {before:.4f} -> {self.metrics['guard_after'][name]:.4f} (guard)")
        return "\n".join(lines)
