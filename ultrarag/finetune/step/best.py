"""Best: the best weights of a run, kept in memory while no checkpoint is due.

A checkpoint of both sides is written, loaded again and compared: two processor seconds for a model of 23 million
weights, of which a query side that learns for half a minute had four. What is kept here costs a copy of the weights in
training.
"""

from __future__ import annotations

import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: In a checkpoint: the weights of an earlier step, which were better than its own and are in no checkpoint.
BEST = "best.safetensors"


class Best:
    """The trained weights of the best step, where they are on no disk, and when a checkpoint was last written."""

    def __init__(self, seconds: float) -> None:
        """Begin to count; `seconds` from one checkpoint to the next at least, 0 for all that are asked for."""
        self.seconds = seconds
        self._since = time.monotonic()
        self._weights: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._weights)

    @property
    def early(self) -> bool:
        """The last checkpoint, or the start, is too near for another one."""
        return time.monotonic() - self._since < self.seconds

    def keep(self, model: nn.Module) -> None:
        """Copy the weights in training."""
        self._weights = {name: weight.detach().to("cpu", copy=True) for name, weight in _trained(model).items()}

    def restore(self, model: nn.Module) -> None:
        """Put the copy back."""
        for name, weight in _trained(model).items():
            weight.data.copy_(self._weights[name])

    def written(self, folder: Path, itself: bool) -> None:
        """A checkpoint is being written into a folder: it is the best one itself, or takes the copy along."""
        self._since = time.monotonic()
        if itself:
            self._weights = {}
        elif self._weights:
            save_file(self._weights, folder / BEST)

    def read(self, folder: Path) -> None:
        """Have what a checkpoint took along."""
        self._weights = load_file(folder / BEST) if (folder / BEST).is_file() else {}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
