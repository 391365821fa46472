"""NNCF: a backbone's matrix products in int8, with ranges of numbers that were seen on calibration texts."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ultrarag.encoder.engines.openvino_runtime import converted, openvino, without_telemetry
from ultrarag.errors import UsageError
from ultrarag.packages import install

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ultrarag.encoder.engines.backbone import Exported


#: Bits of a weight. With 8, sums of products overflow on processors without VNNI, which add them up in 16 bits: there
#: the same files gave other vectors.
WEIGHT_BITS = 7


def versions() -> dict[str, str]:
    """The versions of all that decides what a quantised model computes, and the bits of its weights.

    Raises:
        UsageError: a package is missing; says how to install it.
    """
    try:
        found = {name: version(name).partition("+")[0] for name in ("nncf", "openvino", "torch")}
        return {**found, "weight bits": str(WEIGHT_BITS)}
    except PackageNotFoundError as error:
        raise _missing() from error


def quantised(exported: Exported, example: Mapping[str, Tensor], batches: Sequence[Mapping[str, np.ndarray]]) -> Any:
    """Return the backbone with its matrix products in int8.

    Args:
        example: to trace with: rows of different lengths, padded on the right.
        batches: what the ranges of numbers are taken from.

    Raises:
        UsageError: a package is missing.
        RuntimeError, and what tracing raises: the backbone cannot be converted or quantised.
    """
    nncf, model = _nncf(), converted(exported, example)
    rows = nncf.Dataset([[batch[name] for name in example] for batch in batches])
    tables = nncf.IgnoredScope(types=["Gather"], validate=False)  # of embeddings: no time is won by them in int8
    seven_bits = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    with _quiet():
        return nncf.quantize(
            model,
            rows,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            ignored_scope=tables,
            advanced_parameters=seven_bits,
        )


def _nncf() -> Any:
    openvino()
    try:
        with without_telemetry():
            import nncf
    except ImportError as error:
        raise _missing() from error
    return nncf


def _missing() -> UsageError:
    return UsageError(f"quantising needs the packages nncf and openvino: {install('nncf', 'openvino')}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its bars and its log go to standard output, which is for results."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)  # nncf.set_log_level changes the handlers too, which may be others'
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
