"""Linear layers in float32 by oneDNN, on CPUs where torch's own library multiplies matrices slowly.

On AMD processors with AVX-512 MKL, which torch calls for float32, stays at the speed of AVX2: on a Zen 5 at 108 to 115
GFLOP/s a core, where oneDNN, which is in torch too, reaches 190 to 265 in the products of a forward and a backward
(benchmarks/products.py). Layers keep their weights, names and results; only the order of the sums is another.

oneDNN makes code for each number of rows that it has not met, in 0.3 to 1 ms, and holds half a megabyte of it, for up
to 1,024 of them: so the number of rows is rounded up, by tokens that belong to no text where texts are packed
(packing.py), else by rows of zeros.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ultrarag.errors import UsageError

#: Environment variable: on or off; default: by the processor.
SETTING = "ULTRARAG_ONEDNN"
#: Rows from which on oneDNN is faster, of a weight of 384 x 384: of 8 it takes 0.9 of the time, of 4 1.3 times as long.
LEAST_ROWS = 8


def rounded(rows: int) -> int:
    """The number of rows that so many are computed as: some hundred numbers up to 4,096, at most a sixteenth more."""
    if rows <= 32:
        return -(-rows // 4) * 4
    step = max(8, 1 << ((rows - 1).bit_length() - 5))
    return -(-rows // step) * step


def multiply_by_onednn(model: nn.Module) -> None:
    """Have the plain linear layers of a model on a CPU multiplied by oneDNN, where that is faster on this machine."""
    if by_onednn():
        for layer in model.modules():
            if type(layer) is nn.Linear and "forward" not in layer.__dict__:
                layer.__class__ = OneDnnLinear


@cache
def _agrees() -> bool:
    """Whether this torch has the product, under a name that is not of its documented API, and it is one."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    rows = torch.linspace(-1, 1, 9 * 5).view(9, 5)
    weight, bias = torch.linspace(-2, 1, 3 * 5).view(3, 5), torch.linspace(0, 1, 3)
    try:
        _transformed()
        return torch.allclose(_product(rows, weight, bias), F.linear(rows, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False


def by_onednn() -> bool:
    """Whether oneDNN multiplies here: by ULTRARAG_ONEDNN, else on AMD processors with AVX-512.

    Raises:
        UsageError: the variable is neither on nor off.
    """
    value = os.environ.get(SETTING, "").lower()
    if value not in ("", "on", "off"):
        raise UsageError(
            f"the environment variable {SETTING} is '{value}'; it is on or off (default: by the processor)"
        )
    return value != "off" and (value == "on" or _slow_without()) and _agrees()


@cache
def _slow_without() -> bool:
    return (
        "AuthenticAMD" in _vendor()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _vendor() -> str:
    """A text that names the processor's maker."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    with information.open(encoding="utf-8", errors="replace") as lines:
        return next((line for line in lines if line.startswith("vendor_id")), "")


class OneDnnLinear(nn.Linear):
    """A linear layer whose products, of the backward too, oneDNN computes where they are of float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """`input`: (..., in_features); as `nn.Linear`."""
        weight, bias = self.weight, self.bias
        if not _suits(input, weight):
            return F.linear(input, weight, bias)
        if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (input, weight, bias)):
            return _differentiable(input, weight, bias)
        return _product(input, weight, bias)


def _suits(rows: Tensor, weight: Tensor) -> bool:
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or _transformed():
        return False
    return (
        rows.dtype is torch.float32
        and weight.dtype is torch.float32
        and rows.numel() >= LEAST_ROWS * weight.shape[-1] > 0
        and rows.shape[-1] == weight.shape[-1]  # else the error is torch's, which names both
        and rows.device.type == "cpu"
        and type(rows) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def _transformed() -> bool:
    """Whether a transform of torch.func is on, or derivatives forward: both know torch's own product alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows @ weight.T + bias, for (..., in_features); no view, which could not be changed in place in training."""
    found = _multiply(_filled(rows.reshape(-1, rows.shape[-1])), weight, bias)
    return found.resize_(*rows.shape[:-1], len(weight))


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], ""))


def _filled(rows: Tensor) -> Tensor:
    """The rows, and rows of zeros up to the rounded number; contiguous: as weights oneDNN takes none that overlap."""
    missing = rounded(len(rows)) - len(rows)
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def _differentiable(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, _Product.apply(rows, weight, bias))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product, with what its backward needs: of a frozen weight, as beside LoRA, not the rows."""
        of_rows, of_weight, _ = ctx.needs_input_grad
        ctx.shape = rows.shape
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the rows, the weight and the bias, where they are asked for."""
        rows, weight = ctx.saved_tensors
        multiply = _differentiable if torch.is_grad_enabled() else _multiply  # of create_graph=True
        flat = gradient.reshape(-1, gradient.shape[-1])
        filled = _filled(flat)
        gradients: list[Tensor | None] = [None, None, flat.sum(0) if ctx.needs_input_grad[2] else None]
        if weight is not None:
            gradients[0] = multiply(filled, weight.t(), None)[: len(flat)].view(ctx.shape)
        if rows is not None:
            gradients[1] = multiply(filled.t(), _filled(rows.reshape(-1, rows.shape[-1])).t(), None)
        return gradients[0], gradients[1], gradients[2]
