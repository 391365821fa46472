"""MiniCPM's published configuration, translated to the transformers model that computes the same: Granite.

MiniCPM is Llama with three factors, and Granite has all of them: embeddings times `scale_emb`, each residual branch
times `scale_depth / sqrt(layers)`, and attention at `1 / sqrt(head_dim)`. The names of the weights are equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GraniteConfig

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
