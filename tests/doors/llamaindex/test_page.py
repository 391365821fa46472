"""The example of this page"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "doors.md"


def test_the_example_runs_and_says_what_its_comments_say(
    tmp_path: Path, minilm: str, quick_builds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## LlamaIndex\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": minilm}
    lines, said = block.splitlines(), 0
    try:
        for statement in ast.parse(block).body:
            code = ast.get_source_segment(block, statement) or ""
            value = eval(code, names) if isinstance(statement, ast.Expr) else exec(code, names)
            comment = re.search(r"# (\d+)$", lines[(statement.end_lineno or 1) - 1])
            if comment is not None:
                assert value == int(comment[1]), code
                said += 1
    finally:
        names["live"].close()
    assert said == 2
