"""Races of engines: what they are remembered under, and who won."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from ultrarag.encoder.engines.files import read_race
from ultrarag.encoder.engines.openvino_runtime import runtime_versions

#: What the contenders compute by; another word where one has become faster, so that races of before are not remembered.
_RACE = "torch multiplies by oneDNN where that is faster"


def winner(seconds: Mapping[str, float] | None) -> str | None:
    """The faster engine; None where no race was run."""
    return min(seconds, key=lambda name: seconds[name]) if seconds else None


def remembered_winner(fingerprint: str, threads: int) -> str | None:
    """Which engine won the race that was run here before; None where none was."""
    return winner(read_race(race_key(fingerprint, threads)))


def race_key(fingerprint: str, threads: int) -> tuple[str, ...]:
    """What decides a race: the model, the packages, the processor, the threads, and what torch multiplies by."""
    products = os.environ.get("ULTRARAG_ONEDNN", "").lower()  # of ultrarag.products, which imports torch
    return (fingerprint, *runtime_versions(), _processor(), str(threads), _RACE, products)


def _processor() -> str:
    """What tells one CPU from another: its name where the system says it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line for line in lines if line.startswith(("model name", "model\t", "cpu family"))][:3]
    return "".join(names) or platform.processor() or platform.machine()
