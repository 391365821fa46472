"""A backbone as an engine sees it: what is traced, what stands in its place, and the model around that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ultrarag.hookspecs import Features
from ultrarag.types import Embeddings

#: The adapter's hook: (model, features) -> Embeddings.
Encode = Callable[[nn.Module, Features], Embeddings]
#: Token ids of texts -> their dense vectors, (texts, dim) float32.
Dense = Callable[[Sequence[Sequence[int]]], np.ndarray]

#: What a backbone may be given; an engine is made for those that its adapter gives.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: What an adapter reads of a backbone's output.
OUTPUTS = ("logits", "last_hidden_state")


class Forward(Protocol):
    """A backbone that a runtime computes."""

    #: of its inputs, in order
    names: tuple[str, ...]
    #: whether it also gives the model's dense vectors
    gives_dense: bool

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of the backbone, float32, for (batch, tokens) int64 of each input, by its name."""
        ...

    def dense(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The dense vectors of texts, (texts, dim) float32."""
        ...


class Exported(nn.Module):
    """A backbone with tensors in and one tensor out, as a tracer wants it; rows are padded on the right."""

    def __init__(self, backbone: nn.Module, output: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.output = output
        cached = "use_cache" in inspect.signature(backbone.forward).parameters
        self.options: dict[str, Any] = {"return_dict": True, **({"use_cache": False} if cached else {})}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        found: Tensor = getattr(self.backbone(**inputs, **self.options), self.output)
        return found


class Head(nn.Module):
    """All that an adapter does behind the backbone for a query's dense vector, as a tracer wants it."""

    def __init__(self, encode: Encode, model: nn.Module, output: str) -> None:
        super().__init__()
        self.encode = encode
        self.given = _Given(output, getattr(model.backbone, "config", None))
        self.model = with_backbone(model, self.given)

    def forward(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (batch, dim) of the backbone's output; rows are padded on the right."""
        self.given.hidden = hidden
        features: Any = {"input_ids": input_ids, "attention_mask": attention_mask, "heads": ("dense",), "kind": "query"}
        dense: Tensor = self.encode(self.model, features).dense
        return dense


class _Given(nn.Module):
    """Stands in a backbone's place, and returns what was computed elsewhere."""

    def __init__(self, output: str, config: Any) -> None:
        super().__init__()
        self.output, self.config = output, config
        self.hidden: Tensor | None = None

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(**{self.output: self.hidden})


class Compiled(nn.Module):
    """What stands in a backbone's place: called like it, computed by an engine."""

    def __init__(self, forward: Forward, output: str, config: Any) -> None:
        super().__init__()
        self.run = forward
        self.output = output
        self.config = config

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Return `last_hidden_state`, (batch, tokens, hidden), or `logits`, (batch, labels).

        Positions count from a row's first real token, whatever the padding side.
        """
        given = {name: inputs[name] for name in INPUTS if inputs.get(name) is not None}
        mask = given["attention_mask"]
        first = None if bool(mask[:, 0].all()) else mask.to(torch.int8).argmax(dim=1, keepdim=True)
        if first is not None:
            given = {name: _rolled(value, first) for name, value in given.items()}
        found = torch.from_numpy(self.run({name: value.numpy() for name, value in given.items()}))
        if first is not None and found.dim() == 3:
            found = _rolled(found, -first)
        return SimpleNamespace(**{self.output: found})


def _rolled(rows: Tensor, by: Tensor) -> Tensor:
    """Each row of (batch, tokens, ...) turned to the left by its own number of columns, (batch, 1)."""
    columns = (torch.arange(rows.shape[1]) + by) % rows.shape[1]
    return rows[torch.arange(rows.shape[0])[:, None], columns]


def output_of(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Which of its outputs an adapter reads: a classifier's logits, else hidden states.

    Raises:
        AttributeError: it has neither.
    """
    with torch.no_grad():
        found = backbone(**inputs, return_dict=True)
    output = next((name for name in OUTPUTS if getattr(found, name, None) is not None), None)
    if output is None:
        raise AttributeError(f"its output has none of {', '.join(OUTPUTS)}")
    return output


def with_backbone(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """The model with another backbone; everything else is shared with it."""
    twin = model.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin._modules = {**model._modules, "backbone": backbone}
    return twin
