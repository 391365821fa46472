"""What a run does for a model that it did not begin with: look back at the data, and merge with the older weights.

Merging averages the trained weights with an older model's, so that what that one knew is not lost. The search for the
weight needs no training: each trial puts an average into the model in memory and measures it on corpora whose tokens
are kept. Three copies of the weights are held meanwhile: the trained, the other, the average.

Source:
    Robust fine-tuning of zero-shot models (Wortsman et al., 2022); for retrieval, LM-Cocktail (Xiao et al., 2023).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultrarag.checkpoint import Training, tokenizer_content
from ultrarag.encoder import Encoder, LowRank
from ultrarag.errors import CheckpointError, TrainingError, UsageError
from ultrarag.evaluation import MAIN_METRIC, Evaluation
from ultrarag.finetune.batches import TrainData
from ultrarag.finetune.evaluate import GUARD, Measures
from ultrarag.finetune.flags import BASE, PARENT, FinetuneArguments, IncrementalArguments
from ultrarag.finetune.step import rank
from ultrarag.hookspecs import LoadOptions

#: Row keys that a record keeps: 16 KiB of numbers, 22 KiB in the manifest.
KEPT = 2048
#: A refresh refuses data of which at least this share was seen.
TOO_MANY = 0.1

#: Weights that a search tries, the neighbours of the best of them, and what is tried when none of them will do.
GRID = (1.0, 0.8, 0.6, 0.4, 0.2)
STEP = 0.1
LAST = (0.1, 0.05)


# ---- rows that were trained on before


def warn_of_seen_rows(
    data: TrainData, encoder: Encoder, arguments: IncrementalArguments, note: Callable[[str], None]
) -> None:
    """Note how much of the data the model, or one before it, was trained on."""
    parent = encoder.manifest.training if encoder.manifest else None
    if rank() != 0 or arguments.allow_seen_data or parent is None:
        return
    if seen := seen_before(data, parent):
        note(f"{seen}; give new rows as --train_data and old ones as --replay_data, or say --allow_seen_data")


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
    # each record alone, and all together over the keys that all of them cover
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


# ---- the other model


@dataclass(frozen=True)
class Other:
    """The model that the trained one is averaged with."""

    #: parent, base, or the path given
    name: str
    path: str
    fingerprint: str
    #: on the CPU; where one side is trained, those that are trained
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, encoder: Encoder, name: str, path: str, fingerprint: str) -> Other:
        """Copy a model's weights."""
        return cls(name, path, fingerprint, copy_of(encoder.model))

    @classmethod
    def before(cls, encoder: Encoder, path: str, fingerprint: str) -> Other:
        """Copy those of an encoder's weights that are about to be trained: others do not change.

        Args:
            fingerprint: of the model at `path`; of an encoder of two sides that was made from it another comes out.
        """
        weights = {name: weight for name, weight in encoder.model.named_parameters() if weight.requires_grad}
        kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        return cls(PARENT, path, fingerprint, kept)


def read_other(
    arguments: FinetuneArguments, encoder: Encoder, fingerprint: str, note: Callable[[str], None]
) -> Other | None:
    """Return the model to merge with, checked; None without `merge_with`.

    Args:
        encoder: the model to train, as it is before that.
        fingerprint: of the model trained from.

    Raises:
        UsageError: it is no longer there, or its weights, tokenizer or settings do not fit.
    """
    name = arguments.incremental.merge_with
    if name is None:
        return None
    parent = arguments.model.model_name_or_path
    if arguments.sides.train_side != "both":  # it is the parent: flags that say otherwise are refused
        return Other.before(encoder, parent, fingerprint)
    path, expected = (parent, fingerprint) if name in (PARENT, BASE) else (name, "")
    training = encoder.manifest.training if encoder.manifest else None
    if name == BASE and training:
        first: Mapping[str, Any] = training.ancestors[0] if training.ancestors else asdict(training)
        path, expected = first["parent_name"], first["parent"]
    if expected == fingerprint:
        return Other.of(encoder, name, path, fingerprint)
    found = _load(path, name, encoder)
    if expected and found.fingerprint != expected:
        note(f"--merge_with base: '{path}' is not to the bit what the lineage began from, or has other settings")
    return Other.of(found, name, path, found.fingerprint)


