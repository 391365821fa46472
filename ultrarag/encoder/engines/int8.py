"""Int8: the forward of a quantised model, which computes what it was made for or refuses; it never becomes float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ultrarag.encoder.engines.backbone import (
    INPUTS,
    Compiled,
    Dense,
    Exported,
    Forward,
    Head,
    output_of,
    with_backbone,
)
from ultrarag.encoder.engines.choice import Choice, same_dense
from ultrarag.encoder.engines.nncf_quantiser import quantised
from ultrarag.encoder.engines.openvino_runtime import UNTRACEABLE, compiled_int8, kept_head, save
from ultrarag.encoder.engines.quantised import AGAIN, MODEL, Quantised, checked_files
from ultrarag.encoder.engines.snapshot import Snapshot
from ultrarag.errors import UsageError
from ultrarag.hookspecs import Features


class Streams(NamedTuple):
    """How a forward uses the CPU."""

    #: forwards at a time
    at_once: int
    #: of all of them together
    threads: int


class Int8:
    """The int8 forward of one model: `of(model)` is what to call."""

    def __init__(self, record: Quantised, twin: nn.Module, made_of: Snapshot, folder: Path, forward: Forward) -> None:
        self.record = record
        #: of the checkpoint
        self.folder = folder
        #: of the backbone
        self.forward = forward
        self._twin, self._made_of = twin, made_of

    @classmethod
    def load(cls, folder: Path, record: Quantised, choice: Choice, streams: Streams) -> Int8:
        """Compile what is quantised beside a checkpoint, for the model of it that is given.

        Raises:
            CheckpointError: its files are damaged.
            UsageError: the package of the runtime is missing.
        """
        path, model = checked_files(folder) / MODEL, choice.model
        forward = compiled_int8(path, record.inputs, *streams, _head(choice, record.output))
        config = getattr(backbone_of(model), "config", None)
        twin = with_backbone(model, Compiled(forward, record.output, config))
        forward.gives_dense = forward.gives_dense and same_dense(choice, twin, forward)
        return cls(record, twin, Snapshot(model), folder, forward)

    def of(self, model: nn.Module) -> nn.Module:
        """The model to call.

        Raises:
            UsageError: a weight of the model is not the one that was quantised.
        """
        if not self._made_of.up_to_date(model):
            raise UsageError(
                f"the model has changed since it was quantised: encode with precision='fp32', or save it and {AGAIN}"
            )
        return self._twin

    def dense(self, model: nn.Module) -> Dense | None:
        """What gives the dense vectors of queries from their tokens, without the adapter; None where nothing does.

        Raises:
            UsageError: a weight of the model is not the one that was quantised.
        """
        self.of(model)
        return self.forward.dense if self.forward.gives_dense else None

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "an encoder in int8 cannot be copied or sent to another process: load the checkpoint there, with "
            "precision='int8'"
        )


def _head(choice: Choice, output: str) -> Any:
    """The converted head of a model; None where it gives no dense vector, or stays with the adapter."""
    rows: Any = choice.probes[0]
    if "dense" not in rows["heads"]:
        return None
    head, exported = Head(choice.encode, choice.model, output), Exported(backbone_of(choice.model), output)
    return kept_head(head, exported, _inputs(rows), choice.fingerprint())


def quantise_backbone(
    model: nn.Module, example: Features, batches: Sequence[Features], stage: Path
) -> tuple[tuple[str, ...], str]:
    """Write the model's backbone in int8 into a folder; return the names of its inputs, and which output it gives.

    Args:
        example: to trace with: rows of different lengths.
        batches: what the ranges of numbers are taken from; without padding.

    Raises:
        UsageError: the model cannot be quantised, says why; a package is missing.
    """
    try:
        backbone = backbone_of(model)
        inputs = _inputs(example)
        output = output_of(backbone, inputs)
        arrays = [{name: value.numpy() for name, value in _inputs(batch).items()} for batch in batches]
        save(quantised(Exported(backbone, output), inputs, arrays), str(stage / MODEL))
    except UNTRACEABLE as error:
        if isinstance(error, UsageError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"this {type(model).__name__} cannot be quantised: {reason}") from error
    return tuple(inputs), output


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a model that runtimes compute.

    Raises:
        AttributeError: it has none.
    """
    backbone: Any = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise AttributeError("it has no part called 'backbone'")
    return backbone


def _inputs(rows: Any) -> dict[str, Tensor]:
    """What the backbone is given of a batch, padded on the right."""
    found: dict[str, Tensor] = {name: rows[name] for name in INPUTS if isinstance(rows.get(name), torch.Tensor)}
    if not bool(found["attention_mask"][:, 0].all()):
        found = {name: value.flip(1) for name, value in found.items()}
    return found
