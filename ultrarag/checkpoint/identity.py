"""Fingerprint: a model's identity as the hash of its content; never of a name or a path."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ultrarag.types import EncoderSettings


def fingerprint(model: nn.Module, adapter: str, settings: EncoderSettings) -> str:
    """Return the SHA-256, in hexadecimal, of everything that a vector depends on.

    Hashed: the adapter, the settings (heads, pooling, prompts, normalisation, lengths), the tokenizer, and every
    weight as float32. Two models with the same fingerprint give the same vectors; renaming, moving or re-saving a
    model changes nothing, changing one weight does.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([1, adapter, _declared(settings)], sort_keys=True).encode())
    digest.update(tokenizer_content(model.tokenizer))
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _declared(settings: EncoderSettings) -> dict[str, Any]:
    """The settings that are not the default, so that a field added in a later release changes no identity."""
    default = EncoderSettings(heads=()).to_dict()
    return {name: value for name, value in settings.to_dict().items() if value != default[name]}


def tokenizer_content(tokenizer: Any) -> bytes:
    """What decides how a text becomes token ids, without the padding and truncation of the last call."""
    special = json.dumps({key: str(value) for key, value in tokenizer.special_tokens_map.items()}, sort_keys=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        return f"{type(tokenizer).__name__}{special}{vocabulary}".encode()
    content = json.loads(backend.to_str())
    content.pop("padding", None)
    content.pop("truncation", None)
    return f"{special}{json.dumps(content, sort_keys=True)}".encode()


def _bytes(tensor: torch.Tensor) -> Any:
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
