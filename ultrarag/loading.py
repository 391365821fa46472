"""What loading an Encoder has to decide: adapter, options and settings, out of arguments, manifest and model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ultrarag.checkpoint import Manifest
from ultrarag.errors import UsageError, did_you_mean
from ultrarag.hookspecs import LoadOptions
from ultrarag.plugins import Adapter, registry
from ultrarag.types import EncoderSettings

#: Names of precisions and the dtype of the forward; None: as the weights are.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def adapter_name(adapter: str | None, manifest: Manifest | None, folder: Path) -> str:
    """The adapter to load with: the one named, else the manifest's; UsageError where neither says."""
    if adapter:
        return adapter
    if manifest:
        return manifest.adapter
    raise UsageError(
        f"{folder} is no checkpoint of ultrarag's (it has no ultrarag.json): name the adapter, "
        f"for example adapter='{_likely(folder)}' "
        f"(installed: {', '.join(registry().names())})"
    )


def _likely(folder: Path) -> str:
    """The built-in adapter that a folder looks made for; only a suggestion."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "sentence-transformers" if (folder / "modules.json").exists() else "bge"
    kinds = " ".join(config.get("architectures") or [])
    if "LayerWise" in kinds:
        return "bge-reranker-minicpm-layerwise"
    if config.get("model_type") == "minicpm":
        return "minicpm-embedding"
    if "ForSequenceClassification" in kinds:
        return "bge-reranker"
    return "bgem3" if (folder / "sparse_linear.pt").exists() else "bge"


def declared_options(options: LoadOptions, settings: EncoderSettings) -> LoadOptions:
    """Fill what the caller left open with what the manifest says."""
    return replace(
        options,
        pooling=options.pooling or settings.pooling,
        normalize=settings.normalize if options.normalize is None else options.normalize,
    )


def settings_of(model: nn.Module, plugin: Adapter, options: LoadOptions, manifest: Manifest | None) -> EncoderSettings:
    """The manifest's settings, else the model's own, else the adapter's heads."""
    own = getattr(model, "settings", None)
    if isinstance(own, dict):
        own = EncoderSettings.from_dict(own)
    if not isinstance(own, EncoderSettings):
        own = EncoderSettings(heads=options.heads or plugin.declared.heads)
    if manifest is None:
        return replace(own)
    return replace(manifest.settings, heads=own.heads, pooling=own.pooling, normalize=own.normalize)


def override_settings(settings: EncoderSettings, changes: dict[str, Any]) -> None:
    """Set fields by name; UsageError for a name that is none, with the nearest."""
    known = [name for name in vars(settings) if name not in ("heads", "pooling", "normalize")]
    for name, value in changes.items():
        if name not in known:
            raise UsageError(f"Encoder.load has no argument '{name}'{did_you_mean(name, known)}")
        if value is not None:
            setattr(settings, name, value)


def checked_precision(precision: str) -> str:
    """Return a known precision, or raise UsageError with the nearest name."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision '{precision}' is unknown{did_you_mean(precision, PRECISIONS)} (fp32, bf16 or fp16)"
        )
    return precision
