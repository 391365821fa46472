"""Trainable: the module that the Trainer wraps, so that DDP, FSDP and DeepSpeed see one forward per step.

Before that the model is loaded as the run's flags say, and what is not to be trained is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ultrarag.adapters import compares_by_length
from ultrarag.checkpoint import local_folder
from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.finetune.batches import PairLengths
from ultrarag.finetune.flags import OTHER_SIDE
from ultrarag.finetune.step.distributed import layer_classes, load_models_whole
from ultrarag.hookspecs import Features, LoadOptions
from ultrarag.plugins import registry
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.finetune.flags import DataArguments, FinetuneArguments, ModelArguments
    from ultrarag.loss_arguments import LossArguments


class Trainable(nn.Module):
    """An encoder's model under one forward that encodes all sides of a batch."""

    def __init__(self, encoder: Encoder, heads: tuple[str, ...], model: nn.Module | None = None) -> None:
        """Wrap the encoder's model, or the copy of it that is to be trained."""
        super().__init__()
        encoder.casts.stop()
        self.model = encoder.model if model is None else model
        self.adapter = encoder.adapter
        self.heads = heads
        #: a map of stored vectors is no part of the forward: DDP leaves it to the trainer to share its gradient
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_parameters() if name.startswith("model.passage_maps.")
        ]

    @property
    def config(self) -> Any:
        """The backbone's configuration (DeepSpeed reads its hidden size)."""
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP shards one by one."""
        return layer_classes(self.model)

    def forward(self, sides: Sequence[Features]) -> list[Embeddings]:
        """Encode each side, such as queries and passages."""
        return [self.adapter.encode(self.model, {**side, "heads": self.heads}) for side in sides]

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward, in whatever part of the model can."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        if enable is None:
            raise UsageError(
                f"--gradient_checkpointing: the model of {self.adapter.describe()} has no "
                "'activation_checkpointing_enable'; leave the flag out"
            )
        enable(**options)


def load_encoder(arguments: FinetuneArguments, note: Callable[[str], None]) -> Encoder:
    """The model to train, with the run's instructions and lengths.

    Raises:
        UsageError, CheckpointError: it cannot be loaded, or has fewer positions than a text may have tokens.
    """
    from transformers import set_seed

    load_models_whole()
    _settle_length(arguments, note)
    set_seed(arguments.training.seed)  # fresh heads are drawn from the run's seed, the same on every rank
    data = arguments.data
    with arguments.training.main_process_first(desc="loading the model"):
        encoder = Encoder.load(
            arguments.model.model_name_or_path,
            arguments.adapter,
            device=arguments.training.device,
            options=_load_options(arguments),
            query_instruction=data.query_instruction_for_retrieval,
            query_format=data.query_instruction_format if data.query_instruction_for_retrieval else None,
            passage_instruction=data.passage_instruction_for_retrieval,
            passage_format=data.passage_instruction_format if data.passage_instruction_for_retrieval else None,
        )
    if encoder.adapter.declared.pair_input:
        _set_up_pairs(encoder, data, note)
    else:  # refused here if the model has fewer positions
        encoder.max_length("query", data.query_max_len)
        encoder.max_length("passage", data.passage_max_len)
    return encoder


def _settle_length(arguments: FinetuneArguments, note: Callable[[str], None]) -> None:
    """Say for the whole run whether vectors get unit length: if not told, unless the model compares by dot product."""
    loss, model = arguments.loss, arguments.model
    if loss.normalize_embeddings is not None:
        return
    folder = local_folder(model.model_name_or_path, model.cache_dir, model.token)
    by_length = compares_by_length(folder)
    arguments.loss = replace(loss, normalize_embeddings=not by_length)
    if by_length:
        note(
            f"{folder} compares vectors by dot product, so they keep their length (--normalize_embeddings True gives "
            f"them unit length); their scores are divided by the temperature of {loss.temperature:g}: for scores far "
            "above 1 give --temperature 1"
        )


def _load_options(arguments: FinetuneArguments) -> LoadOptions:
    model: ModelArguments = arguments.model
    pairs = registry().adapter(arguments.adapter).declared.pair_input
    return LoadOptions(
        heads=model.heads,
        pooling=model.sentence_pooling_method,
        normalize=None if pairs else arguments.loss.normalize_embeddings,
        colbert_dim=model.colbert_dim if model.colbert_dim > 0 else None,
        training=pairs or arguments.loss.unified_finetuning,
        trust_remote_code=model.trust_remote_code,
        config_name=model.config_name,
        tokenizer_name=model.tokenizer_name,
        use_fast_tokenizer=model.use_fast_tokenizer,
        cache_dir=model.cache_dir,
        token=model.token,
    )


def _set_up_pairs(encoder: Encoder, data: DataArguments, note: Callable[[str], None]) -> None:
    """Check the lengths of pairs, and set what stands between their texts and is asked of them."""
    lengths = PairLengths.of(data)
    encoder.max_length("passage", lengths.pair)
    if data.max_len is not None:
        note(
            f"max_len {data.max_len}: pairs of at most so many tokens, queries of {lengths.query}; query_max_len and "
            "passage_max_len have no effect"
        )
    if data.sep_token is not None:
        if encoder.settings.separator is None:
            note("sep_token has no effect: the tokenizer of this model has a separator of its own")
        else:
            encoder.settings.separator = data.sep_token
    if data.prompt is not None:
        if encoder.settings.prompt is None:
            note("prompt has no effect: this model is no language model, and reads query and passage alone")
        else:
            encoder.settings.prompt = data.prompt


def choose_heads(encoder: Encoder, unified: bool) -> tuple[str, ...]:
    """The heads to train: all of them in unified fine-tuning, else the dense one where there is one."""
    if unified or "dense" not in encoder.heads:
        return encoder.heads
    return ("dense",)


def check_regularized(heads: tuple[str, ...], loss: LossArguments) -> None:
    """Raise UsageError where lexical weights are to get fewer, and none are trained."""
    if loss.regularized and "sparse" not in heads:
        raise UsageError(
            f"--{loss.regularized} is for lexical weights, and the heads trained are {', '.join(heads)}; leave it out, "
            "or train a sparse head (a SPLADE; bge-m3 with --unified_finetuning)"
        )


def freeze(
    encoder: Encoder,
    heads: tuple[str, ...],
    fix_encoder: bool,
    fix_positions: bool,
    frozen_side: str | None = None,
    layers: int = 0,
) -> None:
    """Switch off the gradient of what is not to be trained, and of what no loss can reach.

    Args:
        frozen_side: of a model of two sides, the one that stays as it is: query or passage.
        layers: how many of the first layers stay as they are, and what lies below them.

    Raises:
        UsageError: when nothing is left to train, or the model has fewer layers.
    """
    own_heads = getattr(encoder.model, "head_prefixes", ())  # a classifier's head is a part of its backbone
    fixed = _fixed(encoder.model, frozen_side)
    if layers:
        fixed += below(_part_in_training(encoder.model, frozen_side), layers)
    names = [name for name, _ in encoder.model.named_parameters()]
    if fix_encoder and not any("backbone" in name.split(".")[:2] for name in names):
        raise UsageError(f"--fix_encoder: the model of {encoder.adapter.describe()} has no part called 'backbone'")
    for name, parameter in encoder.model.named_parameters():
        name = name.removeprefix("query.").removeprefix("passage.")  # where the sides are two models
        head = name.split(".")[0].removesuffix("_linear")
        unused_head = name.startswith(("sparse_linear.", "colbert_linear.")) and head not in heads
        backbone = name.startswith("backbone.") and not name.startswith(own_heads)
        frozen = unused_head or name.startswith("backbone.pooler.")
        frozen |= fix_encoder and backbone
        frozen |= fix_positions and "position_embeddings" in name
        frozen |= name.startswith(("query_maps.", "passage_maps.", *fixed))
        parameter.requires_grad_(not frozen)
    if frozen_side:
        side: nn.Module = getattr(encoder.model, frozen_side)
        side.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in encoder.model.parameters()):
        if fixed:
            raise UsageError(
                "nothing is left to train: the checkpoint declares frozen all that would be; train the other side"
            )
        raise UsageError(
            "nothing is left to train: --fix_encoder freezes everything but the heads, and the heads trained are "
            f"{', '.join(heads)}; add --unified_finetuning, or leave --fix_encoder out"
        )


def _part_in_training(model: nn.Module, frozen_side: str | None) -> nn.Module:
    trained = OTHER_SIDE.get(frozen_side or "")
    found: nn.Module = getattr(model, trained or "passage", model)  # two sides in training have the same parts
    return found


def layers_of(model: nn.Module) -> tuple[str, int]:
    """The name of a model's repeated layers, and how many there are; ("", 0) for a model without any."""
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) > 1
            and all(any(True for _ in layer.children()) for layer in module)
        ):
            return name, len(module)
    return "", 0


