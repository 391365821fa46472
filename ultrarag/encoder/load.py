"""What loading an Encoder has to decide: options, settings and precision, out of arguments, manifest and model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ultrarag.checkpoint import Manifest
from ultrarag.encoder.engines import INT8, family, is_int8
from ultrarag.errors import CheckpointError, UsageError, did_you_mean
from ultrarag.hookspecs import LoadOptions
from ultrarag.plugins import Adapter
from ultrarag.types import KINDS, EncoderSettings

#: Names of precisions and the dtype of the forward; None: as the weights are.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, INT8: torch.int8}
#: The fastest precision that the device is made for; see `fastest_precision`.
AUTO = "auto"


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
        if name == "token_pooling" and value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"token_pooling is {value!r}; it is a whole number above 0, of vectors that become one")
        if value is not None:
            setattr(settings, name, value)


#: Attributes of a tokenizer that name tokens which stand for something else than text.
_OTHER_MEDIA = ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "eoa_token", "video_token")


def check_vocabulary(model: nn.Module, folder: Path) -> None:
    """Refuse a tokenizer with tokens for which the model has no embedding: it would fail at the first text with one.

    Tokens that stand for images or sounds are let be: text models keep them in the tokenizer of their family.

    Raises:
        CheckpointError: names the first such token.
    """
    for part, tokenizer in _parts(model):
        _check_vocabulary(part, tokenizer, folder)


def _parts(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """What reads texts, with its tokenizer: the model, or what it has for each kind."""
    reader = getattr(model, "text_reader", None)
    if reader is None:
        return [(model, getattr(model, "tokenizer", None))]
    return [(found.body, found.tokenizer) for kind in KINDS for found in (reader(kind),)]


def _check_vocabulary(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    from transformers import PreTrainedModel

    body = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    rows = getattr(body.get_input_embeddings(), "num_embeddings", None) if body is not None else None
    if not isinstance(rows, int) or not callable(getattr(tokenizer, "get_vocab", None)):
        return
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if max(len(tokenizer) - 1, *added) < rows:  # building the vocabulary of 250,000 tokens takes a while
        return
    media = {getattr(tokenizer, name, None) for name in _OTHER_MEDIA}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows and token not in media}
    if beyond:
        first = min(beyond)
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(beyond)} token(s) without an embedding in the model, which has {rows}, "
            f"first '{beyond[first]}' with number {first}: they are not of one model; take the tokenizer that the "
            "model was trained with, or enlarge the model's embeddings (resize_token_embeddings) and train them"
        )


def checked_precision(precision: str, device: torch.device) -> str:
    """Return a known precision, "auto" as the device's; or raise UsageError with the nearest name."""
    if precision == AUTO:
        return fastest_precision(device)
    if precision not in PRECISIONS and not is_int8(precision):
        known = [*PRECISIONS, AUTO]
        raise UsageError(
            f"precision '{precision}' is unknown{did_you_mean(precision, known)} (fp32, bf16, fp16, int8 or auto)"
        )
    return precision


def check_int8(options: LoadOptions, engine: str | None) -> None:
    """Raise UsageError for what int8 is not for."""
    if options.training:
        raise UsageError("precision 'int8' is for encoding: a model is trained in its own numbers")
    if engine == "torch":
        raise UsageError("precision 'int8' is computed by OpenVINO, not by engine 'torch': leave the engine out")


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device that is named, or the one at hand; UsageError where this machine or its torch has none such."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if found.type != "meta":
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"device '{device}' cannot be used ({why}): name another one, such as 'cpu'") from error
    return found


def dtype_of(precision: str, device: torch.device) -> torch.dtype | None:
    """What the forward computes in; None: as the weights are."""
    return PRECISIONS[family(checked_precision(precision, device))]


def fastest_precision(device: torch.device) -> str:
    """bf16 on GPUs since Ampere and on CPUs with AMX or AVX512-BF16, fp16 on older GPUs, else fp32.

    Measured with all-MiniLM-L6-v2: on a CPU with AVX512-BF16 bf16 encodes at 2.5 to 4 times the rate of fp32, on one
    without (AMD EPYC 7003) its matrix products run at a tenth.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(check()) for name in checks if (check := getattr(torch.cpu, name, None)))
