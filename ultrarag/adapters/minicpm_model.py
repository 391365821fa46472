"""MiniCPM-Embedding as an `Embedder`: its config and loading, its sparse head, and a save that others read rightly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.adapters.embedder import Embedder, distinct_tokens
from ultrarag.adapters.embedder_files import (
    fitted_linear,
    load_heads,
    load_tokenizer,
    read_settings,
    save_embedder,
    without_loading_report,
)
from ultrarag.adapters.sentence_transformers_files import ModulesDeclaration, read_declaration
from ultrarag.errors import CheckpointError
from ultrarag.types import EncoderSettings, Sparse

if TYPE_CHECKING:
    from transformers import GraniteConfig, GraniteModel

    from ultrarag.hookspecs import LoadOptions


#: Values that mean the same in both configurations.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_bias",
    "attention_dropout",
)
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SCALES = ("scale_emb", "scale_depth")


def read_config(path: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        CheckpointError: it cannot be read, or is of a model that this adapter does not know.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    kind = values.get("model_type")
    if kind == "granite" and values.get("is_causal") is not False:
        raise CheckpointError(f"{path}: this Granite model is causal, not a MiniCPM embedder; use the adapter 'icl'")
    if kind not in ("minicpm", "granite"):
        raise CheckpointError(
            f"{path}: model_type is '{kind}'; the adapter 'minicpm-embedding' reads 'minicpm' as openbmb publishes it, "
            "and 'granite' as it is saved here; for other models use the adapter 'bge' or 'icl'"
        )
    return values


def granite_config(values: Mapping[str, Any], path: Path) -> GraniteConfig:
    """Return the configuration of the equivalent Granite model.

    Args:
        values: what config.json holds, of MiniCPM or already of Granite.
        path: where it was read, for messages.

    Raises:
        CheckpointError: a value is missing, or says something that Granite cannot follow.
    """
    from transformers import GraniteConfig

    if values["model_type"] == "granite":
        config = GraniteConfig.from_dict(dict(values))
        config.is_causal = False
        return config
    missing = [name for name in (*_NEEDED, *_SCALES) if values.get(name) is None]
    if missing:
        raise CheckpointError(f"{path}: '{missing[0]}' is missing; a MiniCPM embedder declares it")
    if values.get("is_causal", False):
        raise CheckpointError(f"{path}: is_causal is true: this is MiniCPM the language model, not an embedder")
    config = GraniteConfig(
        **{name: values[name] for name in _SAME if values.get(name) is not None},
        embedding_multiplier=float(values["scale_emb"]),
        residual_multiplier=values["scale_depth"] / math.sqrt(values["num_hidden_layers"]),
        attention_multiplier=1 / math.sqrt(_head_dim(values)),
        rope_parameters=_rope(values, path),
        use_cache=False,
    )
    config.is_causal = False
    return config


def _head_dim(values: Mapping[str, Any]) -> int:
    return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def _rope(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    theta = float(values.get("rope_theta") or 10000.0)
    scaling: Mapping[str, Any] = values.get("rope_scaling") or {"type": "default"}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(scaling["factor"])}
    if kind == "longrope":
        return {"rope_theta": theta, **_longrope(values, scaling, path)}
    raise CheckpointError(f"{path}: rope_scaling of type '{kind}' is not supported (supported: linear, longrope)")


def _longrope(values: Mapping[str, Any], scaling: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """LongRoPE with the one set of factors that the published model uses for every text that it takes.

    MiniCPM's code fills its table of angles once, for `max_position_embeddings` tokens: the long factors where that
    is more than `original_max_position_embeddings`, else the short ones, whatever the length of a text. transformers
    would choose anew for each batch, by its longest text, and a vector would depend on its batchmates; with the
    chosen factors under both names it cannot, here or in any other tool.
    """
    half = _head_dim(values) // 2
    for name in ("short_factor", "long_factor"):
        if len(scaling.get(name) or ()) != half:
            raise CheckpointError(f"{path}: rope_scaling['{name}'] must hold {half} numbers, half of a head's width")
    longest = int(values.get("max_position_embeddings") or 2048)
    original = int(scaling.get("original_max_position_embeddings") or longest)
    factors = [float(value) for value in scaling["long_factor" if longest > original else "short_factor"]]
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(longest / original) / math.log(original))
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": original,
        "attention_factor": float(amplitude),
        "factor": max(1.0, longest / original),  # wanted by transformers; without effect beside the line above
    }


#: Ids that never get a lexical weight: unknown, begin, end, and Light's padding.
DROPPED_IDS = (0, 1, 2, 73440)
QUERY_FORMAT = "Instruction: {} Query: {}"
PLAIN_QUERY_FORMAT = "Query: {}"
#: Tensors of published files that the embeddings do not need: the language-model head, and tables of angles.
_UNUSED = ("lm_head.weight", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
#: Published models know 512 tokens; Light 8192, which its max_position_embeddings says.
_SHORT_LENGTH = 512


class MiniCPMEmbedder(Embedder):
    """`Embedder` with the sparse head of MiniCPM-Embedding-Light."""

    def _sparse(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Sparse:
        """ReLU((w h + b) / max over the text's tokens of |h|) in float32, the largest per distinct id.

        Source:
            UltraRAG v1's retriever for MiniCPM-Embedding-Light.
        """
        linear = self._head("sparse", self.sparse_linear)
        keep = mask.bool()
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            norms = hidden.norm(dim=-1).masked_fill(~keep, 0)
            largest = norms.amax(dim=1, keepdim=True).clamp(min=1e-9)
            weights = torch.relu(F.linear(hidden, linear.weight.float(), linear.bias.float()).squeeze(-1) / largest)
        return distinct_tokens(ids, weights, keep & ~torch.isin(ids, torch.tensor(DROPPED_IDS, device=ids.device)))


def load_minicpm(path: str, options: LoadOptions, heads: tuple[str, ...]) -> MiniCPMEmbedder:
    """Load a published MiniCPM embedder, or one saved here.

    Raises:
        CheckpointError: another kind of model, or weights that are missing, unknown or of another shape.
        UsageError: an option that the model cannot follow.
    """
    folder = Path(path)
    values = read_config(folder / "config.json")
    declared = read_declaration(folder)
    config = granite_config(values, folder / "config.json")
    tokenizer = _load_tokenizer(folder, values, options)
    if (
        config.pad_token_id is None
        and tokenizer.pad_token_id is not None
        and tokenizer.pad_token_id < config.vocab_size
    ):
        config.pad_token_id = tokenizer.pad_token_id
    backbone, extra = _load_backbone(folder, config)
    model = MiniCPMEmbedder(backbone, tokenizer, _settings(values, declared, options))
    model.settings.heads = load_heads(model, folder, options, heads, _sparse_head(extra, config, folder))
    return model


def save_minicpm(model: MiniCPMEmbedder, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write `save_embedder`'s files, with eager attention named in config.json.

    SDPA goes by the attention modules' own `is_causal`, which Granite sets to true whatever its configuration says,
    and would read a batch without padding causally. Eager attention goes by the mask alone, which is right. Without
    it transformers and sentence-transformers would give other vectors than this model, with no error.
    """
    save_embedder(model, path, state_dict)
    file = Path(path) / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values.update(is_causal=False, attn_implementation="eager")
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_tokenizer(folder: Path, values: Mapping[str, Any], options: LoadOptions) -> Any:
    """Load the tokenizer; transformers must not look into the config.json of a kind that it does not know."""
    from transformers import PreTrainedConfig

    config: Any = None
    if values["model_type"] == "minicpm":
        config = PreTrainedConfig()
        config.tokenizer_class = values.get("tokenizer_class")
    try:
        return load_tokenizer(folder, options, config)
    except (ValueError, ImportError) as error:
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder} has a sentencepiece tokenizer.model and no tokenizer.json, which cannot be read: "
                "`pip install sentencepiece protobuf`, or add a tokenizer.json"
            ) from error
        raise


