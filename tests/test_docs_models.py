"""docs/models.md lists what `benchmarks/models.py` found, and one family goes through it here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ultrarag.testing.layouts import LAYOUTS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import models

    yield models
    del sys.modules["models"]


def test_the_table_has_every_layout_and_all_are_equal(models):
    table = models.PAGE.read_text(encoding="utf-8").split(models.BEGIN)[1].split(models.END)[0]
    equal = models.Outcome(0.0, 0.0, 0.0, 0.0)
    assert table.strip() == models.table(dict.fromkeys([*LAYOUTS, *models.LATE], equal))


def test_a_family_goes_through_everything(models, tmp_path):
    outcome = models.run(LAYOUTS["EmbeddingGemma"], tmp_path)
    assert outcome.sound, outcome