def below(model: nn.Module, count: int) -> tuple[str, ...]:
    """How the names of a model's first layers begin, and of the parts of the same backbone that come before them.

    Raises:
        UsageError: it has fewer layers.
    """
    layers, total = layers_of(model)
    if count > total:
        raise UsageError(
            f"--freeze_layers {count}: the model has {total or 'no'} layers, from which this many are frozen"
        )
    backbone = layers.split(".")[0]
    names = [name for name, _ in model.named_parameters() if name.split(".")[0] == backbone]
    first = next(number for number, name in enumerate(names) if name.startswith(f"{layers}."))
    return (*names[:first], *(f"{layers}.{number}." for number in range(count)))


def still_modules(model: nn.Module, count: int, frozen_side: str | None) -> list[nn.Module]:
    """The modules of which a run with so many frozen layers trains nothing: there is no dropout in them."""
    if not count:
        return []
    part = _part_in_training(model, frozen_side)
    fixed = below(part, count)
    found = []
    for name, module in part.named_modules():
        weights = [f"{name}.{own}" for own, _ in module.named_parameters()]
        if weights and all(weight.startswith(fixed) for weight in weights):
            found.append(module)
    return found


def _fixed(model: nn.Module, frozen_side: str | None) -> tuple[str, ...]:
    """The beginnings of the names that are never trained: what a checkpoint declares frozen, and what the side in
    training does not read.
    """
    trained = OTHER_SIDE.get(frozen_side or "")
    parts = [model, *model.children()] if trained is None else [getattr(model, trained)]
    found = [name for part in parts for name in getattr(part, "frozen_prefixes", ())]
    return (*found, *(() if trained is None else unread(parts[0], trained)))


def unread(part: nn.Module, side: str) -> tuple[str, ...]:
    """How the names of the modules begin that a side's texts do not pass; empty where the model does not say."""
    told = getattr(part, "unread_prefixes", None)
    return tuple(told(side)) if told else ()
