"""ColBERT: a vector per token, behind markers, query expansion, a skiplist and a projection; and its files.

Source:
    ColBERT (Khattab and Zaharia, 2020); the layouts of PyLate, of Stanford, and of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.adapters.colbert_files import Declaration, read_late_interaction, small_files
from ultrarag.adapters.embedder import padded_right
from ultrarag.adapters.embedder_files import load_backbone, load_tensors, load_tokenizer, part_of, read_dense
from ultrarag.adapters.sentence_transformers_files import read_json, write_json
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.packing import hidden_states
from ultrarag.tokenizer_limits import keep_limits
from ultrarag.types import Embeddings, EncoderSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features, LoadOptions

#: Positions in the buffer `reading`; -1: there is none.
_QUERY_MARKER, _PASSAGE_MARKER, _LENGTH, _ATTEND, _FILLER, _SKIP_QUERIES = range(6)


class Projection(nn.Module):
    """A Dense module over token vectors; state-dict keys: `linear.*`, `residual.*`."""

    def __init__(self, before: int, after: int, bias: bool, activation: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after, bias=bias)
        self.activation = activation
        self.adds_input = residual
        if residual and before != after:
            self.residual = nn.Linear(before, after, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Project (..., before) to (..., after)."""
        found: Tensor = self.activation(self.linear(vectors))
        if not self.adds_input:
            return found
        return found + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class ColBERT(nn.Module):
    """Backbone and projections; state-dict keys: `backbone.*`, `projections.*`, and two buffers of token ids.

    `skipped` are the ids that are not compared; `reading` is how texts are read: both decide the vectors, so they are
    part of the model's identity.
    """

    skipped: Tensor
    reading: Tensor

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        projections: list[Projection],
        settings: EncoderSettings,
        skipped: list[int],
        reading: list[int],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.projections = nn.ModuleList(projections)
        self.settings = settings
        self.register_buffer("skipped", torch.tensor(skipped, dtype=torch.int64))
        self.register_buffer("reading", torch.tensor(reading, dtype=torch.int64))
        # kept beside the buffer, so that no forward waits for a device
        self._reading = tuple(reading)
        self.declared = Declaration("sentence-transformers")
        #: the files of the layout as they were, by their path in the folder
        self.files: dict[str, bytes] = {}

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    def encode(self, features: Features) -> Embeddings:
        """One vector per token of a text that counts; a text of a symmetric task is read as a passage."""
        query = features.get("kind") == "query"
        features = self._marked(padded_right(features), query)
        mask = features["attention_mask"].bool()
        attended = True
        if query and self._reading[_LENGTH] > 0:
            features, mask = self._expanded(features)
            attended = bool(self._reading[_ATTEND])
        # padding is computed where it is read: by a query that fills up with tokens which no other token sees
        hidden = hidden_states(self.backbone, features, packing=None if attended else False)
        if not query or self._reading[_SKIP_QUERIES]:
            mask = mask & ~torch.isin(features["input_ids"], self.skipped)
        for projection in self.projections:
            hidden = projection(hidden)
        vectors = hidden * mask[..., None].to(hidden.dtype)
        if self.settings.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return Embeddings(colbert=vectors, mask=mask.to(features["attention_mask"].dtype))

    def _marked(self, features: Features, query: bool) -> Features:
        """Put the marker of its kind behind each row's first token."""
        marker = self._reading[_QUERY_MARKER if query else _PASSAGE_MARKER]
        if marker < 0:
            return features
        ids = features["input_ids"]
        put = {"input_ids": marker, "attention_mask": 1, "token_type_ids": 0}
        changed: dict[str, Any] = dict(features)
        for name, value in put.items():
            if name in features:
                row = features[name]  # type: ignore[literal-required]
                changed[name] = torch.cat([row[:, :1], row.new_full((len(ids), 1), value), row[:, 1:]], dim=1)
        return changed  # type: ignore[return-value]

    def _expanded(self, features: Features) -> tuple[Features, Tensor]:
        """Fill each row up to the declared length; the second value is the mask of what is compared."""
        length, filler = self._reading[_LENGTH], self._reading[_FILLER]
        width = features["input_ids"].shape[1]
        changed: dict[str, Any] = dict(features)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in features and width < length:
                changed[name] = F.pad(features[name], (0, length - width))
        mask = changed["attention_mask"].bool()
        fills = ~mask & (torch.arange(mask.shape[1], device=mask.device) < length)
        changed["input_ids"] = changed["input_ids"].masked_fill(fills, filler)
        if self._reading[_ATTEND]:
            changed["attention_mask"] = changed["attention_mask"].masked_fill(fills, 1)
        return changed, mask | fills  # type: ignore[return-value]

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward (--gradient_checkpointing)."""
        self.backbone.activation_checkpointing_enable(**options)


# ---- loading


def load_colbert(path: str, options: LoadOptions) -> ColBERT:
    """Load a late-interaction model of any of the three layouts.

    Raises:
        CheckpointError: another kind of model, unknown modules, or weights that are missing.
        UsageError: an option that contradicts what the files say.
    """
    folder = Path(path)
    declared = read_late_interaction(folder)
    _check_options(declared, options, folder)
    inner = folder / declared.transformer
    backbone, tokenizer = load_backbone(inner, options), load_tokenizer(inner, options)
    projections = [_projection(folder / name) for name in declared.dense]
    if declared.layout == "stanford":
        projections = [_stanford_projection(folder)]
    width = projections[-1].linear.out_features if projections else backbone.config.hidden_size
    if options.colbert_dim not in (None, width):
        raise UsageError(
            f"colbert_dim is {options.colbert_dim}, but the vectors of {folder} have {width} dimensions: "
            "leave --colbert_dim out"
        )
    settings, reading = _reading(declared, tokenizer, backbone, folder)
    skipped = [] if not declared.skipped else known_ids(tokenizer, declared.skipped)
    model = ColBERT(backbone, tokenizer, projections, settings, skipped, reading)
    model.declared = declared
    model.files = small_files(folder, declared.places)
    return model


def _check_options(declared: Declaration, options: LoadOptions, folder: Path) -> None:
    if options.heads and tuple(options.heads) != ("colbert",):
        raise UsageError(f"{folder} has the head colbert alone, not {', '.join(options.heads)}")
    if options.pooling is not None:
        raise UsageError(f"sentence_pooling_method '{options.pooling}': a late-interaction model pools nothing")
    if options.normalize not in (None, declared.normalize):
        raise UsageError(
            f"{folder}: its token vectors {'have' if declared.normalize else 'do not have'} unit length, and "
            f"normalize_embeddings {options.normalize} says otherwise: give --normalize_embeddings {declared.normalize}"
        )


def _projection(folder: Path) -> Projection:
    values, activation, weights = read_dense(folder, "Identity")
    found = Projection(
        values["in_features"],
        values["out_features"],
        values.get("bias", True),
        activation,
        bool(values.get("use_residual")),
    )
    found.load_state_dict(weights)
    return found.float()


def _stanford_projection(folder: Path) -> Projection:
    """The projection beside the backbone's weights, under the name `linear.weight`."""
    weights = load_tensors(folder / "model.safetensors", folder / "pytorch_model.bin")
    if "linear.weight" not in weights:
        raise CheckpointError(f"{folder}: its weights have no 'linear.weight', the projection of a ColBERT")
    weight = weights["linear.weight"].float()
    found = Projection(weight.shape[1], weight.shape[0], False, nn.Identity())
    found.load_state_dict({"linear.weight": weight})
    return found


