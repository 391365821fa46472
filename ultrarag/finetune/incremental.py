"""What a run does for a model that it did not begin with: look back at the data, and merge with the older weights."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ultrarag.checkpoint import Training, read_manifest
from ultrarag.encoder import Encoder
from ultrarag.errors import CheckpointError, TrainingError
from ultrarag.evaluation import Evaluation
from ultrarag.finetune.batches import TrainData
from ultrarag.finetune.evaluate import GUARD, METRIC, Measures
from ultrarag.finetune.flags import IncrementalArguments
from ultrarag.finetune.merging import Other, Search, Trial, average, copy_of
from ultrarag.finetune.output import UNMERGED
from ultrarag.finetune.step import rank

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


#: Row keys that a record keeps: 16 KiB of numbers, 22 KiB in the manifest.
KEPT = 2048
#: A refresh refuses data of which at least this share was seen.
TOO_MANY = 0.1


def record_of(parts: Sequence[TrainData]) -> dict[str, Any]:
    """What was trained on, as plain JSON values."""
    keys = np.unique(np.concatenate([part.keys() for part in parts]))
    kept = keys[:KEPT]
    files = {digest: name for part in parts for name, digest in part.files.items()}
    return {"files": files, "rows": len(keys), "keys": base64.b64encode(kept.astype("<u8").tobytes()).decode()}


@dataclass(frozen=True)
class Seen:
    """How much of some data a model was trained on before."""

    #: names of files, now, whose content was trained on as a whole
    files: list[str]
    #: distinct rows that could be compared, and those of them that were seen
    compared: int
    found: int
    #: who saw most of them: the checkpoint's fingerprint, empty for the parent itself
    by: str

    @property
    def share(self) -> float:
        """The share of rows that were seen."""
        return self.found / self.compared if self.compared else float(bool(self.files))

    @property
    def too_many(self) -> bool:
        """So many that training on them again is likely to be a mistake."""
        return bool(self.files) or self.share >= TOO_MANY

    def __str__(self) -> str:
        who = f"a model of its lineage, {self.by[:12]}," if self.by else "this model"
        whole = f"{', '.join(self.files)}: the whole file was trained on before; " if self.files else ""
        about = "" if self.compared < KEPT else "about "
        return f"{whole}{about}{self.share:.0%} of the rows were trained on before ({who} saw most of them)"


def seen_before(data: TrainData, parent: Training | None) -> Seen | None:
    """Compare data with what the parent and all before it were trained on; None where nothing was seen.

    Args:
        parent: how the model came about that is to be trained.
    """
    if parent is None:
        return None
    keys = np.unique(data.keys())
    records = [("", parent.seen), *((item.get("fingerprint", ""), item.get("seen")) for item in parent.ancestors)]
    known = [(by, record) for by, record in records if record]
    files = [name for name, digest in data.files.items() if any(digest in record["files"] for _, record in known)]
    held = [(by, *_keys_of(record)) for by, record in known]
    # each record alone, and all together in what all of them can tell
    found = [_compare(keys, limit, rows, by) for by, limit, rows in held]
    if len(held) > 1:
        limits = [limit for _, limit, _ in held if limit is not None]
        everything = np.unique(np.concatenate([rows for _, _, rows in held]))
        most = max(found, key=lambda item: item.found).by
        found.append(_compare(keys, min(limits) if limits else None, everything, most))
    best = max(found, key=lambda item: item.share, default=Seen([], 0, 0, ""))
    return replace(best, files=files) if files or best.found else None


def _compare(keys: np.ndarray, limit: np.uint64 | None, rows: np.ndarray, by: str) -> Seen:
    mine = keys if limit is None else keys[keys <= limit]
    return Seen([], len(mine), len(np.intersect1d(mine, rows, assume_unique=True)), by)


def _keys_of(record: Mapping[str, Any]) -> tuple[np.uint64 | None, np.ndarray]:
    """The keys of a record, and the largest key that it would hold; None where it holds all rows."""
    held = np.frombuffer(base64.b64decode(record["keys"]), "<u8").astype(np.uint64)
    return (held[-1] if record["rows"] > len(held) else None), held
