"""Measures: what a run's models are worth on the domain and on the guard, at each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ultrarag.encoder import Encoder
from ultrarag.finetune.evaluation import METRIC, Evaluator
from ultrarag.finetune.rerank_evaluation import RerankEvaluator
from ultrarag.report.measured import Evaluation, Measured

AnyEvaluator = Evaluator | RerankEvaluator
#: Before the name of a stage: measured on the guard.
GUARD = "guard_"


@dataclass
class Measures:
    """Evaluations by stage: before, after, unmerged, and the same on the guard."""

    domain: AnyEvaluator | None = None
    guard: AnyEvaluator | None = None
    found: dict[str, Evaluation] = field(default_factory=dict)

    def take(self, stage: str, encoder: Encoder, heads: tuple[str, ...]) -> None:
        """Measure a model on all there is."""
        for prefix, evaluator in (("", self.domain), (GUARD, self.guard)):
            if evaluator:
                self.found[prefix + stage] = evaluator.evaluate(encoder, heads)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Stage -> metric -> value."""
        return {stage: dict(evaluation.metrics) for stage, evaluation in self.found.items()}

    def measured(self) -> Measured | None:
        """The domain before and after, with texts; None where nothing was evaluated."""
        if self.domain is None:
            return None
        return self.domain.measured(self.found["before"], self.found["after"])

    def warn(self, max_forgetting: float, note: Callable[[str], None]) -> None:
        """Say what got worse."""
        change = self._change("")
        if change < 0:
            before, after = (self.found[stage].metrics[METRIC] for stage in ("before", "after"))
            note(
                f"the model is worse than before on the evaluation data: {METRIC} {before:.4f} -> {after:.4f}; "
                "do not deploy it unseen"
            )
        forgotten = -self._change(GUARD)
        if forgotten > max_forgetting + 1e-9:
            note(
                f"the model lost {forgotten:.4f} of {METRIC} on the guard data, more than --max_forgetting "
                f"{max_forgetting:g}; --merge_with parent, or --replay_data, keeps more of what it knew"
            )

    def _change(self, prefix: str) -> float:
        if f"{prefix}before" not in self.found:
            return 0.0
        before, after = (self.found[prefix + stage].metrics[METRIC] for stage in ("before", "after"))
        return after - before
