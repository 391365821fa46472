"""OpenVINO: a backbone compiled for this CPU, in float32 or in int8, for batches of any shape."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ultrarag.encoder.engines.files import kept
from ultrarag.errors import UsageError
from ultrarag.packages import install

if TYPE_CHECKING:
    from torch import Tensor

    from ultrarag.encoder.engines.backbone import Exported, Forward

#: A forward of one caller uses one stream.
_SETTINGS: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_CPU_PINNING": False,  # several processes would share the same cores
}
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


def compiled(exported: Exported, example: Mapping[str, Tensor], fingerprint: str, threads: int) -> Forward:
    """Return the backbone's forward, converted now or read from the cache.

    Args:
        example: two rows or more of different lengths, padded on the right.
        threads: of one forward.

    Raises:
        UsageError: the package is missing.
        RuntimeError, and what tracing raises: the backbone cannot be converted.
    """
    package = openvino()
    core = package.Core()
    key = (fingerprint, "openvino", package.__version__, torch.__version__, *example)
    model = kept(key, lambda: converted(exported, example), save, core.read_model)
    settings = {
        **_SETTINGS,
        "INFERENCE_PRECISION_HINT": "f32",  # on a CPU with AMX it would take bf16
        "EXECUTION_MODE_HINT": "ACCURACY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
    }
    return _Requests(core.compile_model(model, "CPU", settings), tuple(example))


def compiled_int8(path: Path, names: tuple[str, ...], streams: int, threads: int) -> Forward:
    """Return the forward of a quantised model, for as many callers at a time as there are streams.

    Args:
        names: of its inputs, in order.
        threads: of all streams together.
    """
    core = openvino().Core()
    settings = {
        **_SETTINGS,
        "INFERENCE_PRECISION_HINT": "f32",  # of the rest: bf16 takes 4 % less for a batch, and more for a query (Zen 5)
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": threads,
    }
    return _Requests(core.compile_model(core.read_model(path), "CPU", settings), names)


def converted(exported: Exported, example: Mapping[str, Tensor]) -> Any:
    """The backbone as OpenVINO has it, with its own numbers."""
    with warnings.catch_warnings(), _quiet_transformers():
        warnings.simplefilter("ignore")  # a tracer warns of every choice that it takes for constant
        return openvino().convert_model(exported, example_input=dict(example))


def save(model: Any, path: str) -> None:
    """Write a model, float32 as it is."""
    openvino().save_model(model, path, compress_to_fp16=False)


class _Requests:
    """A compiled model, with a request for each thread that calls it."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        self._model = model
        self._names = names
        self._own = threading.local()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._model.create_infer_request()
        rows = [np.ascontiguousarray(inputs[name]) for name in self._names]
        found: np.ndarray = request.infer(rows, share_inputs=True)[0]
        return found
