"""Between CPU and GPU without waiting: while one batch is computed, the next is put together and started.

Whatever waits for the device (reading a mask there, copying from or to memory that is not pinned) would leave it idle
until the next forward is launched. On a CPU all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ultrarag.types import Embeddings

#: Attribute of a tensor on a device: the same values on the CPU.
_ON_HOST = "_ultrarag_on_host"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU from pinned memory, so that nothing waits for work begun before."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def remember_host(moved: Tensor, tensor: Tensor) -> Tensor:
    """Let `on_host(moved)` find the tensor on the CPU that it was moved from; returns `moved`."""
    if moved is not tensor:
        setattr(moved, _ON_HOST, tensor)
    return moved


def on_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU: as it was there, if that is known, else copied, for which the device must finish."""
    known: Tensor | None = getattr(tensor, _ON_HOST, None)
    return tensor.cpu() if known is None else known


def to_host(found: Embeddings) -> Callable[[], Embeddings]:
    """Begin to copy embeddings to the CPU, floats as float32.

    Returns:
        A function that gives them as numpy arrays; it waits for them, and not for what was started on the GPU later.
    """
    devices = {tensor.device for tensor in found.arrays() if tensor.is_cuda}
    if not devices:
        return found.numpy
    copies = found.to(device="cpu", dtype=torch.float32, non_blocking=True)
    copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> Embeddings:
        for event in copied:
            event.synchronize()
        return copies.numpy()

    return wait
