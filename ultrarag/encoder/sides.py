"""Sides: a model whose queries and passages are encoded by different weights, or mapped after one and the same.

Asymmetry is the encoder's and not the adapter's: the hooks get the model of one side, and maps are applied to what they
return. So every adapter can be asymmetric that encodes texts. docs/asymmetric.md has the files of such a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.checkpoint import Identity, fingerprint
from ultrarag.encoder.load import settings_of
from ultrarag.encoder.low_rank import LowRank
from ultrarag.encoder.router import DeclaredSide, write_router
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.hookspecs import Features, LoadOptions
from ultrarag.io import write_json
from ultrarag.maps import LinearMap
from ultrarag.plugins import Adapter
from ultrarag.types import Embeddings, EncoderSettings, Kind
from ultrarag.untrusted import check_folder, refuse_outside

if TYPE_CHECKING:
    from ultrarag.loss_arguments import LossArguments

#: The file that says what the sides of a checkpoint consist of.
SIDES = "sides.json"
#: Folders of models in an asymmetric checkpoint.
PASSAGE, QUERY, LOW_RANK = "passage", "query", "query_low_rank"
_Side = Literal["query", "passage"]
_SIDES: tuple[_Side, _Side] = ("query", "passage")
#: What of an encoder's settings one side has a say in.
_OF: dict[str, tuple[str, ...]] = {
    "query": ("query_instruction", "query_format", "query_plain_format", "query_max_length"),
    "passage": ("passage_instruction", "passage_format", "passage_max_length"),
}


class MapLayer(nn.Module):
    """A `LinearMap` as a layer; state-dict keys: `weight`, `bias`."""

    def __init__(self, linear: LinearMap) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(linear.weight.copy()), requires_grad=False)
        self.bias = nn.Parameter(torch.from_numpy(linear.bias.copy()), requires_grad=False)
        self.normalize = linear.normalize
        self.head = linear.head

    def forward(self, vectors: Tensor) -> Tensor:
        """Map (..., d) in float32, whatever the precision around it: stored vectors are mapped in float32 too."""
        with torch.autocast(vectors.device.type, enabled=False):
            mapped = F.linear(vectors.float(), self.weight, self.bias)
            return F.normalize(mapped, dim=-1) if self.normalize else mapped

    def to_map(self, weights: Mapping[str, Tensor] | None = None) -> LinearMap:
        """The map with the layer's weights, or with those given."""
        found = weights or self.state_dict()
        weight, bias = (found[name].detach().float().cpu().numpy() for name in ("weight", "bias"))
        return LinearMap(weight, bias, self.normalize, self.head)


