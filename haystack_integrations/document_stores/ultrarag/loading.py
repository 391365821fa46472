"""Models for Haystack's components, which say where with devices of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from haystack.utils import ComponentDevice

if TYPE_CHECKING:
    from ultrarag import Encoder

#: Haystack's device, or a name such as "cuda:0"; None: the one that torch finds
Device: TypeAlias = "ComponentDevice | str | None"


def torch_device(device: Device) -> str | None:
    """The device as torch calls it."""
    return device.to_torch_str() if isinstance(device, ComponentDevice) else device


def load_encoder(model: str, adapter: str | None, device: Device, **options: Any) -> Encoder:
    """Load a model; see `Encoder.load`."""
    from ultrarag import Encoder  # with torch: only where a model is loaded

    return Encoder.load(model, adapter, device=torch_device(device), **options)
