"""Incremental fine-tuning: replay, merging, lineage, data that was seen before, and the report of every run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.finetune.batches.planning import batch_plan, train_data
from tests.finetune.test_run import QUICK, ROWS
from ultrarag import Encoder
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.cli import main
from ultrarag.errors import TrainingError, UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune.batches.plan import ReplayPlan
from ultrarag.finetune.incremental import KEPT, Trial, WeightSearch, record_of, seen_before
from ultrarag.finetune.output import UNMERGED

OLD = [{"query": f"old query {i}", "pos": [f"old passage {i}"]} for i in range(9)]
HELD_OUT = [{"query": row["query"], "pos": row["pos"]} for row in ROWS[:8]]
GUARD = [{"query": row["query"], "pos": row["pos"]} for row in ROWS[8:16]]
OPTIONS = {**QUICK, "adapter": "bgem3", "train_group_size": 2, "num_train_epochs": 1}


def weights(folder) -> dict[str, torch.Tensor]:
    return Encoder.load(folder, "bgem3", device="cpu").model.state_dict()


# ---- replay


def replay_plan(ratio: float, batch: int = 4, ranks: int = 1) -> ReplayPlan:
    sizes = {"per_device_batch_size": batch, "world_size": ranks, "train_group_size": 1, "seed": 3}
    new, old = (batch_plan(train_data(rows), **sizes) for rows in (ROWS, OLD))
    return ReplayPlan(new, old, ratio)


def test_replay_is_a_share_of_whole_batches_and_every_row_has_its_turn():
    plan = replay_plan(0.375)
    assert (plan.steps_per_epoch, plan.replayed) == (8, 3)
    seen: Counter[str] = Counter()
    for epoch in range(2):
        kinds = []
        for index in range(plan.steps_per_epoch):
            queries = plan.batch(epoch, index, 0).queries
            assert len({query.startswith("old") for query in queries}) == 1
            kinds.append(queries[0].startswith("old"))
            seen.update(queries)
        assert sum(kinds) == 3
        assert kinds != sorted(kinds)  # mixed, not one after the other
    assert all(seen[row["query"]] >= 2 for row in ROWS)  # some queries of ROWS are alike
    # 3 batches of 4, 4 and 1 hold the 9 old rows once per epoch (the last is filled up to two)
    assert all(seen[row["query"]] >= 2 for row in OLD)


def test_replay_is_a_function_of_epoch_index_and_rank():
    plan, again = replay_plan(0.4, batch=2, ranks=2), replay_plan(0.4, batch=2, ranks=2)
    order = [(epoch, index) for epoch in (1, 0, 2) for index in reversed(range(plan.steps_per_epoch))]
    wanted = {key: plan.batch(*key, 1).queries for key in sorted(order)}
    assert {key: again.batch(*key, 1).queries for key in order} == wanted
    assert all(plan.batch(*key, 0).queries != wanted[key] for key in order)
    with pytest.raises(IndexError):
        plan.batch(0, plan.steps_per_epoch, 0)


def test_replay_in_a_run_resumes_exactly(tiny_m3, tmp_path):
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps(row) + "\n" for row in OLD))
    options = {**OPTIONS, "replay_data": [old], "replay_ratio": 0.4, "cache_path": tmp_path / "cache"}
    options |= {"save_steps": 3, "logging_steps": 1}
    whole = finetune(tiny_m3, ROWS, tmp_path / "whole", **options)
    assert whole.steps == 8
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    finetune(tiny_m3, ROWS, tmp_path / "half", resume_from_checkpoint=True, **options)
    mine, theirs = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    record = read_manifest(tmp_path / "whole").training
    assert [(item["name"], item["rows"], item.get("replay", False)) for item in record.data] == [
        ("<rows>", 20, False),
        ("old", 9, True),
    ]


# ---- merging


def test_merged_weights_are_the_average_heads_included_and_the_trained_ones_stay(tiny_m3, tmp_path):
    options = {**OPTIONS, "unified_finetuning": True, "merge_with": "parent", "merge_weight": "0.25"}
    result = finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    parent, trained, merged = (weights(path) for path in (tiny_m3, tmp_path / "out" / UNMERGED, tmp_path / "out"))
    assert {name.split(".")[0] for name in merged} == {"backbone", "colbert_linear", "sparse_linear"}
    for name, tensor in merged.items():
        assert torch.allclose(tensor, parent[name] + 0.25 * (trained[name] - parent[name]), atol=1e-7), name
    assert not torch.equal(merged["sparse_linear.weight"], trained["sparse_linear.weight"])
    manifest = read_manifest(tmp_path / "out")
    assert manifest.fingerprint == result.fingerprint == Encoder.load(tmp_path / "out").fingerprint
    assert manifest.training.merge["with"] == "parent"
    assert manifest.training.merge["weight"] == 0.25
    assert manifest.training.merge["fingerprint"] == manifest.training.parent


def test_auto_takes_the_best_weight_that_keeps_the_guard(tiny_m3, tmp_path, capsys):
    options = {**OPTIONS, "learning_rate": 5e-3, "eval_data": HELD_OUT, "guard_data": GUARD, "merge_with": "parent"}
    result = finetune(tiny_m3, ROWS, tmp_path / "out", max_forgetting=0.02, **options)
    tried = result.merge["tried"]
    least = result.metrics["guard_before"]["nDCG@10"] - 0.02
    assert all((trial["domain"] is None) == (trial["guard"] < least - 1e-9) for trial in tried)
    best = max(trial["domain"] for trial in tried if trial["domain"] is not None)
    assert result.metrics["after"]["nDCG@10"] == pytest.approx(best)
    assert result.metrics["guard_after"]["nDCG@10"] >= least - 1e-9
    assert "merge: weight 0.8" in capsys.readouterr().err
    # what is on the disk is what was measured
    from ultrarag.finetune.evaluate import read_evaluator

    measured = read_evaluator(HELD_OUT, 16, 24)(Encoder.load(tmp_path / "out"), ("dense",))
    assert measured == pytest.approx(result.metrics["after"])
    assert set(result.metrics) == {
        f"{prefix}{stage}" for prefix in ("", "guard_") for stage in ("before", "after", "unmerged")
    }


def searched(guard, domain, least=0.5) -> tuple[Trial, list[Trial]]:
    return WeightSearch(guard, domain, least, lambda trial: None).best()


def test_search_looks_beside_the_best_of_the_grid_and_below_it():
    best, tried = searched(lambda w: 0.62 - 0.2 * w, lambda w: w * (1 - 0.5 * w))
    assert best.weight == pytest.approx(0.6)
    assert {0.7, 0.5} <= {trial.weight for trial in tried}
    assert next(trial for trial in tried if trial.weight == 0.8).domain is None
    assert searched(lambda w: 0.62 - 0.17 * w, lambda w: w)[0].weight == pytest.approx(0.7)
    assert searched(lambda w: 0.51 - 0.1 * w, lambda w: w)[0].weight == 0.1
    assert searched(lambda w: 1.0, lambda w: 0.5)[0].weight == pytest.approx(0.1)  # of equals, the more careful
    with pytest.raises(TrainingError, match=r"no average keeps the guard at 0\.5000.*--max_forgetting"):
        searched(lambda w: 0.4, lambda w: w)


def test_a_run_stopped_while_it_merges_goes_on_without_training_again(tiny_m3, tmp_path, monkeypatch):
    from ultrarag.finetune import incremental
    from ultrarag.finetune.step.trainer import EmbeddingTrainer

    options = {**OPTIONS, "merge_with": "parent", "merge_weight": 0.5, "save_strategy": "no"}
    whole = finetune(tiny_m3, ROWS, tmp_path / "whole", **options)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(incremental._Merger, "finish", stop)
        with pytest.raises(KeyboardInterrupt, match="--resume_from_checkpoint True"):
            finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    monkeypatch.setattr(EmbeddingTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained again"))
    again = finetune(tiny_m3, ROWS, tmp_path / "out", resume_from_checkpoint=True, **options)
    assert again.fingerprint == whole.fingerprint
    assert again.steps == whole.steps


def test_base_is_the_first_model_of_the_lineage(tiny_m3, tmp_path):
    first = finetune(tiny_m3, ROWS, tmp_path / "1", **OPTIONS)
    second = finetune(first.checkpoint, ROWS, tmp_path / "2", **{**OPTIONS, "merge_with": "base", "merge_weight": 0.5})
    assert second.merge["path"] == tiny_m3
    base, trained, merged = (weights(path) for path in (tiny_m3, tmp_path / "2" / UNMERGED, tmp_path / "2"))
    name = next(name for name in merged if name.endswith("word_embeddings.weight"))
    assert torch.allclose(merged[name], (base[name] + trained[name]) / 2, atol=1e-7)


def test_lora_is_merged_before_the_average(tiny_m3, tmp_path):
    pytest.importorskip("peft")
    options = {**OPTIONS, "use_lora": True, "lora_rank": 4, "merge_with": "parent", "merge_weight": 0.5}
    finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    parent, trained, merged = (weights(path) for path in (tiny_m3, tmp_path / "out" / UNMERGED, tmp_path / "out"))
    moved = [name for name in merged if not torch.equal(trained[name], parent[name])]
    assert moved
    assert all(torch.allclose(merged[name], (parent[name] + trained[name]) / 2, atol=1e-7) for name in moved)
    assert (tmp_path / "out" / UNMERGED / "adapter").is_dir()
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_with": "parent"}, "--merge_weight auto needs --eval_data"),
        ({"merge_with": "parent", "eval_data": HELD_OUT}, "--merge_weight auto needs --guard_data"),
        ({"merge_weight": "0.5"}, "merge_weight needs --merge_with"),
        ({"merge_with": "parent", "merge_weight": "1.5"}, "above 0 and at most 1"),
        ({"replay_ratio": 0.2}, "replay_ratio needs --replay_data"),
        ({"replay_data": OLD, "replay_ratio": 1.0}, "between 0 and 1"),
        ({"merge_with": "nowhere/at/all", "merge_weight": 0.5}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(tiny_m3, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        finetune(tiny_m3, ROWS, tmp_path / "out", **OPTIONS, **options)


def test_another_kind_of_model_is_not_merged_with(tiny_m3, minilm, tmp_path):
    with pytest.raises(UsageError, match=r"--merge_with .*(weights are in one|there and|tokenizer)"):
        finetune(tiny_m3, ROWS, tmp_path / "out", **{**OPTIONS, "adapter": "bge"}, merge_with=minilm, merge_weight=0.5)


# ---- lineage


def test_the_chain_outlives_the_folders_of_its_models(tiny_m3, tmp_path, capsys):
    paths = [tiny_m3]
    for number in range(3):
        result = finetune(paths[-1], ROWS, tmp_path / f"model-{number}", eval_data=HELD_OUT, max_steps=2, **OPTIONS)
        paths.append(result.checkpoint)
    for path in paths[1:-1]:
        shutil.rmtree(path)
    assert main(["checkpoint", "log", paths[-1], "--json"]) == 0
    chain = json.loads(capsys.readouterr().out)
    assert len(chain) == 3
    assert [item["fingerprint"] for item in chain[1:]] == [item["parent"] for item in chain[:-1]]
    assert chain[0]["fingerprint"] == result.fingerprint
    assert chain[-1]["parent"] == Encoder.load(tiny_m3, adapter="bgem3").fingerprint
    assert all(item["arguments"]["training"]["learning_rate"] == QUICK["learning_rate"] for item in chain)
    assert main(["checkpoint", "log", paths[-1]]) == 0
    printed = capsys.readouterr().out
    assert all(item["fingerprint"][:12] in printed for item in chain)
    assert printed.count(chain[0]["data"][0]["sha256"][:12]) == 3
    assert f"{chain[0]['metrics']['after']['nDCG@10']:.4f}" in printed
    assert main(["checkpoint", "log", tiny_m3]) == 1
    assert "no ultrarag.json" in capsys.readouterr().err


# ---- data that was seen


def rows(start: int, stop: int) -> list[dict]:
    return [{"query": f"query {i}", "pos": [f"passage {i}"]} for i in range(start, stop)]


def trained_on(*parts, ancestors=()):
    from ultrarag.checkpoint.manifest import Training

    older = [{"fingerprint": "f" * 64, "seen": record_of([train_data(part)])} for part in ancestors]
    return Training(seen=record_of([train_data(part) for part in parts]), ancestors=older)


def test_rows_are_known_again_whatever_file_they_are_in():
    record = trained_on(rows(0, 100))
    same = seen_before(train_data(rows(0, 100)), record)
    assert (same.files, same.share, same.too_many) == (["<rows>"], 1.0, True)
    grown = seen_before(train_data(rows(50, 250)), record)
    assert (grown.files, grown.share, grown.too_many) == ([], 0.25, True)
    assert seen_before(train_data(rows(95, 205)), record).too_many is False
    assert seen_before(train_data(rows(100, 200)), record) is None
    written = [{"query": " QUERY  5", "pos": ["passage 5"], "neg": ["mined"]}, *rows(200, 203)]
    assert seen_before(train_data(written), record).share == 0.25
    older = trained_on(rows(500, 510), ancestors=[rows(0, 100)])
    found = seen_before(train_data(rows(0, 50)), older)
    assert (found.share, found.by[:3]) == (1.0, "fff")


def test_a_large_record_is_small_and_tells_the_share_from_a_sample():
    record = trained_on(rows(0, 3 * KEPT))
    assert len(record.seen["keys"]) < 24_000
    half = seen_before(train_data(rows(2 * KEPT, 4 * KEPT)), record)
    assert half.compared < 2 * KEPT
    assert half.share == pytest.approx(0.5, abs=0.06)
    mixed = trained_on(rows(0, 3 * KEPT), ancestors=[rows(6 * KEPT, 6 * KEPT + 10)])
    assert seen_before(train_data(rows(0, KEPT)), mixed).share == 1.0


def test_a_run_says_what_its_model_has_seen(tiny_m3, tmp_path):
    first = finetune(tiny_m3, ROWS, tmp_path / "1", max_steps=1, **OPTIONS)
    assert not any("trained on before" in note for note in first.notes)
    second = finetune(first.checkpoint, ROWS, tmp_path / "2", max_steps=1, **OPTIONS)
    assert any("100% of the rows were trained on before" in note for note in second.notes)
    third = finetune(first.checkpoint, ROWS, tmp_path / "3", max_steps=1, allow_seen_data=True, **OPTIONS)
    assert not any("trained on before" in note for note in third.notes)


# ---- the report


def test_every_run_writes_its_report(tiny_m3, tmp_path):
    options = {**OPTIONS, "learning_rate": 5e-3, "guard_data": GUARD, "eval_data": HELD_OUT}
    result = finetune(tiny_m3, ROWS, tmp_path / "out", **options)
    page = Path(result.report).read_text(encoding="utf-8")
    assert "<polyline" in page
    assert f"{result.metrics['after']['nDCG@10']:.4f}" in page
    assert f"{result.metrics['guard_after']['nDCG@10']:.4f}" in page
    assert "<h3>Before</h3>" in page
    assert not any(word in page for word in ("<script", "http://", "https://", "src="))
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["metrics"] == result.metrics
    assert found["gained"] or found["lost"]
    bare = finetune(tiny_m3, ROWS, tmp_path / "bare", max_steps=2, **OPTIONS)
    assert "nothing was evaluated" in Path(bare.report).read_text(encoding="utf-8")


def test_paths_in_a_list_of_training_files(tiny_m3, tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    options = {**OPTIONS, "cache_path": tmp_path / "cache", "eval_data": files[0], "max_steps": 1}
    result = finetune(Path(tiny_m3), files, tmp_path / "out", **options)
    assert np.isfinite(result.loss)


def test_rerankers_merge_replay_and_report_too(tmp_path):
    from ultrarag.testing.tiny import tiny_cross_encoder

    (tmp_path / "model").mkdir()
    tiny_cross_encoder(tmp_path / "model")
    options = {
        **OPTIONS,
        "adapter": "bge-reranker",
        "learning_rate": 5e-3,
        "merge_with": "parent",
        "max_forgetting": 0.5,
    }
    options |= {"eval_data": ROWS[:8], "guard_data": ROWS[8:16], "replay_data": ROWS[:4], "replay_ratio": 0.3}
    result = finetune(tmp_path / "model", ROWS, tmp_path / "out", **options)
    assert 0 < result.merge["weight"] <= 1
    assert result.metrics["guard_after"]["nDCG@10"] >= result.metrics["guard_before"]["nDCG@10"] - 0.5
    page = Path(result.report).read_text(encoding="utf-8")
    assert "each with its own candidates" in page
    assert "weight of the trained model" in page
