"""Quantising: int8 for a checkpoint, calibrated on texts, and published only where it loses little.

A checkpoint and texts come in; a folder beside the checkpoint goes out, with what was measured of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.quantise.calibration import TEXTS, Calibration
    from ultrarag.quantise.command import add_arguments, run
    from ultrarag.quantise.quantising import calibrated_precision, quantise, quantise_copy
else:
    __getattr__, __dir__, __all__ = exports(__name__)
