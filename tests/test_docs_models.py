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
    for name in ("models", "models_refused"):
        del sys.modules[name]


def test_the_table_has_every_layout_and_all_are_equal(models):
    table = models.PAGE.read_text(encoding="utf-8").split(models.BEGIN)[1].split(models.END)[0]
    others = {
        name: models.Outcome(0.0, 0.0, 0.0 if other.lora else None, None if other.head == "score" else 0.0)
        for name, other in models.OTHERS.items()
    }
    assert table.strip() == models.table({**dict.fromkeys(LAYOUTS, models.Outcome(0.0, 0.0, 0.0, 0.0)), **others})


def test_what_is_refused_is_said_in_the_words_of_the_page(models, tmp_path):
    said = models.all_refused(tmp_path)
    page = models.PAGE.read_text(encoding="utf-8")
    assert all(said.values()), said
    assert page.split(models.REFUSALS)[1].split(models.END_REFUSALS)[0].strip() == models.refusals(said)


@pytest.mark.parametrize(
    "name",
    [
        "inference-free sparse (Router)",
        "Router, queries by static vectors",
        "SPLADE, published without modules",
        "potion (model2vec)",
        "static",
        "bge-m3",
        "EmbeddingGemma 2",
        "cross-encoder",
    ],
)
def test_other_families_go_through_everything_too(models, tmp_path, name):
    outcome = models.run_other(models.OTHERS[name], tmp_path)
    assert outcome.sound, outcome


def test_a_family_goes_through_everything(models, tmp_path):
    outcome = models.run(LAYOUTS["EmbeddingGemma"], tmp_path)
    assert outcome.sound, outcome