def _load(path: str, name: str, encoder: Encoder) -> Encoder:
    options = LoadOptions(
        heads=encoder.heads,
        pooling=encoder.settings.pooling,
        normalize=encoder.settings.normalize,
        trust_remote_code=encoder.trust_remote_code,
    )
    try:
        other = Encoder.load(path, encoder.adapter.name, device="cpu", options=options)
    except (UsageError, CheckpointError) as error:
        what = f"the first model of the lineage was '{path}'" if name == BASE else f"--merge_with {path}"
        raise UsageError(f"{what}, and it cannot be loaded: {error}") from error
    _check_fits(path, encoder, other)
    return other


def _check_fits(path: str, encoder: Encoder, other: Encoder) -> None:
    mine, theirs = ({k: v.shape for k, v in side.model.state_dict().items()} for side in (encoder, other))
    if mine.keys() != theirs.keys():
        different = sorted(mine.keys() ^ theirs.keys())
        raise UsageError(
            f"--merge_with {path}: it is another kind of model: {len(different)} weights are in one and not in the "
            f"other, such as '{different[0]}'"
        )
    shapes = [name for name, shape in mine.items() if theirs[name] != shape]
    if shapes:
        name = shapes[0]
        raise UsageError(f"--merge_with {path}: '{name}' is {tuple(theirs[name])} there and {tuple(mine[name])} here")
    if tokenizer_content(encoder.tokenizer) != tokenizer_content(other.tokenizer):
        raise UsageError(f"--merge_with {path}: its tokenizer is another one, so the same text has other token ids")


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, on the CPU, whatever becomes of it."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def average(trained: Mapping[str, Tensor], other: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """`weight` of the trained weights and the rest of the other's; whole numbers stay as trained."""
    return {
        name: torch.lerp(other[name].to(tensor.dtype), tensor, weight) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }


#: Gives the encoder whose weights are the average, for a weight of the trained model.
Averages = Callable[[float], Encoder]


def averages(encoder: Encoder, other: Other) -> Averages:
    """Averages of a trained encoder's weights with the other model's, put into the encoder itself."""
    places = encoder.model.state_dict()
    trained = {name: places[name].detach().to("cpu", copy=True) for name in other.weights}

    def at(weight: float) -> Encoder:
        for name, tensor in average(trained, other.weights, weight).items():
            places[name].copy_(tensor)
        return encoder

    return at


def averages_of_low_rank(parent: Encoder, low_rank: LowRank) -> Averages:
    """Averages of a query side that LoRA trained with its parent: the matrices, scaled."""
    return lambda weight: Encoder.of_sides(parent, low_rank=low_rank.part(weight, parent.model))


# ---- the search for the weight


@dataclass(frozen=True)
class Trial:
    """A weight, and what the average is worth with it."""

    weight: float
    #: on the guard data; None where it was not measured
    guard: float | None
    #: on the evaluation data; None where the guard decided
    domain: float | None


@dataclass
class WeightSearch:
    """The search for the weight.

    Args:
        guard, domain: measure the model with a weight.
        least: what the guard must show at least.
        tried: called with each trial.
    """

    guard: Callable[[float], float]
    domain: Callable[[float], float]
    least: float
    tried: Callable[[Trial], None]

    def best(self) -> tuple[Trial, list[Trial]]:
        """Return the weight that is best on the domain among those that keep the guard, and all that were tried.

        Raises:
            TrainingError: none keeps the guard.
        """
        tried = {weight: self._try(weight) for weight in GRID}
        for weight in LAST:
            if self._chosen(tried) is None:
                tried[weight] = self._try(weight)
        chosen = self._chosen(tried)
        if chosen is None:
            raise TrainingError(
                f"no average keeps the guard at {self.least:.4f}: even {LAST[-1]:g} of the trained weights falls to "
                f"{tried[LAST[-1]].guard:.4f}; train less (learning rate, steps), replay old data (--replay_data), or "
                "allow more (--max_forgetting)"
            )
        for weight in (round(chosen.weight + STEP, 3), round(chosen.weight - STEP, 3)):
            if 0 < weight < 1 and weight not in tried:
                tried[weight] = self._try(weight)
        best = self._chosen(tried)
        assert best is not None
        return best, sorted(tried.values(), key=lambda trial: -trial.weight)

    def _try(self, weight: float) -> Trial:
        guard = self.guard(weight)
        trial = Trial(weight, guard, self.domain(weight) if guard >= self.least else None)
        self.tried(trial)
        return trial

    def _chosen(self, tried: Mapping[float, Trial]) -> Trial | None:
        """The best on the domain; of equals the one that keeps more of the old model."""
        fitting = [trial for trial in tried.values() if trial.domain is not None]
        return max(fitting, key=lambda trial: (trial.domain, -trial.weight), default=None)


