"""Matrices cast once: what autocast casts anew in every forward, kept beside the float32 weights.

For one query the casting alone takes longer than a float32 forward does: see benchmarks/precision.py. The arithmetic is
autocast's, to the bit, and the model that loads, trains and saves stays in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ultrarag.packing import ORIGINAL


class Casts:
    """Twins of a model by dtype: all is shared with the model but the matrices of its transformers backbone."""

    def __init__(self, stopped: bool = False) -> None:
        self._lock = threading.Lock()
        self._twins: dict[torch.dtype, _Twin] = {}
        self._stopped = stopped

    def __reduce__(self) -> tuple[type[Casts], tuple[bool]]:
        """A copy of an encoder makes its own."""
        return Casts, (self._stopped,)

    def of(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """What to call under autocast to `dtype`; the model itself where a twin could differ from it.

        A twin is made at first use, and anew once a weight or a module is not the one that it was made from.
        """
        with self._lock:
            if self._stopped:
                return model
            twin = self._twins.get(dtype)
            if twin is None or not twin.up_to_date(model):
                twin = self._twins[dtype] = _Twin(model, dtype)
            return twin.model

    def stop(self) -> None:
        """The weights change from now on (training): hold no twin, and make none any more."""
        with self._lock:
            self._stopped = True
            self._twins.clear()


class _Weight(NamedTuple):
    """A parameter where a module holds it."""

    holder: dict[str, Any]
    name: str
    parameter: Tensor
    pointer: int
    version: int


class _Twin:
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        modules = list(model.modules())
        self._source = model
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._weights = [
            _Weight(module._parameters, name, held, held.data_ptr(), held._version)
            for module in modules
            for name, held in module._parameters.items()
            if held is not None
        ]
        whole = not any(_runs_something_else(module) for module in modules)
        cast = set(_castable(model)) if whole else set()
        self.model = _copied(model, cast, dtype, {}) if cast else model

    def up_to_date(self, model: nn.Module) -> bool:
        """Whether it was made from this model, with the modules and weights that it has now."""
        return (
            model is self._source
            and all(now == then for now, then in self._children)
            and all(
                weight.holder.get(weight.name) is weight.parameter
                and weight.parameter.data_ptr() == weight.pointer
                and weight.parameter._version == weight.version
                for weight in self._weights
            )
        )


def _runs_something_else(module: nn.Module) -> bool:
    """Whether calling the module does not (only) run its `forward`: it is compiled, or weights are moved for it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_hf_hook")


def _castable(model: nn.Module) -> Iterator[nn.Module]:
    """The plain linear layers of stock transformers models: other code may do more with a weight than multiply."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part).__module__.startswith("transformers."):
            for layer in part.modules():
                plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
                if plain and layer.weight.dtype is torch.float32 and not layer.weight.is_meta:
                    yield layer


def _copied(module: nn.Module, cast: set[nn.Module], dtype: torch.dtype, known: dict[int, nn.Module]) -> nn.Module:
    """The module with children of its own; parameters, buffers and everything else are the original's."""
    if (found := known.get(id(module))) is not None:
        return found
    twin = module.__new__(type(module))
    known[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    twin.__dict__[ORIGINAL] = module
    twin._buffers = dict(module._buffers)
    twin._parameters = dict(module._parameters)
    if module in cast:
        for name, weight in module._parameters.items():
            if weight is not None:
                twin._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    twin._modules = {
        name: None if child is None else _copied(child, cast, dtype, known) for name, child in module._modules.items()
    }
    return twin
