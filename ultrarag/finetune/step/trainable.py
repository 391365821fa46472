"""Trainable: the module that the Trainer wraps, so that DDP, FSDP and DeepSpeed see one forward per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.finetune.step.sharding import layer_classes
from ultrarag.hookspecs import Features
from ultrarag.types import Embeddings


class Trainable(nn.Module):
    """An encoder's model under one forward that encodes all sides of a batch."""

    def __init__(self, encoder: Encoder, heads: tuple[str, ...], model: nn.Module | None = None) -> None:
        """Wrap the encoder's model, or the copy of it that is to be trained."""
        super().__init__()
        encoder.casts.stop()
        self.model = encoder.model if model is None else model
        self.adapter = encoder.adapter
        self.heads = heads

    @property
    def config(self) -> Any:
        """The backbone's configuration (DeepSpeed reads its hidden size)."""
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP shards one by one."""
        return layer_classes(self.model)

    def forward(self, sides: Sequence[Features]) -> list[Embeddings]:
        """Encode each side, such as queries and passages."""
        return [self.adapter.encode(self.model, {**side, "heads": self.heads}) for side in sides]

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward, in whatever part of the model can."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        if enable is None:
            raise UsageError(
                f"--gradient_checkpointing: the model of {self.adapter.describe()} has no "
                "'activation_checkpointing_enable'; leave the flag out"
            )
        enable(**options)


def choose_heads(encoder: Encoder, unified: bool) -> tuple[str, ...]:
    """The heads to train: all of them in unified fine-tuning, else the dense one where there is one."""
    if unified or "dense" not in encoder.heads:
        return encoder.heads
    return ("dense",)


def freeze(encoder: Encoder, heads: tuple[str, ...], fix_encoder: bool, fix_positions: bool) -> None:
    """Switch off the gradient of what is not to be trained, and of what no loss can reach.

    Raises:
        UsageError: when nothing is left to train.
    """
    own_heads = getattr(encoder.model, "head_prefixes", ())  # a classifier's head is a part of its backbone
    names = [name for name, _ in encoder.model.named_parameters()]
    if fix_encoder and not any(name.startswith("backbone.") for name in names):
        raise UsageError(f"--fix_encoder: the model of {encoder.adapter.describe()} has no part called 'backbone'")
    for name, parameter in encoder.model.named_parameters():
        head = name.split(".")[0].removesuffix("_linear")
        unused_head = name.startswith(("sparse_linear.", "colbert_linear.")) and head not in heads
        backbone = name.startswith("backbone.") and not name.startswith(own_heads)
        frozen = unused_head or name.startswith("backbone.pooler.")
        frozen |= fix_encoder and backbone
        frozen |= fix_positions and "position_embeddings" in name
        parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in encoder.model.parameters()):
        raise UsageError(
            "nothing is left to train: --fix_encoder freezes everything but the heads, and the heads trained are "
            f"{', '.join(heads)}; add --unified_finetuning, or leave --fix_encoder out"
        )
