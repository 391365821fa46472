"""Language models over (query, passage) pairs: how they read a pair, and the one whose "Yes" is the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ultrarag.adapters.embedder import last_token
from ultrarag.adapters.embedder_files import load_tokenizer, without_loading_report
from ultrarag.adapters.pair_format import fast_backend, save_tokenizer, shortest, token_ids
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.packing import hidden_states
from ultrarag.types import Embeddings, EncoderSettings, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features, LoadOptions

#: The question that the published models were trained with.
RERANKER_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def llm_settings() -> EncoderSettings:
    """Settings of the published models."""
    return EncoderSettings(
        heads=("scores",), query_instruction="A: ", passage_instruction="B: ", prompt=RERANKER_PROMPT, separator="\n"
    )


class PairReader(nn.Module):
    """A language model that reads `<bos>{query}{separator}{passage}{separator}{prompt}`."""

    def __init__(self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = llm_settings()
        self.reader = fast_backend(tokenizer, path)

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    def pair_tokens(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        query_max_length: int | None,
        max_length: int | None,
        passage_max_length: int | None = None,
        prompts: Sequence[str | None] | None = None,
    ) -> Tokens:
        """Tokenize the parts by themselves and join them; of a pair that is too long the passage is cut.

        Args:
            prompts: a pair's own question, None: the model's.

        Raises:
            UsageError: the question leaves no room.
        """
        asked = [prompt or self.settings.prompt or "" for prompt in prompts or [None] * len(queries)]
        sides = [token_ids(self.reader, texts) for texts in (queries, passages, asked)]
        (separator,) = token_ids(self.reader, [self.settings.separator or ""])
        tokens = Tokens([])
        for query, passage, prompt in zip(*sides, strict=True):
            start, end = self._begin(), [*separator, *prompt]
            room = self._room(max_length, len(start) + len(separator) + len(end))
            left = query[: shortest(query_max_length, room)]
            right = passage[: shortest(passage_max_length, None if room is None else room - len(left))]
            tokens.ids.append([*start, *left, *separator, *right, *end])
            tokens.truncated += len(left) < len(query) or len(right) < len(passage)
        return tokens

    def _begin(self) -> list[int]:
        begin = self.tokenizer.bos_token_id
        return [] if begin is None or begin == self.tokenizer.pad_token_id else [begin]

    def _room(self, max_length: int | None, fixed: int) -> int | None:
        if max_length is not None and max_length <= fixed:
            raise UsageError(
                f"max_length is {max_length}, and the question put to the model with its separators takes {fixed} "
                "tokens: nothing is left for query and passage; raise it, or set a shorter `prompt`"
            )
        return None if max_length is None else max_length - fixed

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward (--gradient_checkpointing)."""
        self.backbone.activation_checkpointing_enable(**options)


def at_last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each row's last real token, (batch, hidden)."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last_token(mask)]


class YesReranker(PairReader):
    """A causal language model whose score is the logit of "Yes" after the pair; state-dict keys: `backbone.*`."""

    def __init__(self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
        super().__init__(backbone, tokenizer, path)
        self.yes = token_ids(self.reader, ["Yes"])[0][0]

    def encode(self, features: Features) -> Embeddings:
        """Return the logits as `scores`, (batch,)."""
        return Embeddings(scores=answer_logits(self.backbone, features, (self.yes,))[:, 0])


def answer_logits(backbone: PreTrainedModel, features: Features, tokens: Sequence[int]) -> Tensor:
    """What a language model answers to each row: its logits of some tokens after the last one, (batch, tokens).

    The vocabulary's other logits are computed at the last token only.
    """
    hidden = hidden_states(backbone.base_model, features)
    head: Any = backbone.get_output_embeddings()
    logits = head(at_last_token(hidden, features["attention_mask"]))[:, list(tokens)]
    logits = logits / (getattr(backbone.config, "logits_scaling", None) or 1.0)
    cap = getattr(backbone.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def load_yes_reranker(path: str, options: LoadOptions) -> YesReranker:
    """Load a causal language model.

    Raises:
        CheckpointError: weights are missing.
        UsageError: an option that a reranker does not have.
    """
    refuse_pooling(options)
    folder = Path(path)
    return YesReranker(load_backbone(folder, options), load_tokenizer(folder, options), path)


def load_backbone(folder: Path, options: LoadOptions, classifier: bool = False) -> PreTrainedModel:
    """Load a language model with its head, or one that classifies, in float32.

    Raises:
        CheckpointError: weights are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    remote = {"trust_remote_code": options.trust_remote_code, "cache_dir": options.cache_dir, "token": options.token}
    config = AutoConfig.from_pretrained(options.config_name or folder, **remote)
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with without_loading_report():
        loaded: Any = kind.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **remote
        )
    backbone, report = loaded
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder}: the weights lack {len(report['missing_keys'])} tensor(s) that the language model needs, first "
            f"'{min(report['missing_keys'])}'; the checkpoint is incomplete, or of a model without a "
            f"{'classification' if classifier else 'language'} head"
        )
    return cast("PreTrainedModel", backbone)


def refuse_pooling(options: LoadOptions) -> None:
    """A reranker gives a score and no vector."""
    if options.pooling is not None:
        raise UsageError("a reranker gives a score and no vector: leave --sentence_pooling_method out")


def save_language_model(model: PairReader, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write the language model and its tokenizer into `path`; tied weights once."""
    tied = model.backbone._tied_weights_keys or () if model.config.tie_word_embeddings else ()
    weights = {name: tensor for name, tensor in part_of(state_dict, "backbone.").items() if name not in tied}
    model.backbone.save_pretrained(Path(path), state_dict=weights)
    save_tokenizer(model.tokenizer, Path(path))


def part_of(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it, on the CPU and apart from the model's."""
    return {
        name.removeprefix(prefix): tensor.detach().cpu().contiguous().clone()
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
