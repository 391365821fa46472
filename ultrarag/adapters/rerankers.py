"""The adapters of models that read (query, passage) pairs: their hooks, free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.claims import PAIR_WORDS, Answer, Claim, ModelFolder, Refusal
from ultrarag.hookspecs import Features, LoadOptions, hookimpl
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.adapters.causal_reranker_model import CausalReranker
    from ultrarag.adapters.layerwise_model import LayerwiseReranker
    from ultrarag.adapters.llm_reranker_model import YesReranker
    from ultrarag.adapters.reranker_model import CrossEncoder
    from ultrarag.loss_arguments import LossArguments


#: What a fine-tune may make a reranker of.
_BASES = ("dense", "body", "causal-lm")


class RerankerAdapter:
    """The hooks of models whose `encode(features)` gives one score per pair."""

    heads = ("scores",)
    pair_input = True

    @hookimpl
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Score the pairs."""
        return cast("CausalReranker | CrossEncoder | LayerwiseReranker | YesReranker", model).encode(features)

    @hookimpl
    def loss(self, passage: Embeddings, teacher: Tensor | None, args: LossArguments) -> Tensor:
        """Cross-entropy of the positive within its group, and of the teacher's distribution where there is one."""
        from ultrarag.losses import cross_encoder_loss

        return cross_encoder_loss(passage.scores, teacher, args)


class CrossEncoderAdapter(RerankerAdapter):
    """A sequence classifier whose only logit is the score: bge-reranker base, large and v2-m3, ms-marco MiniLM.

    Training compares each query's positive with its own negatives; a plain encoder gets a fresh head for it.

    Source:
        bge-reranker (FlagEmbedding); Passage Re-ranking with BERT (Nogueira and Cho, 2019).
    """

    threaded_encode = True

    def claims(self, folder: ModelFolder) -> Answer:
        """A classifier with one label, unless it has a general chat template; a plain encoder may become one.

        Such a template says that pairs are written into words, and not into which: one has to name the adapter that
        reads the two texts as they stand (this one), or in the words of the family (`causal-reranker`).
        """
        family = folder.family
        if family.name == "cross-encoder":
            return None if folder.chat_template else Claim(family.evidence)
        return None if family.name in _BASES else Refusal(str(family))

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load a classifier, or in training an encoder under a fresh classification head."""
        from ultrarag.adapters.reranker_model import load_cross_encoder

        return load_cross_encoder(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers, sentence-transformers' CrossEncoder and FlagEmbedding's FlagReranker load."""
        from ultrarag.adapters.reranker_model import save_cross_encoder

        save_cross_encoder(cast("CrossEncoder", model), path, state_dict)


class GemmaRerankerAdapter(RerankerAdapter):
    """A causal language model that is asked whether the passage answers; the score is its logit of "Yes".

    It reads `<bos>A: {query}\\n B: {passage}\\n {prompt}`, the parts tokenized by themselves.

    Source:
        Model card of BAAI/bge-reranker-v2-gemma.
    """

    def claims(self, folder: ModelFolder) -> Answer:
        """A Gemma whose card says that it ranks; any language model may become one."""
        family = folder.family
        if family.name == "ranking-lm" and folder.model_type == "gemma":
            return Claim(family.evidence, "exact")
        return None if family.name in (*_BASES, "ranking-lm") else Refusal(str(family))

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load any causal language model that transformers knows."""
        from ultrarag.adapters.llm_reranker_model import load_yes_reranker

        return load_yes_reranker(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers and FlagEmbedding's FlagLLMReranker load."""
        from ultrarag.adapters.llm_reranker_model import save_language_model

        save_language_model(cast("YesReranker", model), path, state_dict)


class CausalRerankerAdapter(RerankerAdapter):
    """A language model that judges a pair written into its chat template: Qwen3-Reranker, mxbai-rerank-v2, zerank.

    The score is the logit of "yes" less that of "no", of "1" less "0", or of one token, as the checkpoint says; of the
    same model as a sequence classifier it is the classifier's logit. Settings: `prompt` is the instruction.

    Source:
        Qwen3 Embedding (Zhang et al., 2025); model cards of mixedbread-ai/mxbai-rerank-base-v2, zeroentropy/zerank-2.
    """

    def claims(self, folder: ModelFolder) -> Answer:
        """A model that says into which words a pair is put; one of a known family may become one, or be one unsaid."""
        family = folder.family
        if family.name == "causal-reranker":
            return Claim(family.evidence)
        known = folder.model_type in PAIR_WORDS and family.name in ("causal-lm", "ranking-lm", "cross-encoder")
        return None if known else Refusal(str(family))

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load a causal language model or its sequence classifier, and how it reads a pair."""
        from ultrarag.adapters.causal_reranker_model import load_causal_reranker

        return load_causal_reranker(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers and sentence-transformers' CrossEncoder load."""
        from ultrarag.adapters.causal_reranker_model import save_causal_reranker

        save_causal_reranker(cast("CausalReranker", model), path, state_dict)


class LayerwiseRerankerAdapter(RerankerAdapter):
    """MiniCPM-2B with a score after each of its upper layers; `cutoff_layer` says which one counts, and where it ends.

    In training all scores learn, the last one teaching the others where the rows carry no teacher's scores.

    Source:
        Model card of BAAI/bge-reranker-v2-minicpm-layerwise.
    """

    def claims(self, folder: ModelFolder) -> Answer:
        """The published model's class; MiniCPM-2B may become one."""
        layerwise = [name for name in folder.architectures if "LayerWise" in name]
        if layerwise:
            return Claim(f"config.json: {layerwise[0]}", "exact")
        family = folder.family
        return None if family.name in _BASES and folder.model_type in ("minicpm", "granite") else Refusal(str(family))

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the published model, one saved here, or in training MiniCPM-2B itself."""
        from ultrarag.adapters.layerwise_model import load_layerwise

        return load_layerwise(path, options)

    @hookimpl
    def loss(self, passage: Embeddings, teacher: Tensor | None, args: LossArguments) -> Tensor:
        """The sum of the layers' losses."""
        from ultrarag.adapters.layerwise_model import layerwise_loss

        return layerwise_loss(passage.scores, teacher, args)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write a Granite checkpoint, and the layers' heads beside it."""
        from ultrarag.adapters.layerwise_model import save_layerwise

        save_layerwise(cast("LayerwiseReranker", model), path, state_dict)


cross_encoder = CrossEncoderAdapter()
gemma = GemmaRerankerAdapter()
causal = CausalRerankerAdapter()
layerwise = LayerwiseRerankerAdapter()
