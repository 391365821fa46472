"""A tiny checkpoint and the same one quantised, once for all tests of the room."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from ultrarag import Encoder
from ultrarag.evaluation import Collection
from ultrarag.quantise import Calibration, quantise
from ultrarag.testing.tiny import TEXTS, tiny_bert
from ultrarag.types import Passage

needs_nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="nncf is not installed")
CALIBRATION = Calibration.of([("passage", text) for text in TEXTS], "the tests' texts")
#: Each text finds itself: whatever keeps vectors alike loses nothing, and other vectors lose all.
COLLECTION = Collection(
    {f"p{number}": Passage(f"p{number}", text) for number, text in enumerate(TEXTS)},
    {f"q{number}": text for number, text in enumerate(TEXTS)},
    {f"q{number}": {f"p{number}": 1} for number, _ in enumerate(TEXTS)},
)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is not quantised."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_bert(folder / "model")
    return Encoder.load(folder / "model", "bge", device="cpu").save(folder / "checkpoint")


@pytest.fixture(scope="session")
def kept(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it that is quantised and was judged; for reading only."""
    target = tmp_path_factory.mktemp("quantised") / "checkpoint"
    quantise(plain, CALIBRATION, COLLECTION, output=target)
    return target


@pytest.fixture
def quantised(kept: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(kept, tmp_path / "checkpoint"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The calibration texts as a file of passages."""
    file = tmp_path / "texts.jsonl"
    rows = [{"_id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
