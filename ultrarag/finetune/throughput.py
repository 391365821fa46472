"""What a run achieves: tokens per second, padding, peak memory, and the share of the device's arithmetic (MFU)."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from ultrarag.hookspecs import Features

#: Dense bf16 and fp16 arithmetic of GPUs in 1e12 operations per second, by a part of their name; NVIDIA's data sheets.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165}


class Throughput:
    """Counts the tokens of this process between two log entries."""

    def __init__(self, model: nn.Module, device: torch.device, half: bool, peak_tflops: float | None = None) -> None:
        """Measure a model.

        Args:
            half: it is trained in bf16 or fp16; without that no peak is assumed.
            peak_tflops: what the device can do, in 1e12 operations per second; default: by its name.
        """
        self.device = device
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._weights = sum(module.weight.numel() for module in linear)
        config = getattr(model, "config", None)
        self._attention = int(getattr(config, "num_hidden_layers", 0)) * int(getattr(config, "hidden_size", 0))
        self._peak = peak_tflops or (_known_peak(device) if half else None)
        self._restart()

    def count(self, sides: Sequence[Features]) -> None:
        """Count a batch's tokens (before it is moved to the device: a sum there would wait for it)."""
        for side in sides:
            mask = side["attention_mask"]
            lengths = mask.sum(1).double()
            self._tokens += int(lengths.sum())
            self._places += mask.numel()
            self._squares += float((lengths**2).sum())

    def entries(self) -> dict[str, float]:
        """What was achieved since the last call, for the log; rounded."""
        seconds, tokens = time.perf_counter() - self._since, self._tokens
        if not tokens:
            return {}
        found = {
            "tokens_per_second": float(round(tokens / seconds)),
            "padding": round(1 - tokens / self._places, 3),
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 2),
        }
        if self._peak:
            found["mfu"] = round(self.flops() / seconds / (self._peak * 1e12), 3)
        self._restart()
        return found

    def flops(self) -> float:
        """Operations of forward and backward over the tokens counted: three times the forward's.

        Each token meets every weight of a linear layer once, and in every layer each token of its text twice (query
        with key, share with value). Recomputation (GradCache, checkpointing) and padding do not count.
        """
        return 3.0 * (2.0 * self._weights * self._tokens + 4.0 * self._attention * self._squares)

    def _restart(self) -> None:
        self._since, self._tokens, self._places, self._squares = time.perf_counter(), 0, 0, 0.0


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: the GPU's by torch, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)