class Sides(nn.Module):
    """A model of two sides; state-dict keys: `passage.*`, `query.*` if it is another model, `query_maps.*`, ..."""

    settings: EncoderSettings

    def __init__(
        self,
        passage: nn.Module,
        query: nn.Module | None = None,
        query_maps: Iterable[LinearMap] = (),
        passage_maps: Iterable[LinearMap] = (),
        *,
        query_settings: EncoderSettings,
        passage_settings: EncoderSettings,
        low_rank: LowRank | None = None,
    ) -> None:
        """Put two models together; `query` None, or the same: both sides share the passages' model.

        Args:
            low_rank: in place of `query`: the changes that make the passages' model the queries'.
        """
        super().__init__()
        if low_rank:
            query = low_rank.applied_to(passage)
        self.low_rank = low_rank
        self.passage = passage
        self.query = None if query is passage else query
        self.query_maps = nn.ModuleList(MapLayer(item) for item in query_maps)
        self.passage_maps = nn.ModuleList(MapLayer(item) for item in passage_maps)
        self._own = {"query": query_settings, "passage": passage_settings}
        self.settings = _joined(query_settings, passage_settings)

    def side(self, kind: Kind) -> nn.Module:
        """The model that encodes texts of this kind."""
        return self.passage if kind != "query" or self.query is None else self.query

    def maps(self, kind: Kind) -> list[MapLayer]:
        """The maps that are applied to its vectors, in order."""
        return cast("list[MapLayer]", list(self.query_maps if kind == "query" else self.passage_maps))

    def maps_of(self, kind: Kind) -> tuple[LinearMap, ...]:
        """The same as maps of vectors, with the weights of now."""
        return tuple(layer.to_map() for layer in self.maps(kind))

    def side_settings(self, kind: _Side) -> EncoderSettings:
        """The settings that a model of this side alone would have, with what the encoder was told since."""
        return replace(self._own[kind], **{name: getattr(self.settings, name) for name in _OF[kind]})

    def mapped(self, embeddings: Embeddings, kind: Kind) -> Embeddings:
        """Apply a side's maps to what its model gave; padding of ColBERT vectors stays zero."""
        for layer in self.maps(kind):
            vectors = getattr(embeddings, layer.head)
            if vectors is None:
                continue
            found = layer(vectors)
            if layer.head == "colbert":
                found = found * embeddings.mask[..., None].to(found.dtype)
            embeddings = replace(embeddings, **{layer.head: found})
        return embeddings

    def identity(self, adapter: str) -> Identity:
        """Who it is, computed from its content."""
        sides: dict[str, tuple[str, list[str]]] = {}
        for kind in _SIDES:
            alone = fingerprint(self.side(kind), adapter, self.side_settings(kind))
            sides[kind] = alone, [item.digest for item in self.maps_of(kind)]
        return Identity.of_sides(**sides)

    @property
    def config(self) -> Any:
        """The configuration of the passages' backbone."""
        return self.passage.config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the passages' model."""
        return self.passage.tokenizer

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward (--gradient_checkpointing)."""
        for model in {id(m): m for m in (self.passage, self.side("query"))}.values():
            cast(Any, model).activation_checkpointing_enable(**options)


def _joined(query: EncoderSettings, passage: EncoderSettings) -> EncoderSettings:
    """What an encoder of two sides is told: of queries by the one, of everything else by the other."""
    return replace(passage, **{name: getattr(query, name) for name in _OF["query"]})


@dataclass(frozen=True)
class SidedAdapter(Adapter):
    """An adapter's front for a model of two sides: each hook gets the model of the side that a batch is of."""

    @classmethod
    def around(cls, plugin: Adapter) -> SidedAdapter:
        """The front of the same adapter.

        Raises:
            UsageError: it reads pairs, which have no sides.
        """
        if plugin.declared.pair_input:
            raise UsageError(
                f"{plugin.describe()} reads (query, passage) pairs together, so its models have no query side and no "
                "passage side to tell apart; use an adapter of an embedding model"
            )
        return plugin if isinstance(plugin, cls) else cls(plugin.registry, plugin.name, plugin.declared)

    @property
    def plain(self) -> Adapter:
        """The adapter's front for a model of one side."""
        return Adapter(self.registry, self.name, self.declared)

    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Return the two sides at `path`."""
        return load_sides(self.plain, Path(path), options)

    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Return the Embeddings of a batch, mapped."""
        sides, kind = cast(Sides, model), features.get("kind")
        if kind not in ("query", "passage"):
            raise UsageError(
                f"the model's two sides differ, and a batch of kind '{kind}' is of neither: encode with kind='query' "
                "or kind='passage', and train on rows of no symmetric task"
            )
        return sides.mapped(super().encode(sides.side(kind), features), kind)

    def loss(
        self,
        model: nn.Module,
        query: Embeddings | None,
        passage: Embeddings,
        teacher: Tensor | None,
        step: int,
        args: LossArguments,
    ) -> Tensor:
        """Return the scalar loss; the hook gets the queries' model."""
        return super().loss(cast(Sides, model).side("query"), query, passage, teacher, step, args)

    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write both sides into the directory `path`, what they share once."""
        _save(self.plain, cast(Sides, model), Path(path), state_dict)


# ---- files


def _save(plugin: Adapter, model: Sides, folder: Path, state_dict: Mapping[str, Any]) -> None:
    declared = {kind: _declaration(model, kind) for kind in _SIDES}
    for kind in dict.fromkeys(side["model"] for side in declared.values()):
        (folder / kind).mkdir()
        plugin.save(model.side(kind), str(folder / kind), _part(state_dict, f"{kind}."))
    if model.low_rank:
        model.low_rank.save(folder / LOW_RANK)
    for kind, side in declared.items():
        for number, (layer, name) in enumerate(zip(model.maps(kind), side["maps"], strict=True)):
            layer.to_map(_part(state_dict, f"{kind}_maps.{number}.")).save(folder / name)
    write_json(folder / SIDES, {"format": 1, **declared})
    write_router(folder, read_sides(folder), model.settings)


def _declaration(model: Sides, kind: _Side) -> dict[str, Any]:
    """What `sides.json` says of one side."""
    return {
        "model": QUERY if kind == "query" and model.query is not None and not model.low_rank else PASSAGE,
        "low_rank": LOW_RANK if kind == "query" and model.low_rank else None,
        "maps": [f"{kind}_map_{number}" for number in range(len(model.maps(kind)))],
        "settings": model.side_settings(kind).to_dict(),
    }


def _part(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def load_sides(
    plugin: Adapter, folder: Path, options: LoadOptions, known: Mapping[str, nn.Module] | None = None
) -> Sides:
    """Load the two sides that `sides.json` declares.

    Args:
        known: models that are in memory, by the name of their folder: they are used, and their files not read.

    Raises:
        CheckpointError: the file is damaged, of a newer format, or names what is outside of the folder.
        UsageError: an option that contradicts what the sides declare.
    """
    declared = read_sides(folder)
    query, passage = (declared[kind] for kind in ("query", "passage"))
    for name in ("pooling", "normalize"):
        asked, own = getattr(options, name), [getattr(side.settings, name) for side in (query, passage)]
        if asked not in (None, *own):
            raise UsageError(f"{folder}: {name} is {own[1]} in both sides of the model, and cannot be set to {asked}")
    models: dict[str, Any] = dict(known or {})
    for side in (query, passage):
        if side.model not in models:
            models[side.model] = _load_model(plugin, folder / side.model, options, side.settings)
    maps = [[LinearMap.load(folder / name) for name in side.maps] for side in (query, passage)]
    low_rank = LowRank.load(folder / query.low_rank) if query.low_rank else None
    settings = [replace(side.settings, heads=models[side.model].settings.heads) for side in (query, passage)]
    return Sides(
        models[passage.model],
        models[query.model],
        *maps,
        query_settings=settings[0],
        passage_settings=settings[1],
        low_rank=low_rank,
    )


def _load_model(plugin: Adapter, folder: Path, options: LoadOptions, settings: EncoderSettings) -> Any:
    check_folder(folder)
    options = replace(options, pooling=settings.pooling, normalize=settings.normalize)
    model = plugin.load(str(folder), options)
    model.settings = replace(settings, heads=settings_of(model, plugin, options, None).heads)  # type: ignore[assignment]
    return model


def read_sides(folder: Path) -> dict[str, DeclaredSide]:
    """Read `sides.json`: "query" and "passage" -> what they consist of.

    Raises:
        CheckpointError: it is damaged, of a newer format, or names what is outside of the folder.
    """
    path = folder / SIDES
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] > 1:
            raise CheckpointError(f"{path} was written by a newer ultrarag: upgrade ultrarag to read it")
        found: dict[str, DeclaredSide] = {
            kind: DeclaredSide(
                str(values[kind]["model"]),
                tuple(map(str, values[kind]["maps"])),
                EncoderSettings.from_dict(values[kind]["settings"]),
                values[kind]["low_rank"],
            )
            for kind in _SIDES
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    refuse_outside(folder, [name for side in found.values() for name in side.folders], path)
    if found["passage"].low_rank or (found["query"].low_rank and found["query"].model != found["passage"].model):
        raise CheckpointError(
            f"{path} cannot be read: low-rank matrices are of the query side, and of the passages' model"
        )
    return found


def read_passage_maps(folder: Path) -> tuple[LinearMap, ...]:
    """The maps of a checkpoint's passage side, in order, without its models; none of a symmetric checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    if not (folder / SIDES).is_file():
        return ()
    return tuple(LinearMap.load(folder / name) for name in read_sides(folder)["passage"].maps)


