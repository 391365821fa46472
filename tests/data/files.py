"""Small files for the tests of data commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, *rows: Any) -> str:
    """Write rows as JSON lines; texts as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def read(path: str | Path) -> list[Any]:
    """Read JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
