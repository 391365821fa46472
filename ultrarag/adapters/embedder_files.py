"""Loading and saving an Embedder: the backbone, whatever the files beside it declare, and the heads."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ultrarag.adapters.embedder import HEAD_FILES, METHODS, Embedder
from ultrarag.adapters.embedding_gemma2_files import MODEL_TYPE, load_text_model, published_files, save_text_model
from ultrarag.adapters.sentence_transformers_files import (
    ModulesDeclaration,
    read_declaration,
    read_json,
    write_declaration,
)
from ultrarag.claims import ModelFolder
from ultrarag.errors import CheckpointError, UsageError, did_you_mean
from ultrarag.types import EncoderSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import LoadOptions

#: Activations of sentence-transformers' Dense module that are known here.
_ACTIVATIONS = {"Tanh": nn.Tanh, "Identity": nn.Identity, "ReLU": nn.ReLU, "GELU": nn.GELU, "Sigmoid": nn.Sigmoid}


def load_embedder(path: str, options: LoadOptions, heads: tuple[str, ...]) -> Embedder:
    """Load a backbone and whatever the files beside it declare.

    Args:
        heads: the heads that the adapter knows; those with weights (or, in training, asked for) are loaded.

    Raises:
        CheckpointError: weights that the backbone needs are missing or do not fit.
        UsageError: an option that the model cannot follow.
    """
    folder = Path(path)
    declared = read_declaration(folder)
    backbone = load_backbone(folder / (declared.transformer if declared else ""), options)
    tokenizer = load_tokenizer(folder / (declared.transformer if declared else ""), options)
    settings = read_settings(declared, options)
    if options.pooling is None and (declared is None or declared.pooling is None):
        settings.pooling = usual_pooling(backbone)
    if settings.pooling == "cls":
        refuse_first_token(backbone, folder)
    model = Embedder(backbone, tokenizer, settings)
    if ModelFolder(folder).model_type == MODEL_TYPE:
        model.published = published_files(folder / (declared.transformer if declared else ""))
    for name in declared.dense if declared else []:
        model.dense_layers.append(_load_dense(folder / name))
    settings.heads = load_heads(model, folder, options, heads)
    return model


def load_backbone(folder: Path, options: LoadOptions) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModel

    remote = {"trust_remote_code": options.trust_remote_code, "cache_dir": options.cache_dir, "token": options.token}
    config = AutoConfig.from_pretrained(options.config_name or folder, **remote)
    loaded: Any
    with without_loading_report():
        if config.model_type == MODEL_TYPE:
            loaded = load_text_model(folder, config, **remote)
        else:
            loaded = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **remote
            )
    backbone, report = loaded
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if not missing:
        if report["missing_keys"]:
            backbone.pooler = None  # random weights that nothing uses would still be saved and hashed
        return cast("PreTrainedModel", backbone)
    raise CheckpointError(
        f"{folder}: the weights lack {len(missing)} tensor(s) that a {type(backbone).__name__} needs, "
        f"first '{missing[0]}'; the checkpoint is incomplete or of another architecture"
    )


def usual_pooling(backbone: PreTrainedModel) -> str:
    """The pooling of a model whose files say none.

    An encoder's is cls; a causal decoder's last token is the only one that has seen the text; of a decoder that was
    made to look both ways (`is_causal: false`) it is the mean, as sentence-transformers has it.
    """
    if is_causal(backbone):
        return "last_token"
    return "mean" if getattr(backbone.config, "is_causal", None) is False else "cls"


def is_causal(backbone: nn.Module) -> bool:
    """Whether a token sees only those before it."""
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "is_causal", None) is False:
        return False
    named = next(iter(getattr(config, "architectures", None) or [""]))
    attention = [getattr(module, "is_causal", None) for module in backbone.modules()]
    known = [value for value in attention if isinstance(value, bool)]
    return all(known) if known else named.endswith("ForCausalLM")


def refuse_first_token(backbone: nn.Module, folder: Path) -> None:
    """Refuse cls pooling where the first token sees no other.

    Raises:
        CheckpointError: the model is causal.
    """
    if is_causal(backbone):
        raise CheckpointError(
            f"{folder}: pooling 'cls' takes the first token, and this {type(backbone).__name__} is causal: its first "
            "token sees no other, so texts that begin alike would all have one vector; use the pooling last_token "
            "(--sentence_pooling_method last_token)"
        )


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Keep transformers from reporting tensors that we judge ourselves (a pooler that nothing uses, say)."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_not_a_loading_report)
    try:
        yield
    finally:
        logger.removeFilter(_not_a_loading_report)


def _not_a_loading_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def load_tokenizer(folder: Path, options: LoadOptions, config: Any = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, which pads with its end token where it has no padding token.

    Args:
        config: the model's configuration, where transformers cannot read it from `folder` itself.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        options.tokenizer_name or folder,
        config=config,
        use_fast=options.use_fast_tokenizer,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_settings(declared: ModulesDeclaration | None, options: LoadOptions) -> EncoderSettings:
    """Return the settings that modules.json and its companions declare, or `options` in their place."""
    declared = declared or ModulesDeclaration(normalize=True)
    pooling = options.pooling or declared.pooling or "cls"
    if pooling not in METHODS:
        raise UsageError(
            f"sentence_pooling_method '{pooling}' is unknown{did_you_mean(pooling, METHODS)} "
            f"(one of {', '.join(METHODS)})"
        )
    return EncoderSettings(
        pooling=pooling,
        normalize=declared.normalize if options.normalize is None else options.normalize,
        query_max_length=declared.max_length,
        passage_max_length=declared.max_length,
        **declared.config.settings(),
    )


def read_dense(folder: Path, usual: str) -> tuple[dict[str, Any], nn.Module, dict[str, Tensor]]:
    """A Dense module of sentence-transformers or PyLate: its configuration, activation and weights.

    Args:
        usual: the activation where the configuration names none.

    Raises:
        CheckpointError: damaged files, or an activation that is not known here.
    """
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds no object")
    activation = str(values.get("activation_function", usual)).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{folder}: activation '{activation}' is not one of {', '.join(_ACTIVATIONS)}")
    weights = load_tensors(folder / "model.safetensors", folder / "pytorch_model.bin")
    return values, _ACTIVATIONS[activation](), weights


def _load_dense(folder: Path) -> nn.Sequential:
    """One Dense module: linear, then activation."""
    values, activation, weights = read_dense(folder, "Tanh")
    linear = nn.Linear(values["in_features"], values["out_features"], bias=values.get("bias", True))
    linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
    return nn.Sequential(linear, activation)


def load_tensors(*candidates: Path) -> dict[str, Tensor]:
    for path in candidates:
        if path.is_file() and path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if path.is_file():
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    raise CheckpointError(f"none of {', '.join(str(path) for path in candidates)} exists")


def load_heads(
    model: Embedder,
    folder: Path,
    options: LoadOptions,
    known: tuple[str, ...],
    inside: Mapping[str, nn.Linear] | None = None,
) -> tuple[str, ...]:
    """Load the heads' weights, or make fresh ones where training allows it; return the heads that the model has.

    Args:
        inside: heads that came with the backbone's weights; a head's own file goes before.
    """
    inside = inside or {}
    wanted = options.heads or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(
            f"no head '{unknown[0]}'{did_you_mean(unknown[0], known)} (this adapter has {', '.join(known)})"
        )
    extra = [name for name in HEAD_FILES if name in wanted]
    missing = [HEAD_FILES[name] for name in extra if name not in inside and not (folder / HEAD_FILES[name]).is_file()]
    if missing and options.heads and not options.training:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}: the head has no weights to encode with; "
            "fine-tune with --unified_finetuning first, or leave it out of `heads`"
        )
    present = []
    for name in known:
        file = HEAD_FILES.get(name)
        if name not in wanted:
            continue
        if file is None or _attach_head(model, name, folder / file, options, inside.get(name)):
            present.append(name)
    return tuple(present)


def _attach_head(model: Embedder, name: str, path: Path, options: LoadOptions, inside: nn.Linear | None) -> bool:
    """Give the model one linear head; False when it has no weights and may not get fresh ones."""
    hidden = model.config.hidden_size
    width = 1 if name == "sparse" else hidden
    if name == "colbert" and options.colbert_dim and options.colbert_dim > 0:
        width = options.colbert_dim
    if path.is_file():
        weights = torch.load(path, map_location="cpu", weights_only=True)
        linear = fitted_linear(weights, hidden, path)
        if name == "colbert" and options.colbert_dim and options.colbert_dim not in (-1, linear.out_features):
            raise UsageError(
                f"colbert_dim is {options.colbert_dim}, but {path} holds a head of {linear.out_features}: "
                "leave --colbert_dim out, or remove the file to train a fresh head"
            )
    elif inside is not None:
        linear = inside
    elif options.training:
        linear = nn.Linear(hidden, width)
    else:
        return False
    setattr(model, f"{name}_linear", linear)
    return True


def fitted_linear(weights: Mapping[str, Tensor], hidden: int, path: Path) -> nn.Linear:
    """Return a head that holds `weights` read from `path`, or raise CheckpointError when they do not fit."""
    shape = tuple(weights["weight"].shape) if "weight" in weights else None
    if set(weights) != {"weight", "bias"} or shape is None or shape[1] != hidden:
        raise CheckpointError(
            f"{path} holds {sorted(weights)} of shape {shape}; a head over hidden size {hidden} is needed"
        )
    linear = nn.Linear(shape[1], shape[0])
    linear.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return linear


def save_embedder(model: Embedder, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write the backbone, tokenizer, heads and sentence-transformers' files into `path`."""
    folder = Path(path)
    if model.published:
        save_text_model(model.published, folder, part_of(state_dict, "backbone."))
    else:
        model.backbone.save_pretrained(folder, state_dict=part_of(state_dict, "backbone."))
    model.tokenizer.save_pretrained(folder)
    for name, file in HEAD_FILES.items():
        weights = part_of(state_dict, f"{name}_linear.")
        if weights:
            torch.save(weights, folder / file)
    dense = [_save_dense(folder, index, layer, state_dict) for index, layer in enumerate(model.dense_layers)]
    width = getattr(model.config, "embedding_dim", model.config.hidden_size)  # of what is pooled
    write_declaration(folder, model.settings, width, dense)


def _save_dense(folder: Path, index: int, layer: nn.Module, state_dict: Mapping[str, Any]) -> str:
    from safetensors.torch import save_file

    linear, activation = layer[0], layer[1]  # type: ignore[index]
    name = f"{index + 2}_Dense"
    (folder / name).mkdir()
    weights = part_of(state_dict, f"dense_layers.{index}.0.")
    save_file(
        {f"linear.{key}": value.contiguous() for key, value in weights.items()}, folder / name / "model.safetensors"
    )
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"torch.nn.modules.{'linear' if isinstance(activation, nn.Identity) else 'activation'}"
        f".{type(activation).__name__}",
    }
    (folder / name / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return name


def part_of(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value.detach().cpu().contiguous().clone()
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
