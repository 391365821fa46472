"""LayerwiseReranker: a causal MiniCPM (as transformers' Granite) with a score after each upper layer, and its files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultrarag.adapters.embedder_files import load_tokenizer
from ultrarag.adapters.llm_reranker_model import PairReader, at_last_token, part_of, refuse_pooling
from ultrarag.adapters.minicpm_model import granite_config, load_granite
from ultrarag.adapters.pair_format import fast_backend, save_tokenizer, token_ids
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.losses import cross_encoder_loss
from ultrarag.packing import hidden_states
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from transformers import GraniteModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features, LoadOptions
    from ultrarag.loss_arguments import LossArguments

HEADS_FILE = "layerwise_heads.safetensors"
#: The lowest layer with a score in the published model.
START_LAYER = 8
_PUBLISHED = "lm_head.{}.linear_head.weight"
_LANGUAGE_HEADS = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight")


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


def load_layerwise(path: str, options: LoadOptions) -> LayerwiseReranker:
    """Load the published model or one saved here; in training also MiniCPM-2B, whose "Yes" every head begins with.

    Raises:
        CheckpointError: another kind of model, or weights are missing.
        UsageError: an option that a reranker does not have.
    """
    from transformers import PreTrainedConfig

    refuse_pooling(options)
    folder = Path(path)
    values = _read_config(folder / "config.json")
    config = granite_config({**values, "is_causal": False}, folder / "config.json")
    config.is_causal = True  # the mapping is the embedder's; this one is a language model
    backbone, _ = load_granite(folder, config)
    stand_in = PreTrainedConfig()  # transformers must not look into the config.json of a kind that it does not know
    stand_in.tokenizer_class = values.get("tokenizer_class")
    tokenizer = load_tokenizer(folder, options, stand_in if values["model_type"] == "minicpm" else None)
    start = int(values.get("start_layer") or min(START_LAYER, config.num_hidden_layers))
    yes = token_ids(fast_backend(tokenizer, path), ["Yes"])[0][0]
    heads = _read_heads(folder, start, config.num_hidden_layers, yes, options.training)
    backbone.config.start_layer = start
    return LayerwiseReranker(backbone, tokenizer, path, start, heads)


def save_layerwise(model: LayerwiseReranker, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write a Granite checkpoint with its tokenizer, and the heads in a file of their own."""
    from safetensors.torch import save_file

    folder = Path(path)
    model.backbone.save_pretrained(folder, state_dict=part_of(state_dict, "backbone."))
    save_tokenizer(model.tokenizer, folder)
    heads = {f"{model.start_layer + i}": state_dict[f"layer_heads.{i}.weight"] for i in range(len(model.layer_heads))}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in heads.items()}
    save_file(tensors, folder / HEADS_FILE, {"format": "pt"})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if values.get("model_type") not in ("minicpm", "granite"):
        raise CheckpointError(
            f"{path}: model_type is '{values.get('model_type')}'; 'bge-reranker-minicpm-layerwise' reads 'minicpm' as "
            "it is published and 'granite' as it is saved here; for other language models use 'bge-reranker-gemma'"
        )
    if values.get("head_type", "simple") != "simple":
        raise CheckpointError(
            f"{path}: head_type is '{values['head_type']}'; only 'simple' heads, as published, are supported"
        )
    return values


def _read_heads(folder: Path, start: int, layers: int, yes: int, training: bool) -> Tensor:
    """The heads' weights, (layers - start + 1, hidden).

    Raises:
        CheckpointError: there are none, and training does not make them.
    """
    numbers = range(start, layers + 1)
    for names in ([str(n) for n in numbers], [_PUBLISHED.format(n - start) for n in numbers]):
        found = _tensors(folder, names)
        if len(found) == len(names):
            return torch.cat([found[name].float().view(1, -1) for name in names])
    one = _tensors(folder, ["lm_head.linear_head.weight"])
    if not one and training:
        language = _tensors(folder, list(_LANGUAGE_HEADS))
        one = {name: language[name][yes] for name in _LANGUAGE_HEADS if name in language}
    if not one:
        raise CheckpointError(
            f"{folder} has no score for the layers {start} to {layers}: it is no layerwise reranker, or incomplete; "
            "a MiniCPM language model becomes one by fine-tuning"
        )
    return next(iter(one.values())).float().view(1, -1).repeat(len(numbers), 1)


def _tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Those of the named tensors that the checkpoint's files hold."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            present = set(tensors.keys())
            found.update({name: tensors.get_tensor(name) for name in names if name in present})
    for file in sorted(folder.glob("pytorch_model*.bin")) if not found else []:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        found.update({name: weights[name] for name in names if name in weights})
    return found