def load_granite(folder: Path, config: Any) -> tuple[GraniteModel, list[str]]:
    """Load MiniCPM's layers as transformers' Granite.

    Returns:
        The model, and the names of tensors in the files that it has no place for.

    Raises:
        CheckpointError: a tensor is missing; names it.
    """
    from transformers import GraniteModel

    with without_loading_report():
        loaded: Any = GraniteModel.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    backbone, report = loaded
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder}: the weights lack {len(report['missing_keys'])} tensor(s) that MiniCPM needs, "
            f"first '{min(report['missing_keys'])}'; the checkpoint is incomplete"
        )
    return backbone, list(report["unexpected_keys"])


def _load_backbone(folder: Path, config: GraniteConfig) -> tuple[GraniteModel, dict[str, Tensor]]:
    """Return the model, bidirectional, and the tensors of the files that it has no place for."""
    backbone, unexpected = load_granite(folder, config)
    for module in backbone.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # type: ignore[assignment]
    unknown = [name for name in unexpected if not name.endswith(_UNUSED)]
    return backbone, _read_tensors(folder, unknown)


def _read_tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Read single tensors out of a checkpoint's files."""
    if not names:
        return {}
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in names if name in tensors.keys()})  # noqa: SIM118
    for file in sorted(folder.glob("pytorch_model*.bin")) if not found else []:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        found.update({name: tensors[name] for name in names if name in tensors})
    return found