def known_ids(tokenizer: Any, words: tuple[str, ...]) -> list[int]:
    """The ids of the words that are single tokens; the unknown token's is none of them."""
    found = {tokenizer.convert_tokens_to_ids(word) for word in words}
    return sorted(number for number in found if number is not None and number != tokenizer.unk_token_id)


def _reading(declared: Declaration, tokenizer: Any, backbone: Any, folder: Path) -> tuple[EncoderSettings, list[int]]:
    """The settings, in which lengths leave room for a marker that is put in as a token, and the buffer `reading`."""
    config = declared.config
    markers = {
        "query": _marker(tokenizer, declared.query_marker, config.query_prompt),
        "passage": _marker(tokenizer, declared.passage_marker, config.passage_prompt),
    }
    filler = -1 if declared.expansion is None else _filler(declared, tokenizer, folder)
    lengths = {"query": declared.query_length, "passage": declared.passage_length}
    if any(number >= 0 for number, _ in markers.values()):
        _leave_room(tokenizer, backbone.config)
        room = {kind: int(markers[kind][0] >= 0) for kind in lengths}
        lengths = {kind: None if length is None else length - room[kind] for kind, length in lengths.items()}
    settings = EncoderSettings(
        heads=("colbert",),
        normalize=declared.normalize,
        query_instruction=markers["query"][1],
        passage_instruction=markers["passage"][1],
        query_max_length=lengths["query"],
        passage_max_length=lengths["passage"],
        prompts=config.prompts,
        default_prompt=config.default_prompt,
        similarity=config.similarity,
    )
    reading = [markers["query"][0], markers["passage"][0], declared.expansion or -1, int(declared.attend), filler]
    return settings, [*reading, int(declared.skipped_in_queries)]


