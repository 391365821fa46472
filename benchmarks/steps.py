"""Contenders of one benchmark, each of whose steps is a process of its own with one thread, and what a process took."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
STEPS = ("build", "search")


def one_thread() -> None:
    """For what is imported from here on, and for child processes."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of the packages that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def measured(script: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a contender's steps print as their last line of JSON, together; `failed` is why there is no more.

    Args:
        script: is called with this call's words and `--work STEP NAME PLACE`.
        options: `folder`, in which the steps have a place, and `timeout`, seconds of each.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for step in STEPS:
            command = [sys.executable, script, *sys.argv[1:], "--work", step, name, place]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
            except subprocess.TimeoutExpired:
                return {**found, "failed": f"{step}: not done after {options.timeout:.0f} s"}
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or not lines:
                return {**found, "failed": f"{step}: {(done.stderr.strip() or str(done.returncode))[-300:]}"}
            found |= json.loads(lines[-1])
    return found


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Of searches, in milliseconds."""
    return {f"p{part} ms": round(1000 * float(np.percentile(seconds, part)), 3) for part in (50, 99)}


def on_disk(folder: Path) -> int:
    """Bytes that the files of a folder occupy."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def resident() -> dict[str, int]:
    """Bytes of this process that are its own (RssAnon), and that are mapped from files (RssFile)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def peak() -> float:
    """MiB that this process held at most; ru_maxrss would begin with what the parent held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))
