"""LayerwiseReranker: a causal MiniCPM (as transformers' Granite) with one score after each of its upper layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultrarag.adapters.llm_reranker_model import PairReader, at_last_token
from ultrarag.errors import UsageError
from ultrarag.losses import cross_encoder_loss
from ultrarag.packing import hidden_states
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from transformers import GraniteModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features
    from ultrarag.loss_arguments import LossArguments


class LayerwiseReranker(PairReader):
    """Score n is a linear function of the last token's normed hidden state after n layers.

    State-dict keys: `backbone.*`, `layer_heads.{i}.weight` for layer `start_layer + i`.
    """

    def __init__(
        self, backbone: GraniteModel, tokenizer: PreTrainedTokenizerBase, path: str, start_layer: int, heads: Tensor
    ) -> None:
        super().__init__(backbone, tokenizer, path)
        self.start_layer = start_layer
        self.layer_heads = nn.ModuleList()
        for weight in heads:
            head = nn.Linear(weight.numel(), 1, bias=False)
            head.weight.data.copy_(weight)
            self.layer_heads.append(head)
        #: the backbone cut off after n layers; not a part of the module, whose layers these are
        self._views: dict[int, Any] = {}

    @property
    def last_layer(self) -> int:
        """The number of the backbone's layers."""
        return int(self.config.num_hidden_layers)

    def encode(self, features: Features) -> Embeddings:
        """Return `scores`: (batch,) of the cutoff layer, or while training (batch, layers) of all layers with one."""
        if self.training and len(self.layer_heads) > 1:
            return Embeddings(scores=self._all_scores(features))
        layer = self._cutoff()
        hidden = hidden_states(self._upto(layer), features)
        last = at_last_token(hidden, features["attention_mask"])
        return Embeddings(scores=self.layer_heads[layer - self.start_layer](last).view(-1))

    def _cutoff(self) -> int:
        layer = self.settings.cutoff_layer
        if layer is None:
            return self.last_layer
        if not self.start_layer <= layer <= self.last_layer:
            raise UsageError(
                f"cutoff_layer is {layer}; this model has scores after the layers {self.start_layer} to "
                f"{self.last_layer}"
            )
        return layer

    def _upto(self, layer: int) -> Any:
        """The backbone that ends after `layer` layers with the same final norm: it shares all its modules."""
        if layer == self.last_layer:
            return self.backbone
        if layer not in self._views:
            view: Any = copy.copy(self.backbone)
            view._modules = {**self.backbone._modules, "layers": self.backbone.layers[:layer]}  # type: ignore[index]
            self._views[layer] = view
        return self._views[layer]

    def _all_scores(self, features: Features) -> Tensor:
        backbone: Any = self.backbone
        mask = features["attention_mask"]
        states = backbone(
            input_ids=features["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        scores = []
        for number, head in enumerate(self.layer_heads):
            layer = self.start_layer + number
            last = at_last_token(states[layer], mask)
            scores.append(head(last if layer == self.last_layer else backbone.norm(last)))
        return torch.cat(scores, dim=1)


def layerwise_loss(scores: Tensor, teacher: Tensor | None, args: LossArguments) -> Tensor:
    """The sum of the layers' cross-entropies, each with that of the teacher, who is the last layer if none is given.

    Args:
        scores: (pairs, layers), or (pairs,) of a single layer.
        teacher: (queries, group_size) raw scores, or None.

    Source:
        FlagEmbedding's layerwise fine-tuning, over the layers that its documentation means to train.
    """
    if scores.ndim == 1:
        return cross_encoder_loss(scores, teacher, args)
    last = scores[:, -1].detach()
    columns = list(scores.unbind(1))
    losses = [cross_encoder_loss(column, last if teacher is None else teacher, args) for column in columns[:-1]]
    return torch.stack([*losses, cross_encoder_loss(columns[-1], teacher, args)]).sum()
