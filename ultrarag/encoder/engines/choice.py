"""Engine: what computes a model's forward; an engine is used after its vectors were compared with torch's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ultrarag.encoder.engines.backbone import (
    INPUTS,
    Compiled,
    Dense,
    Encode,
    Exported,
    Forward,
    Head,
    output_of,
    with_backbone,
)
from ultrarag.encoder.engines.files import read_race, write_race
from ultrarag.encoder.engines.openvino_runtime import UNTRACEABLE, compiled, installed, openvino
from ultrarag.encoder.engines.races import race_key, remembered_winner, winner
from ultrarag.encoder.engines.setting import AUTO, OPENVINO, TORCH
from ultrarag.encoder.engines.snapshot import Snapshot
from ultrarag.errors import UsageError
from ultrarag.hookspecs import Features

logger = logging.getLogger("ultrarag")

#: Least cosine of an engine's vectors with torch's.
SAME = 0.99999
#: Largest difference of scores and lexical weights, absolute below 1 and relative above.
CLOSE = 1e-3
#: Seconds of the race.
RACE = 1.0
#: reasons why a model is left to torch that were told
_told: set[str] = set()


class Choice(NamedTuple):
    """What an engine is chosen for."""

    encode: Encode
    model: nn.Module
    #: batches to compare and to race with: the first of rows of different lengths, the last of one short row
    probes: Sequence[Features]
    fingerprint: Callable[[], str]
    #: the device and precision of the encoder
    device: str
    precision: str


class Engine:
    """The forward of one model: `of(model)` is what to call."""

    def __init__(
        self,
        name: str = TORCH,
        twin: nn.Module | None = None,
        made_of: Snapshot | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.name = name
        #: of the backbone, where it is compiled
        self.forward = forward
        self._twin, self._made_of = twin, made_of

    def __reduce__(self) -> tuple[type[Engine], tuple[()]]:
        """A copy of an encoder runs on torch: compiled models belong to their process."""
        return Engine, ()

    def of(self, model: nn.Module) -> nn.Module:
        """The model to call: the compiled one, until a weight of the model is not the one that it was made from."""
        if self._twin is None or self._made_of is None:
            return model
        if not self._made_of.up_to_date(model):
            logger.warning(
                "the model has changed since engine '%s' was made for it: torch runs it from now on", self.name
            )
            self.name, self._twin = TORCH, None
            return model
        return self._twin

    def dense(self, model: nn.Module) -> Dense | None:
        """What gives the dense vectors of queries from their tokens, without the adapter; None where nothing does."""
        forward = self.forward
        return forward.dense if forward and forward.gives_dense and self.of(model) is self._twin else None

    @classmethod
    def chosen(cls, name: str, choice: Choice) -> Engine:
        """The engine of this name, `auto` the faster one; torch where the model cannot be compiled, which is told once.

        Raises:
            UsageError: the engine's package is missing, or the device or precision is not the engine's.
        """
        able = choice.device == "cpu" and choice.precision == "fp32"
        if name == TORCH or (name == AUTO and not (able and installed())):
            return cls()
        if not able:
            raise UsageError(
                f"engine '{name}' computes in float32 on a CPU, and the encoder is on {choice.device} in "
                f"{choice.precision}: leave the engine out, or say device='cpu', precision='fp32'"
            )
        openvino()
        if name == AUTO and remembered_winner(choice.fingerprint(), torch.get_num_threads()) == TORCH:
            return cls()
        found = cls._compiled(choice)
        return cls() if name == AUTO and found.name != TORCH and winner(_race(choice, found)) == TORCH else found

    @classmethod
    def _compiled(cls, choice: Choice) -> Engine:
        try:
            twin, forward = _twin(choice)
            reason = _difference(choice, twin)
        except UNTRACEABLE as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not reason:
            forward.gives_dense = forward.gives_dense and same_dense(choice, choice.model, forward)
            return cls(OPENVINO, twin, Snapshot(choice.model), forward)
        kind = type(choice.model).__name__
        if f"{kind}: {reason}" not in _told:
            _told.add(f"{kind}: {reason}")
            logger.warning("engine 'openvino' cannot run this %s, so torch does: %s", kind, reason)
        return cls()


def _twin(choice: Choice) -> tuple[nn.Module, Forward]:
    backbone = getattr(choice.model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise AttributeError("it has no part called 'backbone'")
    rows: Any = choice.probes[0]
    example: dict[str, Tensor] = {name: rows[name] for name in INPUTS if name in rows}
    if not bool(example["attention_mask"][:, 0].all()):  # traced with padding on the right
        example = {name: value.flip(1) for name, value in example.items()}
    output = output_of(backbone, example)
    head = Head(choice.encode, choice.model, output) if "dense" in rows["heads"] else None
    forward = compiled(Exported(backbone, output), example, choice.fingerprint(), torch.get_num_threads(), head)
    return with_backbone(choice.model, Compiled(forward, output, getattr(backbone, "config", None))), forward


def _difference(choice: Choice, twin: nn.Module) -> str:
    """How the compiled model's heads differ from torch's; empty where they are the same."""
    with torch.no_grad():
        for probe in choice.probes:
            expected, found = choice.encode(choice.model, probe), choice.encode(twin, probe)
            for head in ("dense", "colbert"):
                one, other = getattr(expected, head), getattr(found, head)
                if one is not None and not _cosine(one, other, expected.mask if head == "colbert" else None) >= SAME:
                    return f"its {head} vectors are not torch's"
            if expected.scores is not None and not _close(expected.scores, found.scores):
                return "its scores are not torch's"
            if expected.sparse is not None and not _same_words(expected.sparse, found.sparse):
                return "its lexical weights are not torch's"
    return ""


def same_dense(choice: Choice, model: nn.Module, forward: Forward) -> bool:
    """Whether a forward gives the dense vectors of a model by itself, of several texts and of one."""
    with torch.no_grad():
        for probe in choice.probes:
            rows: Any = probe
            ids = [
                row[mask.bool()].tolist() for row, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
            ]
            expected: Any = choice.encode(model, rows).dense
            if not _cosine(expected, torch.from_numpy(forward.dense(ids)), None) >= SAME:
                return False
    return True


def _cosine(one: Tensor, other: Tensor, mask: Tensor | None) -> float:
    cosines = torch.cosine_similarity(one.double(), other.double(), dim=-1)
    return float(cosines.min() if mask is None else cosines[mask.bool()].min())


def _close(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.allclose(one, other, rtol=CLOSE, atol=CLOSE)


def _same_words(one: Any, other: Any) -> bool:
    return other is not None and torch.equal(one.ids, other.ids) and _close(one.weights, other.weights)


def _race(choice: Choice, engine: Engine) -> dict[str, float]:
    """Seconds of both engines over all probes, the best of a second in turn; as remembered, if it was run before."""
    key = race_key(choice.fingerprint(), torch.get_num_threads())
    if known := read_race(key):
        return known
    models = {TORCH: choice.model, engine.name: engine.of(choice.model)}
    best = dict.fromkeys(models, float("inf"))
    end = time.perf_counter() + RACE
    with torch.no_grad():
        while time.perf_counter() < end or float("inf") in best.values():
            for name, model in models.items():
                started = time.perf_counter()
                for probe in choice.probes:
                    choice.encode(model, probe)
                best[name] = min(best[name], time.perf_counter() - started)
    write_race(key, best)
    return best
