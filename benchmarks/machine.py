"""What a result says of where it came from: the machine, the day, the versions, the command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def origin(threads: int | None = None, packages: tuple[str, ...] = ("torch", "transformers")) -> dict[str, Any]:
    """The fields with which a report begins."""
    name = f"{processor_name()}, {os.cpu_count()} cores"
    return {
        "machine": f"{name}, {threads} threads" if threads else name,
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/" + without_folders(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {package: version(package) for package in packages},
    }


def without_folders(text: str) -> str:
    """A command or message with only the names of what it gives by absolute paths: no folder of this machine."""
    return re.sub(r"(?<![\w./:~-])/(?:[^\s/'\"]+/)+", "", text)


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The contenders of a round: in every round another one begins."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def processor_name() -> str:
    """The processor as /proc/cpuinfo names it, with its family and model where the name says no number."""
    path = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in path.read_text().splitlines()] if path.exists() else []
    said = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    name = said.get("model name") or platform.processor() or platform.machine()
    if any(letter.isdigit() for letter in name) or "cpu family" not in said:
        return name
    return f"{name} (family {said['cpu family']}, model {said['model']})"