# ---- putting sides together


def sides_of(model: nn.Module, settings: EncoderSettings) -> Sides:
    """The model itself where it has sides, else one whose sides are both this model."""
    return model if isinstance(model, Sides) else Sides(model, query_settings=settings, passage_settings=settings)


def join(
    passage: Sides,
    query: Sides,
    query_maps: Sequence[LinearMap] = (),
    passage_maps: Sequence[LinearMap] = (),
    low_rank: LowRank | None = None,
) -> Sides:
    """A model of one's passage side and another's query side, with further maps behind those that they have.

    Args:
        low_rank: what makes the passages' model the queries'; default: what does it already, where it does.

    Raises:
        UsageError: the sides cannot be compared: other heads, or lexical weights over other token ids.
    """
    settings = query.side_settings("query"), passage.side_settings("passage")
    heads = [side.heads for side in settings]
    if heads[0] != heads[1]:
        raise UsageError(
            f"the query side has the heads {', '.join(heads[0])}, the passage side {', '.join(heads[1])}: load both "
            "with the same `heads`"
        )
    left, right = cast("tuple[Any, Any]", (query.side("query"), passage.side("passage")))
    if left is not right and "sparse" in heads[0] and left.tokenizer.get_vocab() != right.tokenizer.get_vocab():
        raise UsageError("the sides' tokenizers differ, so that their lexical weights are of different tokens")
    if low_rank is None and query.low_rank and query.passage is right:
        low_rank = query.low_rank
    return Sides(
        right,
        left,
        [*query.maps_of("query"), *query_maps],
        [*passage.maps_of("passage"), *passage_maps],
        query_settings=settings[0],
        passage_settings=settings[1],
        low_rank=low_rank,
    )
