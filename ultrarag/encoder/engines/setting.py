"""Which engine is asked for: by an argument, or by the environment that child processes take over."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from ultrarag.errors import UsageError, did_you_mean

TORCH, OPENVINO, AUTO = "torch", "openvino", "auto"
ENGINES = (TORCH, OPENVINO, AUTO)
#: What may be asked of an encoder; "auto" is one of the float ones.
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
#: Read where no engine is named; a command's --engine sets it, so that its builders and workers follow.
VARIABLE = "ULTRARAG_ENGINE"


def asked_engine(name: str | None) -> str:
    """The engine that is asked for: the one named, else the environment's, else torch.

    Raises:
        UsageError: it is unknown; says where it was named, and the nearest.
    """
    place, value = ("engine", name) if name is not None else (VARIABLE, os.environ.get(VARIABLE) or TORCH)
    if value not in ENGINES:
        raise UsageError(f"{place} '{value}' is unknown{did_you_mean(value, ENGINES)}; one of {', '.join(ENGINES)}")
    return value


def add_engine_flag(parser: Any) -> None:
    """Add --engine to a parser or group."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        action=_SetForProcess,
        help="what runs the model on a CPU in float32: torch, openvino (an extra), or auto, the faster of the two "
        "here (default: torch)",
    )


class _SetForProcess(argparse.Action):
    """Sets the variable: encoders are loaded in many places of a process, and in its children."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        os.environ[VARIABLE] = str(values)
