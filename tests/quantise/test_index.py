"""A live index in int8: its calibration is part of a generation's identity, and only measured pairs are searched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.quantise.conftest import COLLECTION, needs_nncf
from ultrarag import Encoder
from ultrarag.encoder.engines import Quantised
from ultrarag.encoder.engines.quantised import FOLDER
from ultrarag.errors import FingerprintError, UsageError
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build
from ultrarag.testing.tiny import TEXTS

PASSAGES = list(COLLECTION.corpus.values())


@pytest.fixture
def built_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder runs in this process: a child would import everything again."""
    monkeypatch.setattr(start, "run_builder", lambda root, generation, **options: Build(root, generation, "cpu").run())


def index(path: Path, encoder: Encoder) -> LiveIndex:
    live = LiveIndex.create(path, encoder, backend="numpy")
    live.add(PASSAGES)
    return live


def own_vectors(live: LiveIndex, encoder: Encoder, precision: str) -> bool:
    """Whether the stored vectors are the encoder's in this precision."""
    held = live._core.live.backend.vectors([passage.id for passage in PASSAGES]).dense
    fresh = encoder.encode([passage.encodable for passage in PASSAGES], precision=precision, progress=False).dense
    return bool(np.abs(held - fresh).max() < 1e-6)


@needs_nncf
def test_a_build_in_int8_is_calibrated_on_the_passages_gated_swapped_and_rolled_back(plain, tmp_path, built_here):
    with index(tmp_path / "kb", Encoder.load(plain, device="cpu")) as live:
        generation = live.build(plain, precision="int8")
        assert generation.precision.startswith("int8:")
        assert live.build(plain, precision="int8").id == generation.id
        live.swap(generation, (COLLECTION.queries, COLLECTION.qrels))
        shown = {entry["id"]: entry["precision"] for entry in live.status()["generations"]}
        assert shown == {1: "fp32", generation.id: generation.precision}
        encoder = live._core.live.encoder
        assert own_vectors(live, encoder, "int8")
        assert not own_vectors(live, encoder, "fp32")
        assert live.search(TEXTS[0], k=1)[0].id == "p0"
        live.rollback()
        assert live.search(TEXTS[0], k=1)[0].id == "p0"
        assert live._core.live.generation.precision == "fp32"
        live.swap(live.build(plain, precision="int8"), force=True)
    with LiveIndex.open(tmp_path / "kb") as live:
        assert live._core.live.encoder.precision == generation.precision


@needs_nncf
def test_a_generation_takes_what_is_quantised_beside_its_checkpoint(kept, plain, tmp_path, built_here):
    with index(tmp_path / "kb", Encoder.load(plain, device="cpu")) as live:
        generation = live.build(kept, precision="int8")
        assert generation.precision == Encoder.load(kept, precision="int8").precision
        live.swap(generation, force=True)
        assert live.build(kept, share=False).precision == generation.precision  # as the live one


@needs_nncf
def test_queries_in_another_precision_need_a_pair_that_was_measured(kept, plain, tmp_path):
    float32, int8 = Encoder.load(plain, device="cpu"), Encoder.load(kept, precision="int8")
    index(tmp_path / "kb", float32).close()
    with LiveIndex.open(tmp_path / "kb", int8) as live:  # measured: passages in float32, queries in int8
        before = live.search(TEXTS[0], k=8)
        live.add(PASSAGES)
        assert own_vectors(live, int8, "fp32")
        query = int8.encode(TEXTS[0], "query").dense[0]
        assert before[0].score == pytest.approx(float(query @ float32.encode(TEXTS[0]).dense[0]), abs=1e-5)
    index(tmp_path / "other", int8).close()
    with LiveIndex.open(tmp_path / "other", float32) as live:  # and the other way round
        assert live.search(TEXTS[0], k=1)[0].id == "p0"
        assert own_vectors(live, int8, "int8")


@needs_nncf
def test_a_pair_that_nobody_measured_is_refused(quantised: Path, plain: Path, tmp_path: Path):
    found = Quantised.read(quantised)
    assert found is not None
    replace(found, measured=()).write(quantised / FOLDER)
    index(tmp_path / "kb", Encoder.load(plain, device="cpu")).close()
    with pytest.raises(FingerprintError, match=r"holds vectors in fp32, and queries in int8:\w+ were not measured"):
        LiveIndex.open(tmp_path / "kb", Encoder.load(quantised, precision="int8"))
    index(tmp_path / "other", Encoder.load(quantised, precision="int8")).close()
    with pytest.raises(FingerprintError, match=r"holds vectors in int8:\w+, and queries in fp32 were not measured"):
        LiveIndex.open(tmp_path / "other", Encoder.load(plain, device="cpu"))


@needs_nncf
def test_a_refresh_of_an_index_in_int8_is_a_full_one(kept: Path, tmp_path: Path):
    rows = [{"query": text, "pos": [text]} for text in TEXTS]
    live = index(tmp_path / "kb", Encoder.load(kept, precision="int8"))
    with live, pytest.raises(UsageError, match=r"effort='query' learns by the stored vectors.*give effort='full'"):
        live.refresh(rows, output_dir=tmp_path / "new", gate=False, effort="query")
