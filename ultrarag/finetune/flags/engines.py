"""DeepSpeed and FSDP: the configurations that come with the package, and DeepSpeed made ready where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from ultrarag.errors import UsageError
from ultrarag.optional import install, quiet_deepspeed

_RESOURCES = Path(__file__).parents[2] / "resources"


def engine_files(engine: str) -> dict[str, str]:
    """Return our configurations of an engine by their short names: stage1 is ds_stage1.json of "deepspeed"."""
    files = sorted((_RESOURCES / engine).glob("*.json"))
    return {file.stem.removeprefix("ds_"): str(file) for file in files}


def prepare_deepspeed(trains: bool) -> None:
    """Keep DeepSpeed from printing and compiling where there is no GPU; call it before anything imports it.

    Args:
        trains: whether it was asked for; accelerate imports it in every run, if it is installed.

    Raises:
        UsageError: it was asked for and is not installed.
    """
    if trains and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"--deepspeed needs the package deepspeed: {install('deepspeed')}")
    quiet_deepspeed()
    if trains and os.environ.get("DS_ACCELERATOR") == "cpu":
        _reduce_over_gloo()


def _reduce_over_gloo() -> None:
    """Leave out the reduction through shared memory: it is compiled when first used, in a minute and with g++."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