def merge_weights(
    at: Averages,
    heads: tuple[str, ...],
    other: Other,
    arguments: IncrementalArguments,
    measures: Measures,
    note: Callable[[str], None],
) -> tuple[Encoder, dict[str, Any]]:
    """Choose the average of the trained and the other weights, and put its worth into `measures`.

    Returns:
        (the encoder of the average, what was merged as plain JSON values)

    Raises:
        TrainingError: no weight keeps the guard.
        KeyboardInterrupt: Ctrl-C.
    """
    merger = _Merger(at, heads, measures)
    trials: list[Trial] = []
    weight = arguments.fixed_weight
    if weight is None:
        weight, trials = merger.search(arguments.max_forgetting, note)
    encoder = merger.finish(weight)
    note(f"merged: {weight:g} of the trained weights, the rest those of the {other.name}{merger.change(weight)}")
    return encoder, {
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
    """Measures averages, each at most once."""

    at: Averages
    heads: tuple[str, ...]
    measures: Measures
    #: (prefix of the stage, weight) -> what was measured
    known: dict[tuple[str, float], Evaluation] = field(init=False)

    def __post_init__(self) -> None:
        found = self.measures.found
        self.known = {(prefix, 1.0): found[f"{prefix}after"] for prefix in ("", GUARD) if f"{prefix}after" in found}

    def measure(self, prefix: str, weight: float) -> float:
        """The worth of a weight on the domain ("") or the guard."""
        if (prefix, weight) not in self.known:
            evaluator = self.measures.guard if prefix else self.measures.domain
            assert evaluator is not None
            self.known[prefix, weight] = evaluator.evaluate(self.at(weight), self.heads)
        return self.known[prefix, weight].metrics[MAIN_METRIC]

    def search(self, max_forgetting: float, note: Callable[[str], None]) -> tuple[float, list[Trial]]:
        """The best weight, and all that were tried."""
        before = self.measures.found[f"{GUARD}before"].metrics[MAIN_METRIC]

        def show(trial: Trial) -> None:
            domain = "not measured" if trial.domain is None else f"{trial.domain:.4f}"
            note(
                f"merge: weight {trial.weight:g}: {MAIN_METRIC} {domain}, guard {trial.guard:.4f} ({before:.4f} before)"
            )

        search = WeightSearch(
            lambda weight: self.measure(GUARD, weight),
            lambda weight: self.measure("", weight),
            before - max_forgetting - 1e-12,
            show,
        )
        best, trials = search.best()
        return best.weight, trials

    def change(self, weight: float) -> str:
        """What the average is worth on the evaluation data, beside the trained weights, in words; empty without any."""
        values = [found.metrics[MAIN_METRIC] for key in (1.0, weight) if (found := self.known.get(("", key)))]
        return f" ({MAIN_METRIC} {values[0]:.4f} -> {values[-1]:.4f})" if values else ""

    def finish(self, weight: float) -> Encoder:
        """The encoder with this weight; what was measured after training becomes that of the unmerged weights."""
        found = self.measures.found
        for prefix in ("", GUARD):
            if f"{prefix}after" in found:
                found[f"{prefix}unmerged"] = found[f"{prefix}after"]
                self.measure(prefix, weight)
                found[f"{prefix}after"] = self.known[prefix, weight]
        return self.at(weight)
