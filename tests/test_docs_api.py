"""The blocks of docs/api.md, run in the order of the page on a tiny model; what a comment says of a value is so."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.retrieve.conftest import checkpoint, other, tiny  # noqa: F401  fixtures
from tests.test_readme import ROOT
from ultrarag.retrieve import LiveIndex

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def check(source: str, names: dict[str, Any]) -> None:
    """Run a block statement by statement, and compare an expression with the literal at the head of its comment."""
    lines = source.splitlines()
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), "docs/api.md", "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), "docs/api.md", "eval"), names)
        comment = lines[statement.end_lineno - 1][statement.end_col_offset :].strip().removeprefix("# ")  # type: ignore[operator]
        literal = re.match(r"(\d+|True|False|None|\{\"\w+\"\})(?=$|[,:;])", comment)
        if literal is not None:
            assert value == ast.literal_eval(literal[0]), f"docs/api.md: {ast.unparse(statement)} is {value!r}"


def test_the_page(tiny, checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_builds) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"encoder": tiny, "checkpoint": checkpoint}
    try:
        for block in BLOCKS:
            if "live.refresh(" in block:  # tests/retrieve/refresh/test_progress.py does
                compile(block, "docs/api.md", "exec")
                continue
            check(block, names)
    finally:
        names["live"].close()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"live\.(\w+)\(", PAGE))))
def test_every_call_of_the_page_exists(name: str) -> None:
    assert callable(getattr(LiveIndex, name))


def test_the_refresh_of_the_page_has_these_arguments() -> None:
    assert {"isolate", "on_progress", "output_dir"} <= inspect.signature(LiveIndex.refresh).parameters.keys()
