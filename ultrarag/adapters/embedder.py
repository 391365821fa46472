"""Embedder: a transformers backbone with a pooled dense vector (every pooling) and bge-m3's two optional heads.

The adapters `bgem3` and `bge` are two ways of loading it. State-dict keys: `backbone.*`, `dense_layers.*`,
`colbert_linear.*`, `sparse_linear.*`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.errors import CheckpointError, UsageError, did_you_mean
from ultrarag.packing import hidden_states
from ultrarag.types import Embeddings, EncoderSettings, Sparse

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features


def first_token(mask: Tensor) -> Tensor:
    """The position of each row's first real token, (batch,), from a mask (batch, tokens)."""
    return mask.to(torch.int8).argmax(dim=1)


def last_token(mask: Tensor) -> Tensor:
    """The position of each row's last real token, (batch,), from a mask (batch, tokens)."""
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)


def padded_right(features: Features) -> Features:
    """The same batch with its padding at the end of the rows, for models that count positions by column."""
    mask = features["attention_mask"]
    first = first_token(mask)
    if not bool(first.any()):
        return features
    columns = (torch.arange(mask.shape[1], device=mask.device) + first[:, None]) % mask.shape[1]
    moved = {name: value.gather(1, columns) for name, value in features.items() if isinstance(value, Tensor)}
    return {**features, **moved}  # type: ignore[typeddict-item]


def _cls(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, first_token(mask))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, last_token(mask))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)
    return _weighted(hidden, weights)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Token i of n weighs i (1-based): sum(i h_i) / sum(i), as in MiniCPM-Embedding and SGPT."""
    weights = (mask.cumsum(dim=1) * mask).to(hidden.dtype)
    return _weighted(hidden, weights)


def _at(hidden: Tensor, position: Tensor) -> Tensor:
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    total = torch.einsum("btd,bt->bd", hidden, weights)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


_POOLING = {"cls": _cls, "mean": _mean, "last_token": _last, "weighted_mean": _weighted_mean}
#: The names that --sentence_pooling_method takes.
METHODS = tuple(_POOLING)


def pool(hidden: Tensor, mask: Tensor, method: str) -> Tensor:
    """Return one vector per text.

    Args:
        hidden: (batch, tokens, dim).
        mask: (batch, tokens), 1 for text; every row has at least one token.
        method: cls, mean, last_token or weighted_mean.

    Returns:
        (batch, dim).
    """
    if method not in _POOLING:
        raise UsageError(
            f"pooling '{method}' is unknown{did_you_mean(method, METHODS)} it is one of {', '.join(METHODS)}"
        )
    return _POOLING[method](hidden, mask)


def first_dimensions(vectors: Tensor, dim: int) -> Tensor:
    """Return (batch, dim) of (batch, more) vectors, as models trained with Matryoshka losses allow.

    Raises:
        UsageError: there are fewer dimensions.
    """
    if not 1 <= dim <= vectors.shape[1]:
        raise UsageError(f"truncate_dim is {dim}, but the vectors have {vectors.shape[1]} dimensions")
    return vectors[:, :dim]


#: Heads and the file that holds each one's weights, as FlagEmbedding names them.
HEAD_FILES = {"colbert": "colbert_linear.pt", "sparse": "sparse_linear.pt"}


class Embedder(nn.Module):
    """Backbone, pooling and heads; `encode` is the one forward for training and serving."""

    def __init__(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        #: the files that hold parts of the published model which are saved with it and not run here, by name
        self.published: dict[str, Path] = {}
        self.dense_layers = nn.ModuleList()
        self.colbert_linear: nn.Linear | None = None
        self.sparse_linear: nn.Linear | None = None

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    def encode(self, features: Features) -> Embeddings:
        """Return the heads that `features["heads"]` asks for (all that there are, if it does not)."""
        heads = features.get("heads") or self.settings.heads
        hidden = hidden_states(self.backbone, features)
        mask = features["attention_mask"]
        result = Embeddings()
        if "dense" in heads:
            result.dense = self._dense(hidden, mask)
        if "sparse" in heads:
            result.sparse = self._sparse(hidden, features["input_ids"], mask)
        if "colbert" in heads:
            result.colbert, result.mask = self._colbert(hidden, mask)
        return result

    def _dense(self, hidden: Tensor, mask: Tensor) -> Tensor:
        vector = pool(hidden, mask, self.settings.pooling or "cls")
        for layer in self.dense_layers:
            vector = layer(vector)
        if self.settings.truncate_dim is not None:
            vector = first_dimensions(vector, self.settings.truncate_dim)
        return F.normalize(vector, dim=-1) if self.settings.normalize else vector

    def _sparse(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Sparse:
        """ReLU(w h + b) per token, the largest per distinct token id; special tokens have none."""
        linear = self._head("sparse", self.sparse_linear)
        weights = torch.relu(linear(hidden)).squeeze(-1)
        special = torch.tensor(self._special_ids(), device=ids.device)
        keep = mask.bool() & ~torch.isin(ids, special)
        return distinct_tokens(ids, weights, keep)

    def _colbert(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One vector per token but the first (CLS); padding is zero and masked."""
        linear = self._head("colbert", self.colbert_linear)
        rows = torch.arange(mask.shape[0], device=mask.device)
        mask = mask.clone()
        mask[rows, first_token(mask)] = 0
        vectors = linear(hidden[:, 1:]) * mask[:, 1:, None].to(hidden.dtype)
        return (F.normalize(vectors, dim=-1) if self.settings.normalize else vectors), mask[:, 1:]

    def _head(self, name: str, linear: nn.Linear | None) -> nn.Linear:
        if linear is None:
            raise CheckpointError(
                f"the head '{name}' has no weights: {HEAD_FILES[name]} is not in the checkpoint; "
                "fine-tune with --unified_finetuning to train it, or ask for other heads"
            )
        return linear

    def _special_ids(self) -> list[int]:
        """cls, eos, pad and unk; a BERT tokenizer has no eos, and its sep stands for it."""
        names = ("cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "unk_token_id")
        found = {getattr(self.tokenizer, name, None) for name in names}
        return sorted(token for token in found if token is not None)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward (--gradient_checkpointing)."""
        self.backbone.activation_checkpointing_enable(**options)


def distinct_tokens(ids: Tensor, weights: Tensor, keep: Tensor) -> Sparse:
    """Keep each row's largest weight per token id.

    Args:
        ids, weights: (batch, tokens); keep: (batch, tokens) bool, the positions that count.

    Returns:
        Sparse of the same shape: distinct ids ascending, then padding. Differentiable in `weights`.
    """
    ids = torch.where(keep, ids, torch.iinfo(ids.dtype).max)
    by_weight = weights.detach().argsort(dim=1, descending=True, stable=True)
    order = by_weight.gather(1, ids.gather(1, by_weight).argsort(dim=1, stable=True))
    ids, weights = ids.gather(1, order), weights.gather(1, order)
    first = torch.ones_like(keep)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first &= ids != torch.iinfo(ids.dtype).max
    front = (~first).to(torch.int8).argsort(dim=1, stable=True)
    ids, weights, first = ids.gather(1, front), weights.gather(1, front), first.gather(1, front)
    width = max(1, int(first.sum(1).max()))
    first = first[:, :width]
    return Sparse(
        torch.where(first, ids[:, :width], Sparse.PAD_ID),
        torch.where(first, weights[:, :width], weights.new_zeros(())),
    )
