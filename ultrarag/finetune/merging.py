"""Merging: the trained weights averaged with an older model's, so that what that one knew is not lost.

The search for the weight needs no training: each trial puts an average into the model in memory and measures it on
corpora whose tokens are kept. Three copies of the weights are held meanwhile: the trained, the other, the average.

Source:
    Robust fine-tuning of zero-shot models (Wortsman et al., 2022); for retrieval, LM-Cocktail (Xiao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultrarag.checkpoint import tokenizer_content
from ultrarag.encoder import Encoder
from ultrarag.errors import CheckpointError, TrainingError, UsageError
from ultrarag.finetune.flags import BASE, PARENT
from ultrarag.hookspecs import LoadOptions

#: Weights that a search tries, the neighbours of the best of them, and what is tried when none of them will do.
GRID = (1.0, 0.8, 0.6, 0.4, 0.2)
STEP = 0.1
LAST = (0.1, 0.05)


@dataclass(frozen=True)
class Other:
    """The model that the trained one is averaged with."""

    #: parent, base, or the path given
    name: str
    path: str
    fingerprint: str
    #: on the CPU
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, encoder: Encoder, name: str, path: str, fingerprint: str) -> Other:
        """Copy a model's weights."""
        return cls(name, path, fingerprint, copy_of(encoder.model))


def read_other(name: str, encoder: Encoder, parent: str, fingerprint: str, note: Callable[[str], None]) -> Other:
    """Return the model to merge with, checked; `encoder` is the parent, not yet trained.

    Args:
        name: parent, base, or a path.
        parent, fingerprint: the parent's path and identity.

    Raises:
        UsageError: it is no longer there, or its weights, tokenizer or settings do not fit.
    """
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
    options = LoadOptions(heads=encoder.heads, pooling=encoder.settings.pooling, normalize=encoder.settings.normalize)
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


@dataclass(frozen=True)
class Trial:
    """A weight, and what the average is worth with it."""

    weight: float
    #: on the guard data; None where it was not measured
    guard: float | None
    #: on the evaluation data; None where the guard decided
    domain: float | None


@dataclass
class Search:
    """The search for the weight.

    Args:
        guard, domain: measure the model with a weight.
        least: what the guard must show at least.
        tell: hears of each trial.
    """

    guard: Callable[[float], float]
    domain: Callable[[float], float]
    least: float
    tell: Callable[[Trial], None]

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
        self.tell(trial)
        return trial

    def _chosen(self, tried: Mapping[float, Trial]) -> Trial | None:
        """The best on the domain; of equals the one that keeps more of the old model."""
        fitting = [trial for trial in tried.values() if trial.domain is not None]
        return max(fitting, key=lambda trial: (trial.domain, -trial.weight), default=None)
