"""Code that comes with a model runs where somebody allowed it, wherever it is loaded again, and nowhere else."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.retrieve import servers
from ultrarag import Encoder
from ultrarag.checkpoint import read_manifest
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.generation import IndexLayout
from ultrarag.retrieve.generation.source import has_consent, inherit_consent
from ultrarag.testing.tiny import TEXTS, tiny_remote_code

ROWS = [{"query": TEXTS[i], "pos": [TEXTS[i + 1]], "neg": [TEXTS[(i + 3) % 8]]} for i in (0, 2, 4, 6)]
SMALL: dict[str, Any] = {"train_group_size": 2, "per_device_train_batch_size": 2, "num_train_epochs": 1}
SMALL |= {"save_strategy": "no", "report_to": "none", "skip_data_check": True}
REFUSED = r"run by Python code that comes with it \(modeling_acme.py; .*give trust_remote_code=True"


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory):
    """A model with code of its own; what transformers copies of it stays in the test's folder."""
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("own")
    tiny_remote_code(folder / "acme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(sys, "path", list(sys.path))
        yield folder / "acme"


def test_training_is_refused_before_it_begins(own_code: Path, tmp_path: Path) -> None:
    for load in (lambda: Encoder.load(own_code), lambda: finetune(own_code, ROWS, tmp_path / "out", **SMALL)):
        with pytest.raises(UsageError, match=REFUSED):
            load()
    assert not (tmp_path / "out").exists()


def test_consent_holds_through_training_and_in_an_index(own_code: Path, tmp_path: Path, quick_builds: None) -> None:
    out = tmp_path / "out"
    finetune(own_code, ROWS, out, trust_remote_code=True, learning_rate=1e-3, **SMALL)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.remote_code
    for adapter in (None, "bge"):  # a record is no consent: the folder may come from anywhere
        with pytest.raises(UsageError, match=REFUSED):
            Encoder.load(out, adapter)
    with LiveIndex.create(tmp_path / "index", Encoder.load(own_code, trust_remote_code=True), backend="numpy") as live:
        live.add([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        with pytest.raises(UsageError, match=REFUSED):
            live.build(out)
        live.swap(live.build(out, trust_remote_code=True))
    with LiveIndex.open(tmp_path / "index") as live:
        assert live.encoder.trust_remote_code
        assert live.search(TEXTS[3], k=1)[0].id == "3"
    copy = tmp_path / "index" / "generations" / "2" / "checkpoint" / "modeling_acme.py"
    copy.write_text(copy.read_text() + "\n# changed\n")
    with pytest.raises(CheckpointError, match="is not what was allowed to run"):
        LiveIndex.open(tmp_path / "index")


def test_a_generation_that_is_fetched_inherits_consent_to_the_same_code_alone(own_code: Path, tmp_path: Path) -> None:
    with LiveIndex.create(tmp_path / "index", Encoder.load(own_code, trust_remote_code=True), backend="numpy") as live:
        live.add([{"id": "a", "text": TEXTS[0]}])
    layout = IndexLayout(tmp_path / "index")
    first = layout.final(1)
    for number, changed in ((2, ""), (3, "\n# changed\n")):
        fetched = layout.final(number)
        shutil.copytree(layout.checkpoint(first), layout.checkpoint(fetched))
        code = layout.checkpoint(fetched) / "modeling_acme.py"
        code.write_text(code.read_text() + changed)
        inherit_consent(layout, fetched)
    assert has_consent(layout.final(2))
    assert not has_consent(layout.final(3))


def test_consent_holds_for_both_sides_of_a_model(own_code: Path, tmp_path: Path, quick_builds: None) -> None:
    plain = Encoder.load(own_code, trust_remote_code=True)
    query = plain.around(copy.deepcopy(plain.model))
    with torch.no_grad():
        next(iter(query.model.parameters())).add_(0.1)
    sided = Encoder.of_sides(plain, query)
    assert sided.trust_remote_code
    assert sided.side("query").trust_remote_code
    out = sided.save(tmp_path / "out")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.remote_code
    assert manifest.sides is not None
    with pytest.raises(UsageError, match=r"run by Python code .*modeling_acme.py; named in passage/config.json"):
        Encoder.load(out)
    with LiveIndex.create(tmp_path / "index", plain, backend="numpy") as live:
        live.add([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        with pytest.raises(UsageError, match="run by Python code that comes with it"):
            live.build(out)
        generation = live.build(out, trust_remote_code=True)
        assert generation.shares
        live.swap(generation)
    with LiveIndex.open(tmp_path / "index") as live:
        assert live.encoder.asymmetric
        assert live.encoder.trust_remote_code


def test_a_refresh_runs_the_code_that_the_live_encoder_may(own_code: Path, tmp_path: Path, quick_builds: None) -> None:
    guard = [{"query": text, "pos": [text], "neg": [TEXTS[0]]} for text in TEXTS[1:3]]
    with LiveIndex.create(tmp_path / "index", Encoder.load(own_code, trust_remote_code=True), backend="numpy") as live:
        live.add([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        asked = {"gate": False, "effort": "query", "guard_data": guard, "max_forgetting": 1.0, "learning_rate": 1e-3}
        live.refresh(ROWS, output_dir=tmp_path / "out", **asked, **SMALL)
        assert live.encoder.asymmetric
        assert live.encoder.trust_remote_code


def test_a_model_without_code_records_nothing(tmp_path: Path) -> None:
    from ultrarag.testing.tiny import tiny_bert

    tiny_bert(tmp_path / "model")
    encoder = Encoder.load(tmp_path / "model", trust_remote_code=True)
    encoder.save(tmp_path / "saved")
    assert "remote_code" not in json.loads((tmp_path / "saved" / "ultrarag.json").read_text())
    LiveIndex.create(tmp_path / "index", encoder, backend="numpy").close()
    assert not list((tmp_path / "index").rglob("consent.json"))


def test_workers_are_told(own_code: Path) -> None:
    from ultrarag.encode.ray import RayJob, RayPool
    from ultrarag.encode.ray.worker import Order, Worker

    job = RayJob.from_json(RayJob(RayPool("local"), str(own_code), "bge", trust_remote_code=True).to_json())
    for trusted, told in {
        job.trust_remote_code: "is another encoder here",
        False: "give trust_remote_code=True",
    }.items():
        order = Order(job.checkpoint, "bge", "0" * 64, "fp32", ("dense",), "cpu", 1, None, {}, trusted)
        assert told in json.loads(Worker(order, None)._failure)["message"]


def test_ranks_are_told(own_code: Path, tmp_path: Path) -> None:
    from ultrarag.encode import Rank
    from ultrarag.retrieve.build.__main__ import encode_share

    with LiveIndex.create(tmp_path / "index", Encoder.load(own_code, trust_remote_code=True), backend="numpy") as live:
        live.add([{"id": text, "text": text} for text in TEXTS])
    share = (tmp_path / "index", str(own_code), Rank.of_environment(), None, None, "cpu")
    with pytest.raises(UsageError, match=REFUSED):
        encode_share(*share)
    assert encode_share(*share, trust_remote_code=True) in (0, len(TEXTS))


def test_the_processes_of_a_corpus_have_consent(own_code: Path, tmp_path: Path, monkeypatch) -> None:
    from ultrarag.encode import ModelChoice, encode_corpus, processes

    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"_id": t, "text": t}) + "\n" for t in TEXTS))
    started: list[Any] = []

    def run(model, folder, info, corpus, devices, progress):
        started.append(model)

    monkeypatch.setattr(processes, "_run_processes", run)
    model = ModelChoice(str(own_code), trust_remote_code=True)
    encode_corpus(model, tmp_path / "corpus.jsonl", tmp_path / "out", devices=("cpu", "cpu"), progress=False)
    assert (started[0].trust_remote_code, started[0].adapter) == (True, "bge")


def test_a_new_mirror_is_told_by_itself(own_code: Path, tmp_path: Path, memory: Path, quick_builds: None) -> None:
    """Nobody's consent elsewhere is handed on; what was given to a mirror holds for the same code later."""
    if reason := servers.missing("qdrant_client"):
        pytest.skip(reason)
    uri = f"qdrant://{memory}/mirrored"
    with LiveIndex.create(tmp_path / "a", Encoder.load(own_code, trust_remote_code=True), uri=uri) as live:
        live.add([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        wanted = [hit.id for hit in live.search(TEXTS[2], k=3, heads=["dense"])]
        with pytest.raises(UsageError, match=REFUSED):
            LiveIndex.open(tmp_path / "b", uri=uri)
        with LiveIndex.open(tmp_path / "b", uri=uri, trust_remote_code=True) as mirror:
            assert mirror.encoder.trust_remote_code
            assert [hit.id for hit in mirror.search(TEXTS[2], k=3, heads=["dense"])] == wanted
        with LiveIndex.open(tmp_path / "b", uri=uri) as mirror:  # recorded
            assert mirror.encoder.trust_remote_code
            out = tmp_path / "out"
            finetune(own_code, ROWS, out, trust_remote_code=True, learning_rate=1e-3, **SMALL)
            live.swap(live.build(out, trust_remote_code=True))
            mirror._core.watcher.poll()  # type: ignore[union-attr]
            assert mirror.fingerprint == live.fingerprint
