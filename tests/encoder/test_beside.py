"""Checkpoints loaded beside an encoder that has one of their models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.encoder.test_sides import TEXTS, a_map, low_rank, moved
from ultrarag import Encoder
from ultrarag.encoder import Sides, load_beside
from ultrarag.errors import CheckpointError
from ultrarag.plugins import Adapter
from ultrarag.testing import tiny


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Encoder:
    folder = tmp_path_factory.mktemp("bert")
    tiny.tiny_bert(folder / "model")
    Encoder.load(folder / "model", "bge", device="cpu", query_instruction="query: ").save(folder / "saved")
    return Encoder.load(folder / "saved", device="cpu")


def child(kind: str, parent: Encoder, folder: Path) -> Path:
    """A checkpoint of which the parent has the passage side."""
    parent.save(folder / "parent")
    other = moved(folder / "parent")
    made = {
        "query side": lambda: Encoder.of_sides(parent, other),
        "query map": lambda: Encoder.of_sides(parent, query_maps=[a_map(32)]),
        "low rank": lambda: Encoder.of_sides(parent, low_rank=low_rank(parent)),
        "both maps": lambda: Encoder.of_sides(parent, other, query_maps=[a_map(32)], passage_maps=[a_map(32, 1)]),
    }[kind]()
    made.save(folder / "child")
    return folder / "child"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The folders that a model is read from."""
    folders: list[str] = []
    load = Adapter.load

    def noted(self: Adapter, path: str, options: Any) -> Any:
        folders.append(Path(path).name)
        return load(self, path, options)

    monkeypatch.setattr(Adapter, "load", noted)
    return folders


@pytest.mark.parametrize(
    ("kind", "left"), [("query side", ["query"]), ("query map", []), ("low rank", []), ("both maps", ["query"])]
)
def test_what_is_in_memory_is_not_read_again(kind, left, parent, tmp_path, read) -> None:
    folder = child(kind, parent, tmp_path)
    expected = Encoder.load(folder, device="cpu")
    read.clear()
    found = load_beside(folder, parent)
    assert found is not None
    assert read == left
    assert isinstance(found.model, Sides)
    assert found.model.passage is parent.model
    assert found.fingerprint == expected.fingerprint == found.identity().fingerprint
    assert (found.query_fingerprint, found.passage_fingerprint) == (
        expected.query_fingerprint,
        expected.passage_fingerprint,
    )
    for side in ("query", "passage"):
        np.testing.assert_array_equal(found.encode(TEXTS, side).dense, expected.encode(TEXTS, side).dense)
    read.clear()
    back = load_beside(tmp_path / "parent", found)  # a rollback
    assert back is not None
    assert back.model is parent.model
    assert (read, back.fingerprint) == ([], parent.fingerprint)
    assert vars(back.settings) == vars(Encoder.load(tmp_path / "parent", device="cpu").settings)
    np.testing.assert_array_equal(back.encode(TEXTS, "query").dense, parent.encode(TEXTS, "query").dense)


def test_a_child_of_a_child_shares_what_did_not_change(parent, tmp_path, read) -> None:
    first = Encoder.load(child("query side", parent, tmp_path), device="cpu")
    Encoder.of_sides(first, query_maps=[a_map(32)]).save(tmp_path / "second")
    read.clear()
    found = load_beside(tmp_path / "second", first)
    assert found is not None
    assert read == []
    assert found.fingerprint == Encoder.load(tmp_path / "second", device="cpu").fingerprint


def test_an_encoder_with_nothing_in_common_gives_none(parent, tmp_path) -> None:
    moved(child("query side", parent, tmp_path).parent / "parent").save(tmp_path / "other")
    assert load_beside(tmp_path / "other", parent) is None
    assert load_beside(tmp_path / "child", moved(tmp_path / "other", scale=0.5)) is None


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_file_that_would_not_be_read_must_be_there_and_as_long_as_it_was(damage, parent, tmp_path) -> None:
    folder = child("query side", parent, tmp_path)
    file = next((folder / "passage").glob("*.safetensors"))  # which would not be read
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="copy it again"):
        load_beside(folder, parent)