def _sparse_head(extra: Mapping[str, Tensor], config: GraniteConfig, folder: Path) -> dict[str, nn.Linear]:
    """The sparse head among a published model's own tensors: a linear layer onto one number, under any name.

    Raises:
        CheckpointError: for tensors that are something else; a model that is loaded in part gives other vectors.
    """
    if not extra:
        return {}
    stems = {name.rsplit(".", 1)[0] for name in extra}
    stem = min(stems)
    weight, bias = extra.get(f"{stem}.weight"), extra.get(f"{stem}.bias")
    known = {f"{stem}.weight", f"{stem}.bias"} >= set(extra)
    if not known or weight is None or tuple(weight.shape) != (1, config.hidden_size):
        described = ", ".join(f"'{name}' {tuple(tensor.shape)}" for name, tensor in sorted(extra.items())[:4])
        raise CheckpointError(
            f"{folder}: the weights hold {len(extra)} tensor(s) that a MiniCPM embedder does not have: {described}; "
            "it is another model, or of a newer kind"
        )
    bias = torch.zeros(1) if bias is None else bias
    return {"sparse": fitted_linear({"weight": weight, "bias": bias}, config.hidden_size, folder)}


def _settings(values: Mapping[str, Any], declared: ModulesDeclaration | None, options: LoadOptions) -> EncoderSettings:
    """Settings of a published model out of its configuration, of one saved here out of modules.json.

    `adapt_mean_pooling` means that the published code scales hidden states so that their plain mean is the mean
    weighted by position: pooling is then the weighted mean, once, whatever modules.json calls it.
    """
    published = values["model_type"] == "minicpm"
    declared = declared or ModulesDeclaration()
    pooling = declared.pooling or "weighted_mean"
    if values.get("adapt_mean_pooling"):
        pooling = "weighted_mean"
    chosen = replace(
        declared,
        pooling=pooling,
        normalize=declared.normalize or published,
        max_length=declared.max_length or _longest(values),
        dense=[],
    )
    settings = read_settings(chosen, options)
    if not settings.query_instruction:  # else modules.json of a checkpoint saved here has the whole prefix
        settings.query_format, settings.query_plain_format = QUERY_FORMAT, PLAIN_QUERY_FORMAT
    return settings


def _longest(values: Mapping[str, Any]) -> int:
    """The tokens that the published model was trained on: 512, or with LongRoPE all that it has places for."""
    positions = int(values.get("max_position_embeddings") or _SHORT_LENGTH)
    return positions if values.get("rope_scaling") else min(positions, _SHORT_LENGTH)
