"""OpenVINO: a backbone compiled for this CPU, in float32 or in int8, for batches of any shape."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encoder.engines.files import kept
from ultrarag.errors import UsageError
from ultrarag.packages import install

if TYPE_CHECKING:
    from torch import Tensor

    from ultrarag.encoder.engines.backbone import Exported, Head

#: A forward of one caller uses one stream.
_SETTINGS: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_CPU_PINNING": False,  # several processes would share the same cores
}
#: The name by which a traced head takes what the backbone gives.
HIDDEN = "hidden"
#: What tracing raises where a module cannot be converted.
UNTRACEABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
#: Its importer reports every import to its makers over the network where this package is there.
_TELEMETRY = "openvino_telemetry"


def installed() -> str | None:
    """The version that is installed."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return None


def openvino() -> Any:
    """The package, imported without its telemetry.

    Raises:
        UsageError: it is not installed; says how to.
    """
    try:
        with without_telemetry():
            import openvino as package
    except ImportError as error:
        raise UsageError(f"engine 'openvino' needs the package openvino: {install('openvino')}") from error
    return package


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Have nothing that is imported meanwhile report to its makers."""
    if _TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """A tracer reads every attribute of a model, some of which warn when they are read."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def compiled(
    exported: Exported, example: Mapping[str, Tensor], fingerprint: str, threads: int, head: Head | None = None
) -> Requests:
    """Return the backbone's forward, converted now or read from the cache.

    Args:
        example: two rows or more of different lengths, padded on the right.
        threads: of one forward.
        head: what makes dense vectors of it, which the forward then gives as well, where it can be converted.

    Raises:
        UsageError: the package is missing.
        RuntimeError, and what tracing raises: the backbone cannot be converted.
    """
    package = openvino()
    core = package.Core()
    key = model_key(fingerprint, tuple(example), head is not None)

    def convert() -> Any:
        model = converted(exported, example)
        if head is not None:
            with suppress(*UNTRACEABLE):
                return with_head(model, tuple(example), converted_head(head, exported, example))
        return model

    return compiled_float(kept(key, convert, save, core.read_model), tuple(example), threads)


def model_key(fingerprint: str, names: tuple[str, ...], dense: bool) -> tuple[str, ...]:
    """What a converted model is kept under: with which inputs, and whether it gives dense vectors as well."""
    return (fingerprint, "openvino", *runtime_versions(), *names, *(("dense",) if dense else ()))


def compiled_float(model: Any, names: tuple[str, ...], threads: int) -> Requests:
    """Return the forward of a converted model.

    Args:
        names: of its inputs, in order.
        threads: of one forward; 0: as many as there are.
    """
    settings = {
        **_SETTINGS,
        "INFERENCE_PRECISION_HINT": "f32",  # on a CPU with AMX it would take bf16
        "EXECUTION_MODE_HINT": "ACCURACY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
    }
    return Requests(openvino().Core().compile_model(model, "CPU", settings), names)


def compiled_int8(path: Path, names: tuple[str, ...], streams: int, threads: int, head: Any = None) -> Requests:
    """Return the forward of a quantised model, for as many callers at a time as there are streams.

    Args:
        names: of its inputs, in order.
        threads: of all streams together; 0: as many as there are.
        head: a converted one, which the forward then gives as well.
    """
    core = openvino().Core()
    model = core.read_model(path)
    settings = {
        **_SETTINGS,
        "INFERENCE_PRECISION_HINT": "f32",  # of the rest: bf16 takes 4 % less for a batch, and more for a query (Zen 5)
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": threads,
    }
    if head is not None:
        model = with_head(model, names, head)
    return Requests(core.compile_model(model, "CPU", settings), names)


def kept_head(head: Head, exported: Exported, example: Mapping[str, Tensor], fingerprint: str) -> Any:
    """A head, converted now or read from the cache; None where it cannot be traced, and stays with the adapter."""
    package = openvino()
    with suppress(*UNTRACEABLE):
        key = head_key(fingerprint)
        return kept(key, lambda: converted_head(head, exported, example), save, package.Core().read_model)
    return None


