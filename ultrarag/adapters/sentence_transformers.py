"""sentence-transformers: any checkpoint of that library, run by its own modules; dense, or sparse (SPLADE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.adapters.hooks import EmbedderAdapter
from ultrarag.hookspecs import LoadOptions, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ultrarag.adapters.sentence_transformers_model import SentenceTransformersModel


class SentenceTransformersAdapter(EmbedderAdapter):
    """Whatever `modules.json` lists: Transformer, Pooling, Dense, Normalize, WeightedLayerPooling, SpladePooling...

    A model has one head: dense, or for a SparseEncoder sparse, whose token ids are the dimensions of its vector.
    The adapter `bge` is faster for models of Transformer, Pooling, Dense and Normalize alone: it computes no padding.
    """

    heads = ("dense", "sparse")

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Let sentence-transformers load its modules."""
        from ultrarag.adapters.sentence_transformers_model import load_model

        return load_model(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Let sentence-transformers save its modules."""
        from ultrarag.adapters.sentence_transformers_model import save_model

        save_model(cast("SentenceTransformersModel", model), path, state_dict)


adapter = SentenceTransformersAdapter()
