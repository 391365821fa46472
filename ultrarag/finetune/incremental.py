"""What a run does for a model that it did not begin with: look back at the data, and merge with the older weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ultrarag.checkpoint import Training, read_manifest
from ultrarag.encoder import Encoder
from ultrarag.errors import CheckpointError, TrainingError
from ultrarag.finetune.data import TrainData
from ultrarag.finetune.distributed import rank
from ultrarag.finetune.evaluation import METRIC
from ultrarag.finetune.incremental_flags import IncrementalArguments
from ultrarag.finetune.measures import GUARD, Measures
from ultrarag.finetune.merging import Other, Search, Trial, average, copy_of
from ultrarag.finetune.output import UNMERGED
from ultrarag.finetune.seen import seen_before
from ultrarag.report.measured import Evaluation

#: Settings that may differ between a run that was stopped before merging and the one that goes on.
_INCIDENTAL = ("overwrite_output_dir", "incremental")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped with all saved that it takes to go on."""


def tell_seen(data: TrainData, encoder: Encoder, arguments: IncrementalArguments, note: Callable[[str], None]) -> None:
    """Say how much of the data the model, or one before it, was trained on."""
    parent = encoder.manifest.training if encoder.manifest else None
    if rank() != 0 or arguments.allow_seen_data or parent is None:
        return
    if seen := seen_before(data, parent):
        note(f"{seen}; give new rows as --train_data and old ones as --replay_data, or say --allow_seen_data")


def find_trained(output: Path, record: Training) -> Training | None:
    """How the weights were trained that the same run left when it was stopped before the end; None without any."""
    try:
        manifest = read_manifest(output / UNMERGED)
    except CheckpointError:
        return None
    earlier = manifest.training if manifest else None
    if earlier is None or earlier.parent != record.parent:
        return None
    same = [item["sha256"] for item in earlier.data] == [item["sha256"] for item in record.data]
    return earlier if same and _settings(earlier.arguments) == _settings(record.arguments) else None


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if name not in _INCIDENTAL}
    kept["training"] = {k: v for k, v in kept["training"].items() if k != "resume_from_checkpoint"}
    return kept


def merge_weights(
    encoder: Encoder,
    heads: tuple[str, ...],
    other: Other,
    arguments: IncrementalArguments,
    measures: Measures,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Put the average of the trained and the other weights into the encoder's model, and its worth into `measures`.

    Returns:
        What was merged, as plain JSON values.

    Raises:
        TrainingError: no weight keeps the guard; the trained weights are in the folder `UNMERGED`.
        Interrupted: Ctrl-C.
    """
    merger = _Merger(encoder, heads, other, measures, copy_of(encoder.model))
    trials: list[Trial] = []
    try:
        weight = arguments.fixed_weight
        if weight is None:
            weight, trials = merger.search(arguments.max_forgetting, note)
        merger.finish(weight)
    except TrainingError as error:
        raise TrainingError(f"{error}; the weights as trained are in the folder '{UNMERGED}' of the output") from error
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "stopped while weights were merged; the trained ones are kept: continue with --resume_from_checkpoint True"
        ) from stop
    return {
        "with": other.name,
        "path": other.path,
        "fingerprint": other.fingerprint,
        "weight": weight,
        "chosen": "given" if arguments.fixed_weight is not None else "auto",
        "max_forgetting": arguments.max_forgetting,
        "tried": [asdict(trial) for trial in trials],
    }


@dataclass
class _Merger:
    """Puts averages into the model, and measures each at most once."""

    encoder: Encoder
    heads: tuple[str, ...]
    other: Other
    measures: Measures
    trained: dict[str, Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        found = self.measures.found
        self.known: dict[tuple[str, float], Evaluation] = {
            (prefix, 1.0): found[f"{prefix}after"] for prefix in ("", GUARD) if f"{prefix}after" in found
        }

    def put(self, weight: float) -> None:
        """Load the average into the model."""
        if weight != self.weight:
            self.encoder.model.load_state_dict(average(self.trained, self.other.weights, weight))
            self.weight = weight

    def measure(self, prefix: str, weight: float) -> float:
        """The worth of a weight on the domain ("") or the guard."""
        if (prefix, weight) not in self.known:
            self.put(weight)
            evaluator = self.measures.guard if prefix else self.measures.domain
            assert evaluator is not None
            self.known[prefix, weight] = evaluator.evaluate(self.encoder, self.heads)
        return self.known[prefix, weight].metrics[METRIC]

    def search(self, max_forgetting: float, note: Callable[[str], None]) -> tuple[float, list[Trial]]:
        """The best weight, and all that were tried."""
        before = self.measures.found[f"{GUARD}before"].metrics[METRIC]

        def tell(trial: Trial) -> None:
            domain = "not measured" if trial.domain is None else f"{trial.domain:.4f}"
            note(f"merge: weight {trial.weight:g}: {METRIC} {domain}, guard {trial.guard:.4f} ({before:.4f} before)")

        search = Search(
            lambda weight: self.measure(GUARD, weight),
            lambda weight: self.measure("", weight),
            before - max_forgetting - 1e-12,
            tell,
        )
        best, trials = search.best()
        return best.weight, trials

    def finish(self, weight: float) -> None:
        """Leave the model with this weight; what was measured after training becomes that of the unmerged weights."""
        found = self.measures.found
        for prefix in ("", GUARD):
            if f"{prefix}after" in found:
                found[f"{prefix}unmerged"] = found[f"{prefix}after"]
                self.measure(prefix, weight)
                found[f"{prefix}after"] = self.known[prefix, weight]
        self.put(weight)
