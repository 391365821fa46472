"""bge-reranker-gemma and bge-reranker-minicpm-layerwise: language models that rerank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.hookspecs import Features, LoadOptions, hookimpl
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.adapters.layerwise_model import LayerwiseReranker
    from ultrarag.adapters.llm_reranker_model import YesReranker
    from ultrarag.loss_arguments import LossArguments


class GemmaRerankerAdapter:
    """A causal language model that is asked whether the passage answers; the score is its logit of "Yes".

    It reads `<bos>A: {query}\\n B: {passage}\\n {prompt}`, the parts tokenized by themselves.

    Source:
        Model card of BAAI/bge-reranker-v2-gemma.
    """

    heads = ("scores",)
    pair_input = True

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load any causal language model that transformers knows."""
        from ultrarag.adapters.llm_reranker_model import load_yes_reranker

        return load_yes_reranker(path, options)

    @hookimpl
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Score the pairs."""
        return cast("YesReranker", model).encode(features)

    @hookimpl
    def loss(self, passage: Embeddings, teacher: Tensor | None, args: LossArguments) -> Tensor:
        """Cross-entropy of the positive within its group, and of the teacher's distribution where there is one."""
        from ultrarag.losses import cross_encoder_loss

        return cross_encoder_loss(passage.scores, teacher, args)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers and FlagEmbedding's FlagLLMReranker load."""
        from ultrarag.adapters.llm_reranker_model import save_yes_reranker

        save_yes_reranker(cast("YesReranker", model), path, state_dict)


class LayerwiseRerankerAdapter:
    """MiniCPM-2B with a score after each of its upper layers; `cutoff_layer` says which one counts, and where it ends.

    In training all scores learn, the last one teaching the others where the rows carry no teacher's scores.

    Source:
        Model card of BAAI/bge-reranker-v2-minicpm-layerwise.
    """

    heads = ("scores",)
    pair_input = True

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the published model, one saved here, or in training MiniCPM-2B itself."""
        from ultrarag.adapters.layerwise_files import load_layerwise

        return load_layerwise(path, options)

    @hookimpl
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Score the pairs."""
        return cast("LayerwiseReranker", model).encode(features)

    @hookimpl
    def loss(self, passage: Embeddings, teacher: Tensor | None, args: LossArguments) -> Tensor:
        """The sum of the layers' losses."""
        from ultrarag.adapters.layerwise_model import layerwise_loss

        return layerwise_loss(passage.scores, teacher, args)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write a Granite checkpoint, and the layers' heads beside it."""
        from ultrarag.adapters.layerwise_files import save_layerwise

        save_layerwise(cast("LayerwiseReranker", model), path, state_dict)


gemma = GemmaRerankerAdapter()
layerwise = LayerwiseRerankerAdapter()
