"""Files of rows for tests."""

from __future__ import annotations

import json
from pathlib import Path

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def write(path: Path, *rows: object) -> str:
    """Write rows as JSON lines; str and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def numbered(count: int, name: str = "", **more: object) -> list[dict[str, object]]:
    return [{"query": f"{name}q{i}", "pos": [f"{name}p{i}"], "neg": [f"{name}n{i}"], **more} for i in range(count)]
