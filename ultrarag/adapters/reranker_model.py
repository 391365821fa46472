"""CrossEncoder: a transformers sequence classifier with one label over (query, passage) pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ultrarag.adapters.causal_reranker_files import CrossEncoderFiles, read_files
from ultrarag.adapters.embedder import padded_right
from ultrarag.adapters.embedder_files import load_tokenizer, without_loading_report
from ultrarag.adapters.pair_format import PairFormat, fast_backend, join_pairs, save_tokenizer
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.types import Embeddings, EncoderSettings, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features, LoadOptions

#: What a classifier has above its encoder; a plain encoder has none of it (or a pooler only).
_HEAD_PARTS = ("classifier", "score", "pooler", "pre_classifier", "head", "summary")


class CrossEncoder(nn.Module):
    """A classifier whose only logit is the relevance of a pair; state-dict keys: `backbone.*`."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        files: CrossEncoderFiles | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        #: what sentence-transformers' CrossEncoder declares, its activation among it
        self.files = files
        self.settings = EncoderSettings(
            heads=("scores",),
            query_instruction=files.prompt if files else "",
            passage_max_length=files.options.get("max_seq_length") if files else None,
        )
        self.backend = fast_backend(tokenizer, path)  # before the next line, which calls the tokenizer
        self.template = PairFormat.of(tokenizer, path)
        #: parts of the backbone that --fix_encoder and LoRA leave to be trained whole
        self.head_prefixes = head_prefixes(backbone)

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
    ) -> Tokens:
        """Join the pairs as the tokenizer does, such as `<s> q </s></s> p </s>`; segments where the model has two."""
        tokens = join_pairs(
            self.backend, self.template, queries, passages, query_max_length, max_length, passage_max_length
        )
        self._fill_empty(tokens)
        if not self._segments():
            tokens.types = None
        return tokens

    def _fill_empty(self, tokens: Tokens) -> None:
        """Read a pair of empty texts as one end token where the tokenizer has no special ones: no row is empty."""
        end = self.tokenizer.eos_token_id
        for row, ids in enumerate(tokens.ids):
            if not ids:
                tokens.ids[row] = [self.tokenizer.pad_token_id if end is None else end]
                if tokens.types is not None:
                    tokens.types[row] = [0]

    def encode(self, features: Features) -> Embeddings:
        """Return the pairs' logits as `scores`, (batch,)."""
        features = padded_right(features)  # most classifiers read the first column, whatever is in it
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: features[name] for name in names if name in features}  # type: ignore[literal-required]
        return Embeddings(scores=self.backbone(**inputs, return_dict=True).logits.view(-1))

    def _segments(self) -> bool:
        return "token_type_ids" in self.tokenizer.model_input_names and getattr(self.config, "type_vocab_size", 0) > 1

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward (--gradient_checkpointing)."""
        self.backbone.activation_checkpointing_enable(**options)


def head_prefixes(backbone: PreTrainedModel) -> tuple[str, ...]:
    """The prefixes, in a model that calls it `backbone`, of what a classifier has above its encoder."""
    return tuple(f"backbone.{name}." for name, _ in backbone.named_children() if name != backbone.base_model_prefix)


def load_cross_encoder(path: str, options: LoadOptions) -> CrossEncoder:
    """Load a classifier with one label; in training also a plain encoder, which gets a fresh (seeded) head.

    Raises:
        CheckpointError: weights are missing, or it classifies into several labels.
        UsageError: an option that a cross-encoder does not have.
    """
    if options.pooling is not None:
        raise UsageError("a cross-encoder gives a score and no vector: leave --sentence_pooling_method out")
    folder = Path(path)
    remote = {"trust_remote_code": options.trust_remote_code, "cache_dir": options.cache_dir, "token": options.token}
    config = _one_label(folder, options, remote)
    from transformers import AutoModelForSequenceClassification

    with without_loading_report():
        backbone, report = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **remote
        )
    _check_missing(folder, report["missing_keys"], options.training)
    files = read_files(folder)
    if files and (files.others or files.transformer):  # an embedding model's, under a fresh head
        files = None
    return CrossEncoder(backbone, load_tokenizer(folder, options), path, files)


def _one_label(folder: Path, options: LoadOptions, remote: Mapping[str, Any]) -> Any:
    """The model's configuration, with one label where it is that of a plain encoder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.config_name or folder, **remote)
    if any("SequenceClassification" in name for name in config.architectures or ()):
        check_one_label(config, folder)
    config.num_labels = 1
    return config


def check_one_label(config: Any, folder: Path) -> None:
    """Refuse a classifier of several labels, which gives no score."""
    if config.num_labels != 1:
        raise CheckpointError(
            f"{folder} classifies into {config.num_labels} labels; a reranker has one, the relevance of a pair"
        )


def _check_missing(folder: Path, missing: Sequence[str], training: bool) -> None:
    """Refuse weights that are not there, except those of a fresh head in training."""
    of_head = [key for key in missing if any(part in _HEAD_PARTS for part in key.split("."))]
    other = sorted(set(missing) - set(of_head))
    if other:
        raise CheckpointError(
            f"{folder}: the weights lack {len(other)} tensor(s) that the model needs, first '{other[0]}'; "
            "the checkpoint is incomplete or of another architecture"
        )
    if of_head and not training:
        raise CheckpointError(
            f"{folder} has no classification head ('{min(of_head)}'), so it gives no scores: it is no reranker; "
            "fine-tune it first (python -m ultrarag.finetune.bge_reranker), which makes one"
        )


def save_cross_encoder(model: CrossEncoder, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write the classifier, its tokenizer and what it declared into `path`."""
    weights = {
        name.removeprefix("backbone."): tensor.detach().cpu().contiguous().clone()
        for name, tensor in state_dict.items()
        if name.startswith("backbone.")
    }
    model.backbone.save_pretrained(Path(path), state_dict=weights)
    save_tokenizer(model.tokenizer, Path(path))
    # a general one, of a language model that became a classifier: other tools would read pairs by it, or refuse them
    (Path(path) / "chat_template.jinja").unlink(missing_ok=True)
    if model.files:
        model.files.write(Path(path), model.settings.query_instruction, model.settings.passage_max_length)
