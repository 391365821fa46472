"""A card's front matter: what the hub would take, and of the base's card what holds for its children."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.encoder.hub_server import faults
from ultrarag.checkpoint import Manifest, Training
from ultrarag.checkpoint.card import model_card
from ultrarag.types import EncoderSettings

MEASURED = {"before": {"nDCG@10": 0.5}, "after": {"nDCG@10": 0.625, "MRR@10": float("nan")}}


def card(parent: str = "", pairs: bool = False, **training: Any) -> str:
    made = Training(parent_name=parent, **training)
    return model_card(Manifest("bge", EncoderSettings(), "f" * 64, made), pairs, (32, 32))


def data(text: str) -> dict[str, Any]:
    assert faults(text) == []
    return yaml.safe_load(text.split("---\n")[1])


def base(folder: Path, front: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(front, encoding="utf-8")
    return str(folder)


def test_a_model_without_training_says_what_it_is() -> None:
    text = model_card(Manifest("bge", EncoderSettings(), "f" * 64), False, (32, 32))
    found = data(text)
    assert (found["library_name"], found["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize("pairs", [False, True])
def test_what_was_measured_is_the_hubs_model_index(pairs: bool) -> None:
    from huggingface_hub import ModelCard

    text = card("BAAI/bge-m3", pairs, metrics=MEASURED)
    found = data(text)
    assert (found["base_model"], found["base_model_relation"]) == ("BAAI/bge-m3", "finetune")
    assert found["pipeline_tag"] == ("text-ranking" if pairs else "sentence-similarity")
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("ndcg_at_10", "nDCG@10", 0.625)


def test_the_bases_card_hands_on_what_holds_for_the_child(tmp_path: Path) -> None:
    front = (
        "---\nlicense: mit\nlanguage: [en, de]\ndatasets: [a/b]\nbase_model: x/y\npipeline_tag: fill-mask\n---\n# x\n"
    )
    found = data(card(base(tmp_path / "local", front)))
    assert (found["license"], found["language"], found["datasets"]) == ("mit", ["en", "de"], ["a/b"])
    assert found["base_model"] == "x/y"  # of the base itself no name is known
    assert found["pipeline_tag"] == "sentence-similarity"


def test_a_folder_of_the_hubs_cache_has_its_name_there(tmp_path: Path) -> None:
    place = tmp_path / "models--BAAI--bge-m3" / "snapshots" / "0a1b"
    found = data(card(base(place, "---\nlicense: other\nlicense_name: own\nbase_model: x/y\n---\n")))
    assert (found["base_model"], found["license"], found["license_name"]) == ("BAAI/bge-m3", "other", "own")


@pytest.mark.parametrize("front", ["no front matter", "---\n: [\n---\n", "---\n- a list\n---\n"])
def test_where_the_base_says_nothing_no_licence_is_guessed(front: str, tmp_path: Path) -> None:
    found = data(card(base(tmp_path / "local", front)))
    assert not {"license", "language", "datasets", "base_model"} & found.keys()


def test_grandchildren_have_it_from_their_parents_card(tmp_path: Path) -> None:
    first = card(base(tmp_path / "base", "---\nlicense: mit\nbase_model: x/y\n---\n"), metrics=MEASURED)
    assert data(card(base(tmp_path / "child", first)))["license"] == "mit"
    assert data(card(base(tmp_path / "child", first)))["base_model"] == "x/y"
