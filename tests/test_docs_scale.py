"""docs/scale.md holds what benchmarks/scale.py computes, and its flags exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
_spec = importlib.util.spec_from_file_location("benchmark_scale", ROOT / "benchmarks" / "scale.py")
assert _spec is not None
assert _spec.loader is not None
scale = importlib.util.module_from_spec(_spec)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    sys.modules[_spec.name] = scale
    _spec.loader.exec_module(scale)
    yield
    del sys.modules[_spec.name]


def test_the_tables_are_what_the_script_computes():
    found = scale.tables(scale.Assumptions(), scale.read_measured())
    assert scale.filled(PAGE, found) == PAGE, "docs/scale.md is out of date: python benchmarks/scale.py"


def test_an_assumption_moves_what_depends_on_it():
    usual, measured = scale.Assumptions(), scale.read_measured()
    fast = replace(usual, mfu=2 * usual.mfu)
    assert scale.passages_per_gpu_second(fast) == pytest.approx(2 * scale.passages_per_gpu_second(usual))
    wide = replace(usual, dense=2 * usual.dense)
    assert scale.graph_rate(wide, measured) == pytest.approx(scale.graph_rate(usual, measured) / 2)
    assert scale.kinds(wide)["dense binary"] == usual.dense / 4


def test_the_commands_of_the_page(capsys, monkeypatch, tmp_path):
    page = tmp_path / "scale.md"
    page.write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(scale, "PAGE", page)
    for line in re.findall(r"^python benchmarks/scale\.py.*$", PAGE, flags=re.M):
        assert scale.main(shlex.split(line, comments=True)[2:]) == 0
    assert page.read_text(encoding="utf-8") == PAGE
    assert "| 1B |" in capsys.readouterr().out


def test_a_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match="<!-- rates -->"):
        scale.filled("nothing", {"rates": ""})
