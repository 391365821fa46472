"""The hooks that every model which `Embedder` can hold shares; free of torch, so that listing plugins is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.hookspecs import Features, LoadOptions, hookimpl
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.adapters.embedder import Embedder
    from ultrarag.loss_arguments import LossArguments


class EmbedderAdapter:
    """The hooks of models with `encode(features)`, such as `Embedder`; subclasses say which heads theirs may have."""

    heads: tuple[str, ...] = ("dense",)

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the backbone and the heads that it has."""
        from ultrarag.adapters.embedder_files import load_embedder

        return load_embedder(path, options, self.heads)

    @hookimpl
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Run the model's one forward."""
        return cast("Embedder", model).encode(features)

    @hookimpl
    def loss(
        self, query: Embeddings, passage: Embeddings, teacher: Tensor | None, step: int, args: LossArguments
    ) -> Tensor:
        """The contrastive or distillation loss of every head that was encoded."""
        from ultrarag.losses import embedding_loss

        return embedding_loss(query, passage, teacher, step, args)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers, sentence-transformers and FlagEmbedding load."""
        from ultrarag.adapters.embedder_files import save_embedder

        save_embedder(cast("Embedder", model), path, state_dict)
