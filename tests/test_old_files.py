"""Files written by commit dee4ec6 open, search, and go on as before; tests/fixtures/dee4ec6 says how they were made."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ultrarag import Encoder
from ultrarag.checkpoint import read_manifest
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex

OLD = Path(__file__).parent / "fixtures" / "dee4ec6"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
TEXTS, SEARCHES, ROWS, TRAINING = (EXPECTED["options"][name] for name in ("texts", "searches", "rows", "training"))
NEW = {"id": "new", "text": "seals sink slowly under water", "metadata": {"lang": "en", "number": 99}}


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(OLD / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture(params=["numpy", "qdrant-edge"])
def index(request, tmp_path):
    """The folder of an old index, and what its searches gave."""
    folder = tmp_path / f"index-{request.param}"
    if request.param == "numpy":
        shutil.copytree(OLD / folder.name, folder)
    else:
        with tarfile.open(OLD / f"{folder.name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
    return folder, EXPECTED[request.param]


def hits(live):
    return [[(hit.id, hit.score) for hit in live.search(**search)] for search in SEARCHES]


def assert_same_hits(found, expected):
    """The same scores, and the same ids in their order but for those that tie, which the old version left to chance."""
    for mine, theirs in zip(found, expected, strict=True):
        assert [score for _, score in mine] == pytest.approx([score for _, score in theirs], abs=1e-5)
        last = theirs[-1][1]  # others may tie with the last one, beyond the end
        assert above(mine, last) == above(theirs, last)


def above(hits, last):
    """Ids with a score above one, those of equal scores as a set."""
    scores = sorted({round(score, 4) for _, score in hits if score > last + 1e-5}, reverse=True)
    return [{id for id, score in hits if round(score, 4) == wanted} for wanted in scores]


def test_a_checkpoint_gives_the_same_vectors(checkpoint):
    encoder = Encoder.load(checkpoint, device="cpu")
    assert encoder.fingerprint == EXPECTED["fingerprint"] == encoder.manifest.fingerprint
    found, expected = encoder.encode(TEXTS), EXPECTED["vectors"]
    assert np.abs(found.dense - expected["dense"]).max() < 1e-5
    for mine, theirs in zip(found.sparse.to_dicts(), expected["sparse"], strict=True):
        assert {str(token): weight for token, weight in mine.items()} == pytest.approx(theirs, abs=1e-5)
    for row, mask, theirs in zip(found.colbert, found.mask, expected["colbert"], strict=True):
        assert np.abs(row[: int(mask.sum())] - theirs).max() < 1e-5


def test_an_index_answers_the_same_and_goes_on(index, checkpoint, tiny_m3, quick_builds):
    folder, expected = index
    with LiveIndex.open(folder) as live:
        assert [passage.id for passage in live.passages()] == expected["ids"]
        assert_same_hits(hits(live), expected["hits"])
        live.rollback()  # the generation of the base model had not seen the last writes
        assert {hit.id for hit in live.search("hot oven", k=20, weights={"dense": 1.0})} == set(expected["ids"])
        live.rollback()
        assert_same_hits(hits(live), expected["hits"])
        live.add([NEW])
        assert live.delete(["p0"]) == 1
        live.swap(live.build(tiny_m3, adapter="bgem3"))
        assert live.search("seals sink slowly under water", weights={"dense": 1.0})[0].id == "new"
        live.rollback()
        assert live.fingerprint == EXPECTED["fingerprint"]
        live.vacuum()
    with LiveIndex.open(folder) as live:
        assert {passage.id for passage in live.passages()} == {*expected["ids"], "new"} - {"p0"}


def test_fine_tuning_goes_on_from_a_checkpoint(checkpoint, tmp_path):
    rows = [{**row, "query": f"how {row['query']}"} for row in ROWS]
    result = finetune(checkpoint, rows, tmp_path / "out", num_train_epochs=1, save_strategy="no", **TRAINING)
    assert result.steps == 2
    (first, second) = read_manifest(tmp_path / "out").lineage()
    assert first["fingerprint"] == second["parent"] == EXPECTED["fingerprint"]


def test_a_stopped_run_is_resumed(checkpoint, tmp_path):
    """The last two steps are those that a run without the stop makes, up to the CPU's rounding in the first two."""
    options = {**TRAINING, "num_train_epochs": 2, "save_steps": 2, "allow_seen_data": True}
    shutil.copytree(OLD / "training", tmp_path / "training")
    resumed = finetune(checkpoint, ROWS, tmp_path / "training", resume_from_checkpoint=True, **options)
    assert resumed.steps == 4
    whole = finetune(checkpoint, ROWS, tmp_path / "whole", **options)
    mine, theirs = (Encoder.load(run.checkpoint, device="cpu").encode(TEXTS) for run in (resumed, whole))
    assert np.abs(mine.dense - theirs.dense).max() < 1e-3
