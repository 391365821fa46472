"""bge-reranker: cross-encoders with one logit: bge-reranker base, large and v2-m3, ms-marco MiniLM, and their like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.hookspecs import Features, LoadOptions, hookimpl
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.adapters.reranker_model import CrossEncoder
    from ultrarag.loss_arguments import LossArguments


class RerankerAdapter:
    """A sequence classifier that reads query and passage together; the score is its logit.

    Training compares each query's positive with its own negatives; a plain encoder gets a fresh head for it.

    Source:
        bge-reranker (FlagEmbedding); Passage Re-ranking with BERT (Nogueira and Cho, 2019).
    """

    heads = ("scores",)
    pair_input = True
    threaded_encode = True

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load a classifier, or in training an encoder under a fresh classification head."""
        from ultrarag.adapters.reranker_model import load_cross_encoder

        return load_cross_encoder(path, options)

    @hookimpl
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Score the pairs."""
        return cast("CrossEncoder", model).encode(features)

    @hookimpl
    def loss(self, passage: Embeddings, teacher: Tensor | None, args: LossArguments) -> Tensor:
        """Cross-entropy of the positive within its group, and of the teacher's distribution where there is one."""
        from ultrarag.losses import cross_encoder_loss

        return cross_encoder_loss(passage.scores, teacher, args)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers, sentence-transformers' CrossEncoder and FlagEmbedding's FlagReranker load."""
        from ultrarag.adapters.reranker_model import save_cross_encoder

        save_cross_encoder(cast("CrossEncoder", model), path, state_dict)


adapter = RerankerAdapter()