def head_key(fingerprint: str) -> tuple[str, ...]:
    """What a converted head is kept under."""
    return (fingerprint, "openvino head", *runtime_versions())


def runtime_versions() -> tuple[str, str]:
    """Of what converts, and of what it converts from."""
    return version("openvino"), version("torch")


def converted(exported: Exported, example: Mapping[str, Tensor]) -> Any:
    """The backbone as OpenVINO has it, with its own numbers."""
    with warnings.catch_warnings(), _quiet_transformers():
        warnings.simplefilter("ignore")  # a tracer warns of every choice that it takes for constant
        return openvino().convert_model(exported, example_input=dict(example))


def converted_head(head: Head, exported: Exported, example: Mapping[str, Tensor]) -> Any:
    """A head as OpenVINO has it."""
    import torch

    rows = {name: example[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return openvino().convert_model(head, example_input={HIDDEN: exported(**example), **rows})


def with_head(model: Any, names: tuple[str, ...], head: Any) -> Any:
    """A model of both: its outputs are the backbone's, and the dense vectors that the head makes of it."""
    found = {**dict(zip(names, model.inputs, strict=True)), HIDDEN: model.outputs[0].get_node().input_value(0)}
    for port in list(head.inputs):
        name = next(name for name in found if name in port.get_names())
        port.get_node().output(0).replace(found[name].get_node().output(found[name].get_index()))
    results = [output.get_node().input_value(0) for output in (model.outputs[0], head.outputs[0])]
    return openvino().Model(results, model.get_parameters(), "encoder")


def save(model: Any, path: str) -> None:
    """Write a model, float32 as it is."""
    openvino().save_model(model, path, compress_to_fp16=False)


class _Request:
    """A request of a compiled model, for one caller at a time."""

    def __init__(self, model: Any) -> None:
        self.infer: Any = model.create_infer_request()
        #: inputs for one text, by its number of tokens, and of how many tokens the request has them now
        self.alone: dict[int, list[Any]] = {}
        self.given = 0


class Requests:
    """A compiled model, with as many requests as there are callers at a time; see `Forward`."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        self._model, self.names = model, names
        self._ids = names.index("input_ids")
        self._free: list[_Request] = []
        self.gives_dense = len(model.outputs) > 1

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with self._request() as request:
            found: np.ndarray = self._given(request, [np.ascontiguousarray(inputs[name]) for name in self.names])[0]
            return found.copy()

    def dense(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The dense vectors of texts, (texts, dim) float32."""
        with self._request() as request:
            found = self._alone(request, ids[0]) if len(ids) == 1 else self._given(request, self._padded(ids))
            vectors: np.ndarray = found[1].copy()
            return vectors

    @contextmanager
    def _request(self) -> Iterator[_Request]:
        """Lend a request that nobody uses."""
        try:
            request = self._free.pop()
        except IndexError:
            request = _Request(self._model)
        try:
            yield request
        finally:
            self._free.append(request)

    def _given(self, request: _Request, rows: list[np.ndarray]) -> Any:
        """The outputs for arrays, which are the request's own until it is used again."""
        request.given = 0
        return request.infer.infer(rows, share_inputs=True, share_outputs=True)

    def _alone(self, request: _Request, ids: Sequence[int]) -> Any:
        """The outputs for one text, written into tensors of its length: they need no check and no copy."""
        tensors = request.alone.get(len(ids))
        if tensors is None:
            make, shape = openvino().Tensor, (1, len(ids))
            rows = self._rows(np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.int64))
            tensors = request.alone[len(ids)] = [make(row) for row in rows]
        if request.given != len(ids):
            for place, tensor in enumerate(tensors):
                request.infer.set_input_tensor(place, tensor)
            request.given = len(ids)
        tensors[self._ids].data[0] = ids
        return request.infer.infer(share_outputs=True)

    def _padded(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        padded = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return self._rows(padded, mask)

    def _rows(self, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """All inputs, in order."""
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return [known[name] for name in self.names]
