"""Snapshot: the weights and modules that a model had, to tell whether something made from them still holds."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class _Weight(NamedTuple):
    """A parameter where a module holds it."""

    holder: dict[str, Any]
    name: str
    parameter: Tensor
    pointer: int
    version: int


class Snapshot:
    """What a model is made of now."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._source = model
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._weights = [
            _Weight(module._parameters, name, held, held.data_ptr(), held._version)
            for module in modules
            for name, held in module._parameters.items()
            if held is not None
        ]

    def up_to_date(self, model: nn.Module) -> bool:
        """Whether it was made from this model, with the modules and weights that it has now."""
        if model is not self._source:
            return False
        for now, then in self._children:
            if now != then:
                return False
        for holder, name, parameter, pointer, version in self._weights:  # every query pays for each of them
            if holder.get(name) is not parameter or parameter._version != version or parameter.data_ptr() != pointer:
                return False
        return True
