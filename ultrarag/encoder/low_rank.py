"""What LoRA adds to a model, kept by itself: a tuned query side of megabytes beside the model that it was trained from.

The product is added in an order of single operations that every machine computes alike, so that the same two files give
the same weights, to the bit, and so the same identity, everywhere.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultrarag.errors import CheckpointError, UsageError

_FILE = "low_rank.safetensors"
_A, _B = ".lora_A", ".lora_B"
_BACKBONE = "backbone."
#: How peft begins the names in its files.
_PEFT = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """Changes of a model's weights: W + scaling B A for some, other values for a few more."""

    #: name of a weight in the model's state dict -> A (rank, in) and B (out, rank)
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    #: lora_alpha / lora_rank
    scaling: float
    #: name -> the whole tensor, of what was trained besides (a head)
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_peft(
        cls,
        matrices: Mapping[str, Tensor],
        scaling: float,
        root: str = _BACKBONE,
        others: Mapping[str, Tensor] | None = None,
    ) -> LowRank:
        """Take over the matrices of a peft file.

        Args:
            root: before the names of the part of the model that has the adapters; empty for the whole model.
        """
        found: dict[str, list[Tensor | None]] = {}
        for name, tensor in matrices.items():
            layer, _, which = name.removeprefix(_PEFT).removesuffix(".weight").rpartition(".lora_")
            if which not in ("A", "B") or not layer:
                raise UsageError(f"'{name}' is no matrix of LoRA in a linear layer, which alone are kept by themselves")
            found.setdefault(f"{root}{layer}.weight", [None, None])["AB".index(which)] = tensor
        return cls({name: _pair(name, *pair) for name, pair in found.items()}, scaling, dict(others or {}))

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that change."""
        return (*self.matrices, *self.others)

    def applied_to(self, model: nn.Module) -> nn.Module:
        """The changed model; every weight that does not change is the given model's own, and so is its tokenizer.

        Raises:
            UsageError: the model has no such weight, or one of another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        kept = [*parameters.values(), *model.buffers(), model.tokenizer]
        found = copy.deepcopy(model, {id(item): item for item in kept})
        for name in self.names:
            if name not in parameters:
                raise UsageError(f"the low-rank matrices are of another model: this one has no weight '{name}'")
            parent, _, own = name.rpartition(".")
            changed = nn.Parameter(self.value(name, parameters[name].detach()), requires_grad=False)
            found.get_submodule(parent)._parameters[own] = changed
        return found

    def value(self, name: str, weight: Tensor) -> Tensor:
        """What a weight becomes.

        Raises:
            UsageError: it has another shape than the changes.
        """
        if name in self.others:
            value = self.others[name].to(weight.device, weight.dtype)
        else:
            a, b = (matrix.to(weight.device, torch.float32) for matrix in self.matrices[name])
            if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
                raise UsageError(
                    f"the low-rank matrices of '{name}' are {tuple(b.shape)} and {tuple(a.shape)}, the weight is "
                    f"{tuple(weight.shape)}"
                )
            value = weight + _product(b, a) * self.scaling
        if value.shape != weight.shape:
            raise UsageError(
                f"'{name}' is {tuple(value.shape)} beside the low-rank matrices, not {tuple(weight.shape)}"
            )
        return value

    def part(self, weight: float, model: nn.Module) -> LowRank:
        """`weight` of the changes, from 0 to 1: what makes of `model` the average of it and the changed one."""
        old = dict(model.named_parameters(remove_duplicate=False))
        others = {name: torch.lerp(old[name].detach().to(new), new, weight) for name, new in self.others.items()}
        return LowRank(self.matrices, self.scaling * weight, others)

    def save(self, folder: Path) -> None:
        """Write it into a new folder."""
        from safetensors.torch import save_file

        folder.mkdir()
        tensors = dict(self.others)
        for name, (a, b) in self.matrices.items():
            tensors |= {f"{name}{_A}": a, f"{name}{_B}": b}
        ready = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(ready, folder / _FILE, {"scaling": json.dumps(self.scaling)})

    @classmethod
    def load(cls, folder: Path) -> LowRank:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / _FILE
        try:
            with safe_open(path, framework="pt") as file:
                scaling = float(json.loads((file.metadata() or {})["scaling"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
            matrices = {name: (tensors.pop(name + _A), tensors.pop(name + _B)) for name in names}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path} holds no low-rank matrices: {type(error).__name__}: {error}") from error
        return cls(matrices, scaling, tensors)


def _pair(name: str, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    if a is None or b is None:
        raise UsageError(f"of '{name}' there is only one of LoRA's two matrices")
    return a.detach().cpu().clone(), b.detach().cpu().clone()


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B A, rank by rank: a matrix product adds up in an order that depends on the processor."""
    total = torch.zeros(b.shape[0], a.shape[1], device=b.device)
    for column, row in zip(b.unbind(1), a.unbind(0), strict=True):
        total += column[:, None] * row[None, :]
    return total


class LowRankSide:
    """How sentence-transformers loads such a side: the other side's Transformer, with the changes in it.

    A module of its Router, which asks for `trust_remote_code=True`, as for all code that is not its own.
    """

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> Any:
        """Return a Transformer of sentence-transformers."""
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.util import load_dir_path

        hub: dict[str, Any] = {name: options.get(name) for name in ("token", "cache_folder", "revision")}
        hub["local_files_only"] = bool(options.get("local_files_only"))
        folder = Path(str(load_dir_path(model_name_or_path=model_name_or_path, subfolder=subfolder, **hub)))
        base = json.loads((folder / "config.json").read_text(encoding="utf-8"))["transformer"]
        module = Transformer.load(model_name_or_path, subfolder=base, **options)
        changes = LowRank.load(folder)
        names = {name: name.removeprefix(_BACKBONE) for name in changes.names if name.startswith(_BACKBONE)}
        inside = {*names.values()} <= {name for name, _ in module.named_parameters()}
        weights = dict((module if inside else module.auto_model).named_parameters())
        with torch.no_grad():
            for name, short in names.items():
                weights[short].copy_(changes.value(name, weights[short]))
        return module
