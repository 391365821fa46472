"""LoRA: low-rank adapters in a model's linear layers, for every adapter plugin: added, saved, merged, resumed.

The layers are injected into the model as it is, so that its forward, its loss and GradCache know nothing of them. What
is written is always the merged model, under the names that it had; `adapter/` holds the low-rank matrices alone.

Source:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), through peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultrarag.encoder import Encoder, LowRank, adapted_part
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune.flags import LoraArguments
from ultrarag.finetune.step.trainable import unread
from ultrarag.packages import install

#: Where a checkpoint holds the low-rank matrices, as peft reads them.
FOLDER = "adapter"
_FILE = "adapter_model.safetensors"
#: The matrices' file within a checkpoint.
LORA_FILE = f"{FOLDER}/{_FILE}"
#: peft's name of the one set of adapters
_NAME = "default"


@dataclass
class Lora:
    """The low-rank adapters of a model under training."""

    model: nn.Module
    #: the part of the model that has them: its backbone, or all of it
    root: nn.Module
    #: peft's configuration
    config: Any
    #: the model that a checkpoint holds, of which `model` may be one side
    whole: nn.Module

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Make the model one of plain layers for a while, as `save` hooks know it, with the adapters in its weights.

        Afterwards the adapters are there again, and the weights are, to the bit, what they were.
        """
        kept = [(name, layer, layer.get_base_layer().weight.detach().clone()) for name, layer in _layers(self.model)]
        self.remove()
        try:
            yield
        finally:
            for name, layer, weight in kept:
                layer.get_base_layer().weight.data.copy_(weight)
                layer.merged_adapters.clear()
                _put(self.model, name, layer)

    def matrices(self) -> dict[str, Tensor]:
        """The low-rank matrices, named as peft names them in a file."""
        return {
            f"base_model.model.{name.replace(f'.{_NAME}', '')}": tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.root.state_dict().items()
            if _low_rank(name)
        }

    def save(self, folder: Path, matrices: Mapping[str, Tensor] | None = None) -> None:
        """Write `adapter/` into a checkpoint's folder: `PeftModel.from_pretrained(backbone, folder)` reads it."""
        from safetensors.torch import save_file

        target = folder / FOLDER
        target.mkdir()
        self.config.save_pretrained(target)
        save_file(dict(self.matrices() if matrices is None else matrices), target / _FILE, {"format": "pt"})

    def restore(self, folder: Path, merged: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint: its low-rank matrices, and of its merged model what was trained besides them.

        The weights under the adapters stay as they are, so that a resumed run is exactly the undisturbed one.

        Raises:
            CheckpointError: it was not trained with these adapters.
        """
        from safetensors.torch import load_file

        file = folder / FOLDER / _FILE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: this checkpoint was trained without --use_lora")
        saved, mine = load_file(file), self.matrices()
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in mine.items()}:
            raise CheckpointError(
                f"{file} holds other adapters than this run has; give the --lora_rank and --target_modules of then"
            )
        named = {f"base_model.model.{name.replace(f'.{_NAME}', '')}": p for name, p in self.root.named_parameters()}
        with torch.no_grad():
            for name, tensor in saved.items():
                named[name].copy_(tensor)
            for name, parameter in self.whole.named_parameters():
                if name in merged and parameter.requires_grad:
                    parameter.copy_(merged[name])

    def low_rank(self) -> LowRank:
        """The matrices, and what was trained besides them, as what a query side keeps beside its parent's weights."""
        others = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not _low_rank(name)
        }
        prefix = _prefix(self.model, self.root)
        return LowRank.of_peft(self.matrices(), self.config.lora_alpha / self.config.r, prefix, others)

    def remove(self) -> None:
        """Merge the adapters into the weights for good: the model is then of plain layers again."""
        for name, layer in _layers(self.model):
            layer.merge()
            _put(self.model, name, layer.get_base_layer())


def add_lora(encoder: Encoder, arguments: LoraArguments, side: str | None = None, base: str | None = None) -> Lora:
    """Put low-rank adapters into the model's linear layers; they and the heads are then all that is trained.

    Args:
        side: the one that is trained, of a model of two sides.
        base: path or hub name of the model, for whoever reads the adapters without it.

    Raises:
        UsageError: peft is not installed, `target_modules` names no linear layer, or the side in training has none.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"--use_lora needs the package peft: {install('peft')}") from error
    model: nn.Module = getattr(encoder.model, side) if side else encoder.model
    root = adapted_part(model)
    heads = {name for name, p in model.named_parameters() if p.requires_grad and _in_head(model, name)}
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=arguments.lora_dropout,
        target_modules=_targets(model, root, arguments.target_modules),
        base_model_name_or_path=base,
    )
    inject_adapter_in_model(config, root, adapter_name=_NAME)
    other = unread(model, side) if side else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((_low_rank(name) or name in heads) and not name.startswith(other))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"--use_lora does not go with --train_side {side} here: what the {side} side reads texts with has no "
            "linear layer; leave one of them out"
        )
    model.to(encoder.device)
    return Lora(model, root, config, encoder.model)


def _targets(model: nn.Module, root: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """The full names, within `root`, of the linear layers that are to get an adapter."""
    prefix = _prefix(model, root)
    output = getattr(root, "get_output_embeddings", lambda: None)()
    known = [
        name
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear) and module is not output and not _in_head(model, f"{prefix}{name}")
    ]
    if not known:
        raise UsageError(f"--use_lora: a {type(model).__name__} has no linear layer to adapt; leave the flag out")
    chosen = [name for name in known if not wanted or any(f".{name}".endswith(f".{end}") for end in wanted)]
    for end in wanted:
        if not any(f".{name}".endswith(f".{end}") for name in known):
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise UsageError(f"--target_modules {end}: the model has no such linear layer; it has {', '.join(ends)}")
    return chosen


def _prefix(model: nn.Module, root: nn.Module) -> str:
    """What the names of a part's parameters begin with in the whole model."""
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is root)


def _in_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter or module belongs to a head, which is trained whole."""
    if not hasattr(model, "backbone"):
        return name.startswith(("sparse_linear.", "colbert_linear."))
    heads = getattr(model, "head_prefixes", ())
    return not name.startswith("backbone.") or f"{name}.".startswith(heads) or ".pooler." in name


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _low_rank(name: str) -> bool:
    return ".lora_" in name