def _marker(tokenizer: Any, prefix: str, prompt: str) -> tuple[int, str]:
    """The token that is put behind a text's first one, -1 for none, and the words that are put before the text.

    Args:
        prefix: the marker of PyLate's and Stanford's layouts, which is a token where the vocabulary has it; else text.
        prompt: of the files of sentence-transformers; where it is one token it is a marker too.
    """
    vocabulary, rest = tokenizer.get_vocab(), prompt.removeprefix(prefix)
    for token in (prefix, *prefix.split()[:1]):
        if token in vocabulary:
            return vocabulary[token], rest
    if prefix or not prompt:
        return -1, prefix + rest
    with keep_limits(tokenizer):
        ids, opening = tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer("")["input_ids"][:1]
    alone = len(ids) == 1 and bool(opening) and opening[0] in tokenizer.all_special_ids
    return (ids[0], "") if alone else (-1, prompt)


#: Models whose positions start behind the padding id.
_OFFSET = ("roberta", "mpnet", "camembert", "longformer", "xmod")


def _leave_room(tokenizer: Any, config: Any) -> None:
    """Let the tokenizer give one token less than the model takes: the marker comes after it."""
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if any(name in str(getattr(config, "model_type", "")) for name in _OFFSET):
        positions -= (config.pad_token_id or 0) + 1
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions) - 1


def _filler(declared: Declaration, tokenizer: Any, folder: Path) -> int:
    if declared.filler is not None:
        number = tokenizer.get_vocab().get(declared.filler)
        if number is None:
            raise CheckpointError(f"{folder}: queries are filled with '{declared.filler}', which is no token")
        return int(number)
    for number in (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if number is not None:
            return int(number)
    raise CheckpointError(f"{folder}: queries are filled with mask tokens, and the tokenizer has none")


# ---- saving


def save_colbert(model: ColBERT, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write the layout that the model came in: its own files as they were, around the weights of now."""
    from safetensors.torch import save_file

    folder = Path(path)
    declared = model.declared
    inner = folder / declared.transformer
    weights = part_of(state_dict, "backbone.")
    projections = [part_of(state_dict, f"projections.{number}.") for number in range(len(model.projections))]
    inner.mkdir(parents=True, exist_ok=True)
    model.backbone.save_pretrained(inner, state_dict=weights)
    config = read_json(inner / "config.json")
    for name, content in model.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    _write_config(inner / "config.json", config)
    if declared.layout == "stanford":
        prefix = model.backbone.base_model_prefix
        named = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
        save_file({**named, "linear.weight": projections[0]["linear.weight"]}, folder / "model.safetensors", _FORMAT)
    for name, tensors in zip(declared.dense, projections, strict=declared.layout != "stanford"):
        save_file(tensors, folder / name / "model.safetensors", _FORMAT)


_FORMAT = {"format": "pt"}


def _write_config(path: Path, written: dict[str, Any]) -> None:
    """The backbone's configuration of now, with the class that the layout names."""
    before = read_json(path)
    if "architectures" in before:
        written = {**written, "architectures": before["architectures"]}
    write_json(path, written)
