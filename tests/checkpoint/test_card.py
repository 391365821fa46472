"""The model card: names from outside are shown as they are, and mark nothing up."""

from __future__ import annotations

import pytest

from ultrarag.checkpoint import Manifest, Training
from ultrarag.checkpoint.card import model_card
from ultrarag.types import EncoderSettings


def card(**training) -> list[str]:
    manifest = Manifest("bge", EncoderSettings(heads=("dense",)), "f" * 64, Training(**training))
    return model_card(manifest, False, (32, 32)).splitlines()


NAMES = {
    "a|b": r"a\|b",
    "two\nlines\r\n# Title": "two lines  # Title",
    "<img src=x onerror=alert(1)>": "&lt;img src=x onerror=alert(1)&gt;",
    "[free](http://x) `code` *bold*": r"\[free\](http://x) \`code\` \*bold\*",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_data_sets_name_stays_in_its_cell(name):
    (row,) = [line for line in card(data=[{"name": name, "rows": 3, "sha256": "0" * 64}]) if "| 3 |" in line]
    assert row == f"| {NAMES[name]} | 3 | {'0' * 16} |"


@pytest.mark.parametrize("name", NAMES)
def test_a_models_name_marks_nothing_up(name):
    lines = card(parent="e" * 64, parent_name=name, merge={"weight": 0.5, "with": name, "path": name})
    assert f"Parent: {NAMES[name]} (`{'e' * 64}`)" in lines
    assert f"Weights: 0.5 of the trained ones, the rest of {NAMES[name]} ({NAMES[name]})." in lines


def test_a_metrics_name_stays_in_its_cell():
    lines = card(metrics={"before": {"nDCG|10": 0.5}, "after": {"nDCG|10": 0.6}})
    assert r"| nDCG\|10 | 0.5000 | 0.6000 |" in lines
