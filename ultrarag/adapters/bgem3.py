"""bgem3: BAAI/bge-m3 (dense, sparse and ColBERT), or the same heads over any transformers encoder."""

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
    """The hooks of every model that `Embedder` can hold; subclasses say which heads theirs may have."""

    heads: tuple[str, ...] = ("dense",)

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the backbone and the heads that it has."""
        from ultrarag.adapters.embedder import load_embedder

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
        from ultrarag.adapters.embedder import save_embedder

        save_embedder(cast("Embedder", model), path, state_dict)


class BGEM3Adapter(EmbedderAdapter):
    """Dense vector of CLS, lexical weights, and one ColBERT vector per token.

    Source:
        M3-Embedding (Chen et al., 2024); head files as in FlagEmbedding 1.4.2.
    """

    heads = ("dense", "sparse", "colbert")


adapter = BGEM3Adapter()
